"""How long a rollout waits for hosts that do not answer."""

from collections.abc import Callable

from online.clock import Clock
from online.rpc_error import RpcError
from pipelines.contracts.errors import Unavailable

__all__ = ["RETRY_S", "HostWait"]

RETRY_S = 0.25


class HostWait:
    """Hosts are asked again every `RETRY_S`, until they were away for `seconds` in one stretch without any progress.

    Args:
        say: is told, once a stretch, that and why it waits.
    """

    def __init__(self, seconds: float, say: Callable[[str], None], clock: Clock) -> None:
        self._seconds, self._say, self._clock = seconds, say, clock
        self._since: float | None = None

    def restored(self) -> None:
        """There was progress: the next absence is another stretch."""
        self._since = None

    def wait(self, refusal: RpcError) -> None:
        """Sleep a moment; raises `Unavailable` when the stretch has been too long."""
        moment = self._clock.now()
        if self._since is None:
            self._since = moment
            self._say(f"waiting up to {self._seconds:g} s: {refusal.problem}")
        if moment - self._since >= self._seconds:
            raise Unavailable(
                f"{refusal.problem}, for {self._seconds:g} s", expected="every host to answer", got=refusal.got,
                remedy="Start it again, under its name, and run the same command: the rollout goes on where it "
                "stands. Or go on without it by --change-hosts, or back by --back.",
            ) from refusal
        self._clock.sleep(RETRY_S)

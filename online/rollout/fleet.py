"""The hosts of a fleet, by their admin services: what each says it holds, and how a step is taken there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from online.proto import admin_pb2, admin_pb2_grpc
from online.rollout.admin_answer import checked
from online.rollout.fleet_status import CpuHost, FleetStatus
from online.rollout.plan import Step
from online.rpc.channel import open_channel
from online.rpc_error import RpcError, rpc_error_from

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["Answers", "Fleet", "is_away"]

STATUS_TIMEOUT_S, CHANGE_TIMEOUT_S, LOAD_TIMEOUT_S = 5.0, 60.0, 600.0

_AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


def is_away(refusal: RpcError) -> bool:
    """Whether the host could not be asked, or did not say what became of it; else it answered, and refused."""
    return refusal.status in _AWAY


@dataclass(frozen=True)
class Answers:
    """What each host said, or why it said nothing."""

    cpu_tiers: Mapping[str, admin_pb2.CpuTierStatus | RpcError]
    rankers: Mapping[str, admin_pb2.RankerStatus | RpcError]

    def refusals(self) -> Iterator[RpcError]:
        for answer in (*self.cpu_tiers.values(), *self.rankers.values()):
            if isinstance(answer, RpcError):
                yield answer

    def present(self) -> FleetStatus:
        """The hosts that answered."""
        return FleetStatus(
            {host: CpuHost.of(a) for host, a in self.cpu_tiers.items() if not isinstance(a, RpcError)},
            {
                host: {m.version: m.manifest_sha256 for m in a.models}
                for host, a in self.rankers.items() if not isinstance(a, RpcError)
            },
        )

    def status(self) -> FleetStatus:
        """All hosts; raises `RpcError` if one did not answer: a rollout needs to know all of them."""
        for refusal in self.refusals():
            raise refusal
        return self.present()


class Fleet:
    """The admin services of all CPU hosts and rankers, by address `host:port`."""

    def __init__(
        self, cpu_tiers: Sequence[str], rankers: Sequence[str], *, security: "ClientSecurity | None" = None
    ) -> None:
        channels = {host: open_channel(host, security) for host in (*cpu_tiers, *rankers)}
        self._channels = channels
        self._cpu_tiers = {host: admin_pb2_grpc.CpuTierAdminStub(channels[host]) for host in cpu_tiers}
        self._rankers = {host: admin_pb2_grpc.RankerAdminStub(channels[host]) for host in rankers}

    def ask(self, timeout_s: float = STATUS_TIMEOUT_S) -> Answers:
        """Ask every host at once for its status."""
        asked = [
            {host: stub.Status.future(admin_pb2.StatusRequest(), timeout=timeout_s) for host, stub in stubs.items()}
            for stubs in (self._cpu_tiers, self._rankers)
        ]
        return Answers(*({host: _answer(future, host) for host, future in futures.items()} for futures in asked))

    def status(self) -> FleetStatus:
        """What all hosts hold; raises `RpcError` if one does not answer."""
        return self.ask().status()

    def run(self, step: Step) -> None:
        """Take a step; raises `RpcError`, `is_away` if it is not known whether it took effect."""
        stub = (self._cpu_tiers if step.on == "cpu-tier" else self._rankers)[step.host]
        request = admin_pb2.VersionRequest(version=step.version, share=step.share if step.action == "canary" else 0)
        name = "Promote" if step.action in ("canary", "prefer") else step.action.capitalize()
        timeout_s = LOAD_TIMEOUT_S if step.action == "load" else CHANGE_TIMEOUT_S
        try:
            getattr(stub, name)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise rpc_error_from(error, step.host) from error

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


def _answer(future: grpc.Future, host: str):
    try:
        return checked(future.result(), host)
    except grpc.RpcError as error:
        return rpc_error_from(error, host)
    except RpcError as refusal:
        return refusal

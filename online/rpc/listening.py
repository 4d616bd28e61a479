"""Where a host listens, to whom, and how much it takes on: the same for a CPU host and a ranker."""

from dataclasses import dataclass
from pathlib import Path

from online.observe import metrics
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from online.security.credentials import ServerSecurity

__all__ = ["Listening"]

ADMIN_SLOTS = 4


@dataclass(frozen=True, kw_only=True)
class Listening:
    """What a host is told of its ports.

    Attributes:
        port, admin_port: 0 picks a free one.
        metrics_port: the same, of /metrics; None: there is none.
        slots, queue: requests that one process works on at a time, and that wait in it; any more are refused.
        limits: of both ports, narrowed to what their requests need.
        security: TLS and roles; None: plaintext, open to everybody who reaches the ports.
    """

    host: str
    port: int
    admin_port: int
    metrics_port: int | None
    slots: int
    queue: int
    limits: Limits
    security: ServerSecurity | None

    def endpoint(self, name: str, *, max_ids: int, reuse_port: bool = False) -> Endpoint:
        """The port of the requests, for up to `max_ids` ids in each; see `Endpoint`."""
        return Endpoint(
            name, self.host, self.port, self.slots, self.queue, security=self.security,
            limits=self.limits.for_ids(max_ids), reuse_port=reuse_port,
        )

    def admin_endpoint(self) -> Endpoint:
        """The port of the rollout controller."""
        return Endpoint(
            "admin", self.host, self.admin_port, ADMIN_SLOTS, security=self.security, audited=True,
            limits=self.limits.for_admin(),
        )

    def export_metrics(self, workers: Path | None = None) -> dict[str, int]:
        """Answer /metrics from now on, if asked to: `metrics` -> the port, for the ready line.

        Args:
            workers: the folder that worker processes count in; None: what this process counts.
        """
        if self.metrics_port is None:
            return {}
        return {"metrics": metrics.export(self.host, self.metrics_port, self.security, workers=workers)}

"""What the two `facet serve` commands have in common."""

import click

from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.workspace import Workspace

__all__ = ["ADMIN_PORT", "HOST", "METRICS_PORT", "PORT", "VERSIONS", "current_version"]


class VersionList(click.ParamType):
    """`1` or `1,2`: positive integers, in the order in which they are to be loaded."""

    name = "N[,N]"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            versions = tuple(int(part) for part in value.split(","))
        except ValueError:
            versions = ()
        if not versions or min(versions) < 1:
            self.fail(f"expected version numbers such as 1 or 1,2, got {value!r}", param, ctx)
        return versions


VERSIONS = click.option(
    "--versions", type=VersionList(), default=None, help="Versions to load; by default the current one."
)
HOST = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
PORT = click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any free port.")
ADMIN_PORT = click.option(
    "--admin-port", type=click.IntRange(0, 65535), default=0, show_default=True,
    help="Port of the admin service, which `facet rollout` speaks to. 0: any free port.",
)
METRICS_PORT = click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=None,
    help="Port of /metrics for Prometheus. 0: any free port; by default there is none.",
)


def current_version(workspace: Workspace) -> tuple[int, ...]:
    current = workspace.versions.current()
    if current is None:
        raise VersionNotFound(
            "no version to serve", expected="a published version", got="none in this workspace",
            remedy="`facet publish` one, or give --versions or another --workspace.",
        )
    return (current,)

"""What the two `facet serve` commands have in common."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from online.commands.security_options import server_limits, server_security
from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.names import version_number
from pipelines.contracts.workspace import Workspace

__all__ = ["VERSIONS", "current_version", "listens"]

PORT = click.IntRange(0, 65535)
Command = Callable[..., Any]


class VersionList(click.ParamType):
    """`1` or `1,2`: positive integers, in the order in which they are to be loaded."""

    name = "N[,N]"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            return tuple(version_number(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected version numbers such as 1 or 1,2, got {value!r}", param, ctx)


VERSIONS = click.option(
    "--versions", type=VersionList(), default=None, help="Versions to load; by default the current one."
)


def listens(*, slots: int, queue: int, slots_help: str) -> Callable[[Command], Command]:
    """Add all that says where, to whom and to how many a server answers; the command gets `listening`, a `Listening`.

    Args:
        slots, queue: the defaults.
    """

    def add(command: Command) -> Command:
        @click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
        @click.option("--port", type=PORT, default=0, show_default=True, help="0: any free port.")
        @click.option(
            "--admin-port", type=PORT, default=0, show_default=True,
            help="Port of the admin service, which `facet rollout` speaks to. 0: any free port.",
        )
        @click.option(
            "--metrics-port", type=PORT, default=None,
            help="Port of /metrics for Prometheus. 0: any free port; by default there is none.",
        )
        @click.option(
            "--slots", type=click.IntRange(1, 256), default=slots, show_default=True, help=slots_help
        )
        @click.option(
            "--queue", type=click.IntRange(0, 1024), default=queue, show_default=True,
            help="Requests that wait in a process for their turn; any more are refused at once, OVERLOADED.",
        )
        @server_limits
        @server_security
        @wraps(command)
        def listening(
            *arguments: Any, host: str, port: int, admin_port: int, metrics_port: int | None, slots: int, queue: int,
            limits: Any, security: Any, **options: Any,
        ) -> Any:
            from online.rpc.listening import Listening

            told = Listening(
                host=host, port=port, admin_port=admin_port, metrics_port=metrics_port, slots=slots, queue=queue,
                limits=limits, security=security,
            )
            return command(*arguments, listening=told, **options)

        return listening

    return add


def current_version(workspace: Workspace) -> tuple[int, ...]:
    current = workspace.versions.current()
    if current is None:
        raise VersionNotFound(
            "no version to serve", expected="a published version", got="none in this workspace",
            remedy="`facet publish` one, or give --versions or another --workspace.",
        )
    return (current,)

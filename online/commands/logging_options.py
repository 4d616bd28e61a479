"""Options of the two `facet serve` commands that say what they log."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

__all__ = ["logging_options"]


def logging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --log-json and --slow-ms; they take effect before the command runs, which does not see them."""

    @click.option("--log-json", is_flag=True, help="Log JSON, one object a line, with the request's id.")
    @click.option(
        "--slow-ms", type=click.FloatRange(0), default=1000.0, show_default=True,
        help="Log requests that took longer; of these and of refused ones, a few a second at most.",
    )
    @wraps(command)
    def configured(*arguments: Any, log_json: bool, slow_ms: float, **options: Any) -> Any:
        from online.observe import request_log

        role = click.get_current_context().info_name or "server"
        request_log.configure(role=role, as_json=log_json, slow_ms=slow_ms)
        return command(*arguments, **options)

    return configured

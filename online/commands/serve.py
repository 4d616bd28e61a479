"""`facet serve`: the two servers, each a process of its own."""

import logging
import os
import sys
from typing import Any

import click

from online.commands.serve_cpu_tier import cpu_tier
from online.commands.serve_ranker import ranker
from online.heap import bound_heap

__all__ = ["serve"]


@click.group()
def serve() -> None:
    """Answer requests: a CPU tier that holds rows, a ranker that scores.

    \b
    Each prints one JSON line when it is ready, with the ports it took:
      facet serve cpu-tier --port 50051 --admin-port 50052 --versions 1
      facet serve ranker --port 50061 --admin-port 50062 --versions 1 --cpu-tier 127.0.0.1:50051

    Both speak gRPC (online/proto/*.proto) with the standard health service, on loopback unless told otherwise, and stop
    on SIGTERM or Ctrl-C after the requests under way.
    """
    bound_heap()


@serve.result_callback()
def leave(*_: Any, **__: Any) -> None:
    """End the process of a server that was stopped, at once.

    The interpreter's own end would wait for a load that is under way, for minutes, and keep the host's name all along.
    """
    from online.observe import metrics

    metrics.flush()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


serve.add_command(cpu_tier)
serve.add_command(ranker)

"""How gRPC waits for sockets in our own processes."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["POLLER"]

POLLER: Mapping[str, str] = MappingProxyType({
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener,-event_engine_callback_cq",
    "GRPC_POLL_STRATEGY": "poll",
})  # fmt: skip
"""Environment variables that gRPC reads once, when it is first used: the poller that it had in Python until 1.79.

Since then a message passes three more threads of gRPC's own on its way to Python ("event engine"): a call takes some
fifty microseconds more (`tests.benchmarks.lookup_rpc`). Of the older pollers, epoll lets one thread wait for all
sockets of a process, and a message for another one's server changes threads once more; with poll each server waits for
its own, whose number it pays for: a few hundred connections are no matter.

A gRPC without the experiments only logs that it does not know them; one that had the older pollers without poll would
not start. `tests/online/test_poller.py` fails in either case: measure, and drop what is gone.
"""

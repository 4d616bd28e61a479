"""Which thread of a server's process reads its sockets."""

import os

__all__ = ["read_in_waiting_threads"]

VARIABLE = "GRPC_EXPERIMENTS"
WITHOUT_EVENT_ENGINE = "-event_engine_client,-event_engine_listener"


def read_in_waiting_threads() -> None:
    """Have gRPC's sockets read by the thread that waits for them; call it before anything is listened on or sent.

    ```
    gRPC's event engine   a thread of its own reads ──► wakes the thread that waits, which works
    without it            the thread that waits reads, and works
    ```

    A lone small lookup is answered 5 to 10 % sooner. It is an environment variable of gRPC's, as is every choice among
    its ways to poll: one that the operator has set stays, and a gRPC that no longer knows these names goes on without.
    """
    os.environ.setdefault(VARIABLE, WITHOUT_EVENT_ENGINE)

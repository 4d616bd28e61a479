"""The `facet` commands of this room, one a file; heavy imports happen inside them.

What gRPC reads when it is first imported is set here, for these processes only; who runs `facet` may set it otherwise.
"""

import os

# gRPC's own log repeats on stderr what our errors say.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Since gRPC 1.80 a message passes three more threads of gRPC's own on its way to Python ("event engine"), and a call
# takes a quarter longer (`tests.benchmarks.lookup_rpc`). This is the poller that it had before; a gRPC that has it no
# more does not mind.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener,-event_engine_callback_cq")

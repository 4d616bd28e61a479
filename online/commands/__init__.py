"""The `facet` commands of this room, one a file; heavy imports happen inside them.

What gRPC reads when it is first used is set here, for these processes only; who runs `facet` may set it otherwise.
"""

import os

# gRPC's own log repeats on stderr what our errors say.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

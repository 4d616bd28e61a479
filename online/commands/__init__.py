"""The `facet` commands of this room, one a file; heavy imports happen inside them.

What gRPC reads when it is first used is set here, for these processes only; who runs `facet` may set it otherwise.
"""

import os

from online.rpc.poller import POLLER

# gRPC's own log repeats on stderr what our errors say.
for _name, _value in {"GRPC_VERBOSITY": "NONE", **POLLER}.items():
    os.environ.setdefault(_name, _value)

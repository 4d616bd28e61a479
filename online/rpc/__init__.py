"""The transport: servers and channels of gRPC, and what a call passes on either side."""

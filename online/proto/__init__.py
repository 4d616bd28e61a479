"""The wire contracts of serving. `*_pb2.py` and `*_pb2_grpc.py` are generated: `make proto` writes them again."""

"""How a client reaches its server: `base.py` is the contract, `grpc_transport.py` the wire."""

"""The server's gRPC side. Services decode, call, encode; what they call knows nothing of gRPC."""

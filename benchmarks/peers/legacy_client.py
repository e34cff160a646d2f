"""An echo client of Flower's in-process gRPC server: `python legacy_client.py PORT`, in the peers' environment."""

import sys

import flwr  # type: ignore[import-not-found]


class Echo(flwr.client.NumPyClient):  # type: ignore[misc]
    """Adds a small constant to the model."""

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]  # noqa: D102
        return [values + 1e-6 for values in parameters], 1, {}


flwr.client.start_client(
    server_address=f"127.0.0.1:{sys.argv[1]}",
    client=Echo().to_client(),
    insecure=True,
    grpc_max_message_length=2**31 - 1,
)

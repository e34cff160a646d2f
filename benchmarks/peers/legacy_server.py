"""Flower's in-process gRPC server: `python legacy_server.py PORT NUM_CLIENTS ROUNDS NUM_VALUES TIMES_FILE`.

Runs in the peers' environment. Federated averaging over all clients, no evaluation, plain text. Writes the wall clock
at the end of each round to a file, one a line.
"""

import sys
import time
from pathlib import Path

import flwr  # type: ignore[import-not-found]
import numpy as np

port, num_clients, rounds, num_values = (int(word) for word in sys.argv[1:5])


class Timed(flwr.server.strategy.FedAvg):  # type: ignore[misc]
    """Notes when each round's model is there."""

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]  # noqa: D102
        if failures or len(results) != num_clients:
            raise SystemExit(f"round {server_round}: {len(results)} results, failures: {failures}")
        aggregated = super().aggregate_fit(server_round, results, failures)
        with Path(sys.argv[5]).open("a", encoding="ascii") as file:
            file.write(f"{time.time()}\n")
        return aggregated


flwr.server.start_server(
    server_address=f"127.0.0.1:{port}",
    config=flwr.server.ServerConfig(num_rounds=rounds),
    strategy=Timed(
        fraction_evaluate=0.0,
        min_fit_clients=num_clients,
        min_available_clients=num_clients,
        initial_parameters=flwr.common.ndarrays_to_parameters([np.zeros(num_values, dtype=np.float32)]),
    ),
    grpc_max_message_length=2**31 - 1,
)

"""An app of Flower's deployment runtime: clients add a small constant to the model, the server averages.

Writes the wall clock at the end of each round to a file, one a line.
"""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict  # type: ignore[import-not-found]
from flwr.clientapp import ClientApp  # type: ignore[import-not-found]
from flwr.serverapp import ServerApp  # type: ignore[import-not-found]
from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]

client = ClientApp()
server = ServerApp()


class Timed(FedAvg):  # type: ignore[misc]
    """Notes when each round's model is there."""

    times_file: Path

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]  # noqa: D102
        aggregated = super().aggregate_train(server_round, replies)
        with self.times_file.open("a", encoding="ascii") as file:
            file.write(f"{time.time()}\n")
        return aggregated


@client.train()
def train(message, context):  # type: ignore[no-untyped-def]  # noqa: D103
    values = [array + np.float32(1e-6) for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(values), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid, context):  # type: ignore[no-untyped-def]  # noqa: D103
    config = context.run_config
    num_clients = config["num-clients"]
    strategy = Timed(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
    )
    strategy.times_file = Path(config["times-file"])
    initial = ArrayRecord([np.zeros(config["num-values"], dtype=np.float32)])
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=config["rounds"])

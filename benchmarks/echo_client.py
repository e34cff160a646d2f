"""Clients that train nothing: they download a version and send a difference of zero, as large as the model.

`python -m benchmarks.echo_client FOLDER...`: one process, one client for each identity folder. What is measured is
everything but training: the runner, the wire, TLS, signatures and the server.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedclient.identity import ClientIdentity
from fedclient.runner import ClientRunner
from fedclient.trainer import Evaluation, Trained, Work
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.layout import Layout, Vector
from fedcore.messages import Hello

TASK = "echo"


class EchoWorker:
    """See the module's text. The task parameter `num_values` is the model's size."""

    def __init__(self) -> None:
        self._zeros_D = np.zeros(0, dtype=np.float32)

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        """Return a model of zeros."""
        return self.layout(work), self._zeros(work)

    def layout(self, work: Work) -> Layout:
        """Return one tensor."""
        return Layout.of([("model", "values", (_num_values(work),), "float32")])

    def train(
        self,
        work: Work,
        base_D: Vector,
        *,
        progress: Callable[[float], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Trained:
        """Return a difference of zero."""
        return Trained(self._zeros(work), 1, {}, None)

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        """Measure nothing."""
        return Evaluation(0, {})

    def forget(self, job_id: str) -> None:
        """Keep nothing."""

    def _zeros(self, work: Work) -> Vector:
        if self._zeros_D.size != _num_values(work):
            self._zeros_D = np.zeros(_num_values(work), dtype=np.float32)
        return self._zeros_D


def _num_values(work: Work) -> int:
    found = work.job.task.params["num_values"]
    assert isinstance(found, int)
    return found


async def main(folders: list[Path]) -> None:
    """Run the clients until the process is stopped."""
    clock = SystemClock()
    about = Hello("benchmark", "cpu", (TASK,), ("full",), ("raw", "bf16"))
    with ThreadPoolExecutor(1) as executor:
        runners = []
        for folder in folders:
            identity = ClientIdentity.load(folder)
            runners.append(
                ClientRunner(
                    GrpcTransport(identity, clock),
                    EchoWorker(),
                    identity.signing_key,
                    about=about,
                    clock=clock,
                    executor=executor,
                    rng=np.random.default_rng(),
                )
            )
        await asyncio.gather(*(runner.run() for runner in runners))


if __name__ == "__main__":
    asyncio.run(main([Path(folder) for folder in sys.argv[1:]]))

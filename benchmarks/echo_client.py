"""Clients that train nothing: they download a version and send a small constant, as large as the model.

`python -m benchmarks.echo_client FOLDER...`: one process, one client for each identity folder. What is measured is
everything but training: the runner, the wire, TLS, signatures and the server.

Each client has its own constant. With a difference of zero the version would stay the same, and the clients, which keep
what they have downloaded, would not download it again; with one constant for all the server would keep one blob.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedclient.identity import ClientIdentity
from fedclient.residuals import MemoryResiduals
from fedclient.runner import ClientRunner
from fedclient.trainer import Evaluation, Gradient, Trained, Work
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.allocator import keep_memory
from fedcore.clock import Clock, SystemClock
from fedcore.draws import PrivateDraws
from fedcore.layout import Layout, Vector
from fedcore.messages import Hello

TASK = "echo"
ABOUT = Hello("benchmark", "cpu", (TASK,), ("full",), ("raw", "bf16", "int8"))


class EchoWorker:
    """See the module's text. The task parameter `num_values` is the model's size."""

    def __init__(self) -> None:
        self._delta_D = np.zeros(0, dtype=np.float32)

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        """Return a model of zeros."""
        return self.layout(work), np.zeros(_num_values(work), dtype=np.float32)

    def layout(self, work: Work) -> Layout:
        """Return one tensor."""
        return Layout.of([("model", "values", (_num_values(work),), "float32")])

    def train(
        self,
        work: Work,
        base_D: Vector,
        *,
        draws: PrivateDraws | None = None,
        progress: Callable[[float], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Trained:
        """Return this client's constant."""
        if self._delta_D.size != _num_values(work):
            self._delta_D = np.full(_num_values(work), constant_of(work.client), dtype=np.float32)
        return Trained(self._delta_D, 1, {}, None)

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        """Measure nothing."""
        return Evaluation(0, {})

    def forget(self, job_id: str) -> None:
        """Keep nothing."""

    def gradient(self, work: Work, base_D: Vector, samples: int, **options: object) -> Gradient:
        """Refuse."""
        raise AssertionError("no job here starts from gradients")

    def base_digest(self, work: Work) -> str | None:
        """Nothing is frozen."""
        return None

    def basis_digest(self, work: Work) -> str:
        """Return none."""
        return ""

    def set_basis(self, work: Work, basis: Vector) -> None:
        """Refuse."""
        raise AssertionError("no job here has a basis")

    def change_base(self, work: Work, change: memoryview) -> None:
        """Refuse."""
        raise AssertionError("no job here changes its base")

    def restore_base(self, work: Work) -> None:
        """Refuse."""
        raise AssertionError("no job here changes its base")


def constant_of(client: str) -> float:
    """Return what a client sends: small enough that a version stays within `max_abs` for thousands of rounds."""
    return (1 + zlib.crc32(client.encode())) / 2**42


def _num_values(work: Work) -> int:
    found = work.job.task.params["num_values"]
    assert isinstance(found, int)
    return found


async def main(folders: list[Path], connect: Callable[[ClientIdentity, Clock], GrpcTransport] = GrpcTransport) -> None:
    """Run the clients until the process is stopped; `connect` makes a client's transport."""
    clock = SystemClock()
    with ThreadPoolExecutor(1) as executor:
        runners = []
        for folder in folders:
            identity = ClientIdentity.load(folder)
            runners.append(
                ClientRunner(
                    connect(identity, clock),
                    EchoWorker(),
                    identity.signing_key,
                    about=ABOUT,
                    clock=clock,
                    executor=executor,
                    rng=np.random.default_rng(),
                    residuals=MemoryResiduals(),
                )
            )
        await asyncio.gather(*(runner.run() for runner in runners))


if __name__ == "__main__":
    keep_memory()
    asyncio.run(main([Path(folder) for folder in sys.argv[1:]]))

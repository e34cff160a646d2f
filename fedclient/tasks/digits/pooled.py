"""What could be reached at best: `python -m fedclient.tasks.digits.pooled JOB --num-shards 5 [--json]`.

Trains the job's adapter once on all clients' training data in one place, for as many passes as a client makes over its
own data in the whole job, and measures base and result on the union of the held-out data.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedclient.tasks.base import LocalData, Split, Task
from fedclient.tasks.digits.task import Digits
from fedclient.trainer import LocalWorker, Work
from fedcore.errors import FedError
from fedcore.jobfile import Job, load_job
from fedcore.registry import Registry
from fedcore.rng import derive_seed


@dataclass(frozen=True)
class Bounds:
    """Accuracies on the union of the clients' held-out data, without and with training on all data in one place."""

    base_accuracy: float
    pooled_accuracy: float


class PooledDigits(Digits):
    """The digits of all shards at once."""

    def load(self) -> LocalData:
        """Return every shard's training and held-out data, each joined in the order of the shards."""
        shards = [self.load_shard(shard) for shard in range(self.options.num_shards)]
        return LocalData(_join([data.train for data in shards]), _join([data.held_out for data in shards]))


def measure(job: Job, num_shards: int) -> Bounds:
    """Return both accuracies for a digits job dealt out to `num_shards` clients.

    Raises:
        InvalidInput: the job is not a digits job, or one of its parameters is out of bounds.
    """
    tasks: Registry[type[Task]] = Registry(
        "pooled task", "roundtable.pooled-tasks", {"digits": f"{PooledDigits.__module__}:{PooledDigits.__name__}"}
    )
    worker = LocalWorker({"shard": "0", "num_shards": str(num_shards)}, "cpu", 1, tasks)
    passes = job.training.local_epochs * job.job.rounds
    pooled = job.model_copy(update={"training": job.training.model_copy(update={"local_epochs": passes})})
    work = Work("pooled", pooled, 0, "pooled", derive_seed(job.job.seed, "pooled"))
    _, base_D = worker.initialise(work)
    trained = worker.train(work, base_D)
    return Bounds(
        base_accuracy=worker.evaluate(work, base_D).metrics["accuracy"],
        pooled_accuracy=worker.evaluate(work, base_D + trained.delta_D).metrics["accuracy"],
    )


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the base and a pooled adapter for a digits job.")
    parser.add_argument("job", type=Path, help="job file")
    parser.add_argument("--num-shards", type=int, default=5, help="into how many shards the digits are dealt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        bounds = measure(load_job(options.job), options.num_shards)
    except FedError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    text = f"base accuracy {bounds.base_accuracy:.1%}, pooled accuracy {bounds.pooled_accuracy:.1%}"
    sys.stdout.write(json.dumps(asdict(bounds)) + "\n" if options.json else text + "\n")
    return 0


def _join(splits: list[Split]) -> Split:
    return Split(torch.cat([s.inputs for s in splits]), torch.cat([s.targets for s in splits]))


if __name__ == "__main__":
    sys.exit(main())

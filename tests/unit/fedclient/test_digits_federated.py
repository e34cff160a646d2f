"""Federated averaging of the demo job through the client's own code, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedclient.tasks.digits.pooled import measure
from fedclient.trainer import LocalWorker, Work
from fedcore.jobfile import Job, load_job
from fedcore.layout import Vector
from fedcore.rng import derive_seed

JOB_FILE = Path(__file__).parents[3] / "examples" / "digits.toml"
NUM_CLIENTS = 5


def work_for(job: Job, client: int, version: int) -> Work:
    name = f"client-{client}"
    return Work("digits", job, version, name, derive_seed(job.job.seed, "train", name, version))


def accuracy(job: Job, workers: list[LocalWorker], version: Vector) -> float:
    found = [worker.evaluate(work_for(job, i, 0), version) for i, worker in enumerate(workers)]
    total = sum(evaluation.num_examples for evaluation in found)
    return sum(evaluation.num_examples * evaluation.metrics["accuracy"] for evaluation in found) / total


def test_federated_adapter_closes_three_quarters_of_the_gap_to_pooled_training() -> None:
    job = load_job(JOB_FILE)
    workers = [LocalWorker({"shard": str(i), "num_shards": str(NUM_CLIENTS)}, "cpu") for i in range(NUM_CLIENTS)]
    _, global_D = workers[0].initialise(work_for(job, 0, 0))
    base = accuracy(job, workers, global_D)
    for version in range(job.job.rounds):
        trained = [worker.train(work_for(job, i, version), global_D) for i, worker in enumerate(workers)]
        weights = [result.num_examples for result in trained]
        mean_D = np.average([result.delta_D for result in trained], axis=0, weights=weights)
        global_D = global_D + mean_D.astype(np.float32)
    federated = accuracy(job, workers, global_D)
    bounds = measure(job, NUM_CLIENTS)
    assert abs(bounds.base_accuracy - base) < 1e-9
    assert base < 0.4, "the base must do badly on shifted digits, or there is nothing to show"
    assert bounds.pooled_accuracy > 0.8
    gap_closed = (federated - base) / (bounds.pooled_accuracy - base)
    assert gap_closed >= 0.75, f"base {base:.3f}, pooled {bounds.pooled_accuracy:.3f}, federated {federated:.3f}"

"""The bound that a federation is measured against: the same adapter, trained on all clients' data in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedclient.tasks import TASKS
from fedclient.tasks.base import LocalData, Split, Task
from fedclient.trainer import LocalWorker, Work
from fedcore.jobfile import Job
from fedcore.registry import Registry
from fedcore.rng import derive_seed
from fedsim.summary import Bounds


def measure(job: Job, clients: Sequence[Mapping[str, str]], device: str = "cpu", threads: int = 1) -> Bounds:
    """Train a job's adapter centrally, with as many passes as a client makes over its own data in the whole job.

    Args:
        job: the job.
        clients: the data options of every client.
        device: as for `fedclient run`.
        threads: of torch.

    Raises:
        InvalidInput: the task is unknown, or a parameter or option is wrong.
    """
    name = job.task.name
    tasks: Registry[type[Task]] = Registry("pooled task", "roundtable.pooled-tasks", {})
    tasks.add(name, _pooled(TASKS.get(name), job, clients))
    worker = LocalWorker(clients[0], device, threads, tasks)
    passes = job.training.local_epochs * job.job.rounds
    training = job.training.model_copy(update={"local_epochs": passes})
    work = Work(
        "pooled", job.model_copy(update={"training": training}), 0, "pooled", derive_seed(job.job.seed, "pooled")
    )
    _, base_D = worker.initialise(work)
    trained = worker.train(work, base_D)
    return Bounds(
        worker.evaluate(work, base_D).metrics,
        worker.evaluate(work, base_D + trained.delta_D).metrics,
    )


def _pooled(task: type[Task], job: Job, clients: Sequence[Mapping[str, str]]) -> type[Task]:
    def load(self: Task) -> LocalData:
        parts = [task(job.task.params, options, job.job.seed).load() for options in clients]
        return LocalData(Split.join([part.train for part in parts]), Split.join([part.held_out for part in parts]))

    return type(f"Pooled{task.__name__}", (task,), {"load": load})

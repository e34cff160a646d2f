"""The bound that a federation is measured against: the same adapter, trained on all clients' data in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedclient.tasks import TASKS
from fedclient.tasks.base import LocalData, Split, Task
from fedclient.trainer import LocalWorker, Work
from fedcore.adapters import ALTERNATING, gradient_layout
from fedcore.jobfile import AdapterSection, Job
from fedcore.registry import Registry
from fedcore.rng import derive_seed, stream
from fedserver.initial.adapter import GivenValues
from fedserver.initial.folder import OpenAdapter
from fedserver.initial.tensors import TensorFile
from fedserver.rounds.start import gradient_start
from fedsim.summary import Bounds


def measure(
    job: Job,
    clients: Sequence[Mapping[str, str]],
    device: str = "cpu",
    threads: int = 1,
    adapter: OpenAdapter | None = None,
) -> Bounds:
    """Train a job's adapter centrally, with as many passes as a client makes over its own data in the whole job.

    A job that starts from gradients starts from one of as many examples as its cohort's clients take together.

    Args:
        job: the job.
        clients: the data options of every client.
        device: as for `fedclient run`.
        threads: of torch.
        adapter: to start from.

    Raises:
        InvalidInput: the task is unknown, or a parameter or option is wrong.
    """
    name = job.task.name
    tasks: Registry[type[Task]] = Registry("pooled task", "roundtable.pooled-tasks", {})
    tasks.add(name, _pooled(TASKS.get(name), job, clients))
    worker = LocalWorker(clients[0], device, threads, tasks)
    begins = gradient_start(job)
    passes = job.training.local_epochs * max(1, job.job.rounds - (begins is not None))
    training = job.training.model_copy(update={"local_epochs": passes})
    work = Work(
        "pooled",
        job.model_copy(update={"training": training, "adapter": _adapter(job), "privacy": None}),
        0,
        "pooled",
        derive_seed(job.job.seed, "pooled"),
    )
    layout, first_D = worker.initialise(work)
    if adapter is not None:
        GivenValues(TensorFile(adapter.weights), layout).fill(first_D, 0)
        worker.set_basis(work, first_D[layout.moving.num_values :])
    base_D = first_D[: layout.moving.num_values]
    if begins is not None:
        found = worker.gradient(work, base_D, begins.params.samples * job.schedule.cohort)
        frame = begins.uplink.encode(found.values, stream(work.seed, "encode"), gradient_layout(layout).sizes)
        start_D, basis = begins.factors(layout, base_D, lambda: iter([memoryview(frame)]))
        worker.set_basis(work, basis)
    else:
        start_D = base_D
    trained = worker.train(work, start_D)
    return Bounds(
        worker.evaluate(work, base_D).metrics,
        worker.evaluate(work, start_D + trained.delta_D).metrics,
    )


def _adapter(job: Job) -> AdapterSection:
    """Return the adapter of one who trains alone: all ranks, and both factors at once."""
    params = {key: value for key, value in job.adapter.params.items() if key != "ranks"}
    name = "lora" if job.adapter.name in ALTERNATING else job.adapter.name
    return AdapterSection.model_validate({**params, "name": name})


def _pooled(task: type[Task], job: Job, clients: Sequence[Mapping[str, str]]) -> type[Task]:
    def load(self: Task) -> LocalData:
        parts = [task(job.task.params, options, job.job.seed).load() for options in clients]
        return LocalData(Split.join([part.train for part in parts]), Split.join([part.held_out for part in parts]))

    return type(f"Pooled{task.__name__}", (task,), {"load": load})

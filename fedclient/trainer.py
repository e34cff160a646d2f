"""The client's computing: from a version of the global state to this client's update.

No torch at import: the session starts, and refuses what it must refuse, before the second that torch takes.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedclient.adapters import ADAPTERS
from fedclient.basedigest import frozen_digest, weights_of
from fedclient.clipping import clipped, noise_of_a_client, noised
from fedclient.tasks import TASKS
from fedcore.changes import read_change
from fedcore.draws import PrivateDraws
from fedcore.errors import FedError, InvalidInput
from fedcore.jobfile import Job
from fedcore.layout import Layout, Vector
from fedcore.privacy import DpSgd
from fedcore.registry import Registry
from fedcore.rng import derive_seed
from fedcore.sending import Sending

if TYPE_CHECKING:
    import torch

    from fedclient.adapters.base import AdaptedModel
    from fedclient.tasks.base import LocalData, Task

# Torch has one global generator per process, and dropout and default initialisation draw from it. Simulated
# clients share a process, so whoever has seeded it must be alone until it is put back.
_GLOBAL_GENERATOR = threading.Lock()


class Stopped(FedError):
    """Local training was broken off because the client is shutting down or the work was withdrawn."""

    code = "stopped"


@dataclass(frozen=True)
class Work:
    """One assignment, as far as computing is concerned.

    Attributes:
        job_id: names the run; the built model is kept under it between rounds.
        job: the job file.
        version: the version to start from.
        client: this client's name.
        seed: for this job, client and version; already derived by the caller.
    """

    job_id: str
    job: Job
    version: int
    client: str
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a version on this client's held-out data, as means over `num_examples`."""

    num_examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Gradient:
    """The loss's gradients by the adapted weights, matrix after matrix, summed over so many examples."""

    values: Vector
    num_examples: int


@dataclass(frozen=True)
class Trained:
    """What local training gives.

    Attributes:
        delta_D: trained values minus the version they started from, of what is sent (`fedcore.sending`).
        num_examples: how many examples were trained on.
        metrics: of training, such as ``train_loss``.
        evaluation: of the version that training started from; None if the client holds nothing out.
    """

    delta_D: Vector  # noqa: N815 - shape suffix
    num_examples: int
    metrics: dict[str, float]
    evaluation: Evaluation | None


@dataclass(frozen=True)
class _Built:
    task: Task
    data: LocalData
    model: AdaptedModel
    sending: Sending
    basis_digest: str


class LocalWorker:
    """Trains and evaluates for one client.

    Synchronous; every method is called on one worker thread. On the CPU the same work, base and data give the
    same bytes, in any process of the same machine. The built model and the loaded data of a job are kept
    until `forget`.

    Args:
        data: this client's data options, given to the task.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads of torch, for the whole process.
        tasks: where task names are looked up; None is the table of installed tasks.

    Raises:
        ConfigError: no such device.
    """

    def __init__(
        self,
        data: Mapping[str, str],
        device: str = "auto",
        threads: int = 1,
        tasks: Registry[type[Task]] | None = None,
    ) -> None:
        import torch

        from fedclient.device import select_device

        torch.set_num_threads(threads)
        self._device = select_device(device)
        self._options = dict(data)
        self._tasks = TASKS if tasks is None else tasks
        self._built: dict[str, _Built] = {}
        self._base_digests: dict[str, str | None] = {}  # of each job's model as it was last built

    @property
    def device_description(self) -> str:
        """One line: ``cpu (1 thread)``, ``cuda:0 NVIDIA H200``."""
        from fedclient.device import describe_device

        return describe_device(self._device)

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        """Return layout and values of version 0: the same on every client, for they depend on the job alone.

        Raises:
            InvalidInput: task, adapter or one of their parameters is not known here, or the data does not
                fit.
        """
        # Built anew, because the cached model may have been trained on.
        model = self._build_model(work, self._make_task(work))
        # A basis that the job's gradients give is not known yet.
        return model.layout, model.read() if model.starts_from_gradients else model.read_all()

    def layout(self, work: Work) -> Layout:
        """Return the job's layout as this client computes it; raises like `initialise`."""
        return self._get(work).model.layout

    def train(
        self,
        work: Work,
        base_D: Vector,
        *,
        draws: PrivateDraws | None = None,
        progress: Callable[[float], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Trained:
        """Evaluate `base_D` on the held-out data, then train from it on the training data.

        In a private job nothing is measured unless it says so, there are no metrics of training, and the examples of
        ``dp-sgd`` and the batch of ``dp-lora-paper`` are hidden here already.

        Args:
            work: what to do.
            base_D: the version to start from; not changed.
            draws: of a private job: what hides.
            progress: called with the part done, 0 to 1, after each step, on this thread.
            stop: checked after each step.

        Raises:
            Stopped: `stop` was set.
            LayoutError: `base_D` has another length than the layout.
            InvalidInput: as for `initialise`, or data or model are not such that the job's mechanism hides examples.
            ConfigError: that needs what is not installed.
            ValueError: a private job, and no `draws`.
        """
        import torch

        from fedclient import private
        from fedclient.tasks.base import TrainingRun

        privacy = work.job.privacy
        if privacy is not None and draws is None:
            raise ValueError("a private job needs draws")
        tick = _ticking(work, stop, progress)
        built = self._get(work)
        if stop is not None and stop.is_set():
            raise Stopped(f"stopped before version {work.version} of job {work.job_id}")
        measures = privacy is None or privacy.evaluation
        evaluation = self._evaluate(work, built, base_D) if measures else Evaluation(0, {})
        built.model.write(base_D)
        sent = built.sending.layout(built.model.layout, work.client, work.version)
        built.model.train_only(sent)
        # What the model really starts from: a base that the model's own type had to round is not part of the
        # delta.
        start_D = built.model.read(sent)
        generator = torch.Generator().manual_seed(derive_seed(work.seed, "batches"))
        run, seed, metrics = TrainingRun(work.job.training, generator, tick), derive_seed(work.seed, "global"), {}
        if draws is not None and isinstance(privacy, DpSgd):
            # Dropout is drawn in secret too: an example's mask tells how many others come before it.
            seed = int.from_bytes(draws.bytes(7), "little")
        with self._seeded(seed):
            if draws is not None and privacy is not None:
                private.train(built.task, built.model, built.data.train, run, privacy, draws)
            else:
                metrics = built.task.train(built.model, built.data.train, run)
        delta_D = built.model.read(sent) - start_D
        return Trained(delta_D, len(built.data.train), metrics, evaluation if evaluation.num_examples else None)

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        """Measure `base_D` on the held-out data; without any, 0 examples and no metrics. Raises like `train`."""
        return self._evaluate(work, self._get(work), base_D)

    def gradient(
        self,
        work: Work,
        base_D: Vector,
        samples: int,
        *,
        draws: PrivateDraws | None = None,
        stop: threading.Event | None = None,
    ) -> Gradient:
        """Return the sum of the loss's gradients at `base_D` over some training examples, drawn from the work's seed.

        In a private job it is clipped, and noised where clients do that, as `privacy.start` says. With ``dp-sgd`` it is
        over examples drawn from `draws`, as many as `privacy.sampling` says, and counts as one over all.

        Raises:
            Stopped: `stop` was set.
            InvalidInput: as for `initialise`, or the gradient of a job that is not private is not finite.
            ValueError: a private job, and no `draws`.
        """
        import torch

        from fedclient import private
        from fedclient.tasks.base import TrainingRun

        privacy = work.job.privacy
        if privacy is not None and draws is None:
            raise ValueError("a private job needs draws")
        built = self._get(work)
        built.model.write(base_D)
        generator = torch.Generator().manual_seed(derive_seed(work.seed, "batches"))
        run = TrainingRun(work.job.training, generator, _ticking(work, stop, None))
        if draws is not None and isinstance(privacy, DpSgd):
            with self._seeded(derive_seed(work.seed, "global")):
                values = private.start(built.task, built.model, built.data.train, run, privacy, draws)
                return Gradient(values, len(built.data.train))
        with self._seeded(derive_seed(work.seed, "global")), built.model.measuring() as found:
            num_examples = built.task.add_gradients(built.model, built.data.train, run, samples)
            values = found()
        if draws is not None and privacy is not None and privacy.start is not None:
            std = noise_of_a_client(work.job, privacy.start.noise_multiplier, privacy.start.clip)
            values = noised(clipped(values, privacy.start.clip), std, draws)
        elif not np.isfinite(values).all():
            raise InvalidInput(f"the gradient at version {work.version} of job {work.job_id} is not finite")
        return Gradient(values, num_examples)

    def basis_digest(self, work: Work) -> str:
        """Return the SHA-256 (hex) of the basis that is set; "" if there is none. Raises like `initialise`."""
        return self._get(work).basis_digest

    def base_digest(self, work: Work) -> str | None:
        """Return the digest of what is frozen of the base model, as it was built; None: nothing is.

        See `fedclient.basedigest.frozen_digest`. Raises like `initialise`.
        """
        if work.job_id not in self._base_digests:
            self._build_model(work, self._make_task(work))
        return self._base_digests[work.job_id]

    def set_basis(self, work: Work, basis: Vector) -> None:
        """Set what the start of the job has fixed: the last values of the layout; raises like `initialise`."""
        built = self._get(work)
        built.model.write_basis(basis)
        self._built[work.job_id] = replace(built, basis_digest=_digest(basis))

    def change_base(self, work: Work, change: memoryview) -> None:
        """Change the frozen matrices, as `fedcore.changes` says.

        Raises:
            FrameError: `change` is malformed; what came before the damage is done.
            InvalidInput: as for `initialise`, or a layer of the adapter cannot change.
        """
        model = self._get(work).model
        for each in read_change(change, model.layout):
            model.change_base(each)

    def restore_base(self, work: Work) -> None:
        """Make the frozen matrices what they were in the beginning, by building the model anew."""
        built = self._built.pop(work.job_id, None)
        if built is None:
            return  # it is built when it is used
        task, data = built.task, built.data
        del built  # the old model goes before the new one comes: there may not be room for both
        self._built[work.job_id] = self._assemble(work, task, data)

    def describe(self, work: Work) -> str:
        """Return the task's Markdown for the model card; raises like `initialise`."""
        return self._make_task(work).describe()

    def forget(self, job_id: str) -> None:
        """Drop what is kept for a job; nothing happens if there is nothing."""
        self._built.pop(job_id, None)
        self._base_digests.pop(job_id, None)

    def _get(self, work: Work) -> _Built:
        if work.job_id not in self._built:
            task = self._make_task(work)
            self._built[work.job_id] = self._assemble(work, task, self._load(work, task))
        return self._built[work.job_id]

    def _assemble(self, work: Work, task: Task, data: LocalData) -> _Built:
        model, sending = self._build_model(work, task), Sending.of(work.job.adapter)
        basis_digest = _digest(model.read_basis())
        model.narrow(sending.narrowed(model.layout, work.client))
        return _Built(task, data, model, sending, basis_digest)

    def _make_task(self, work: Work) -> Task:
        section = work.job.task
        return self._tasks.get(section.name)(section.params, self._options, work.job.job.seed)

    def _load(self, work: Work, task: Task) -> LocalData:
        from fedclient.tasks.base import LocalData

        with self._seeded(derive_seed(work.job.job.seed, "load")):
            data = task.load()
        return LocalData(data.train.to(self._device), data.held_out.to(self._device))

    def _build_model(self, work: Work, task: Task) -> AdaptedModel:
        seed = derive_seed(work.job.job.seed, "initialise")
        adapter = ADAPTERS.get(work.job.adapter.name)(work.job.adapter.params)
        with self._seeded(derive_seed(seed, "model")):
            # On the CPU first: initial values must not depend on where a client computes.
            base = task.build_model()
            weights = weights_of(base)
            model = adapter.attach(base, derive_seed(seed, "adapter"))
        self._base_digests[work.job_id] = frozen_digest(weights, [*model.parameters, *model.basis.values()])
        model.module.to(self._device)
        return model

    def _evaluate(self, work: Work, built: _Built, base_D: Vector) -> Evaluation:
        held_out = built.data.held_out
        if not len(held_out):
            return Evaluation(0, {})
        built.model.write(base_D)
        with self._seeded(derive_seed(work.seed, "evaluate")):
            return Evaluation(len(held_out), built.task.evaluate(built.model.module, held_out))

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Seed torch's global generators for the block and put them back after it."""
        import torch

        devices: list[torch.device] = [self._device] if self._device.type == "cuda" else []
        with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            yield


def _digest(basis: Vector) -> str:
    return hashlib.sha256(basis.astype("<f4").data).hexdigest() if basis.size else ""


def _ticking(
    work: Work, stop: threading.Event | None, progress: Callable[[float], None] | None
) -> Callable[[float], None]:
    def tick(part: float) -> None:
        if stop is not None and stop.is_set():
            raise Stopped(f"stopped at {part:.0%} of version {work.version} of job {work.job_id}")
        if progress is not None:
            progress(part)

    return tick

"""What a client's worker computes for a private job, and what it does not tell."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedclient import dpsgd
from fedclient.clipping import clipped, noised
from fedclient.tasks.base import Split, TrainingRun
from fedclient.trainer import LocalWorker, Stopped, Work
from fedcore.errors import InvalidInput
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Vector
from fedcore.rng import derive_seed
from tests.support.private import adapted, digits_task, draws_of, flat, kept, run_of

SHARD = {"shard": "0", "num_shards": "5"}
DP_SGD = {"mechanism": "dp-sgd", "delta": 1e-5, "clip": 0.5, "noise_multiplier": 1.0, "sampling": 0.2}
PAPER = {"mechanism": "dp-lora-paper", "delta": 1e-5, "clip": 0.5, "noise_multiplier": 1.0}
FED_AVG = {"mechanism": "dp-fedavg", "delta": 1e-5, "clip": 0.5, "noise_multiplier": 1.0}
RQM = {"mechanism": "rqm", "delta": 1e-5}
START = {"clip": 0.3, "noise_multiplier": 0.5}


def job_of(privacy: dict[str, object] | None, adapter: str = "lora", **training: object) -> Job:
    uplink = [{"codec": "clip"}, {"codec": "rqm"}] if privacy and privacy["mechanism"] == "rqm" else [{"codec": "raw"}]
    tree: dict[str, dict[str, object]] = {
        "job": {"name": "test", "rounds": 2, "seed": 3},
        "task": {"name": "digits"},
        "adapter": {"name": adapter, "rank": 4},
        "training": {"local_epochs": 1, "batch_size": 16, "optimizer": "sgd", **training},
        "compression": {"uplink": uplink},
        "aggregator": {"max_examples": 1},
        "schedule": {"cohort": 2, "quorum": 2},
    }
    return parse_job(tree if privacy is None else {**tree, "privacy": privacy}, "test")


def work_of(job: Job) -> Work:
    return Work("job-1", job, 1, "anna", derive_seed(3, "train", "anna", 1))


def trained(job: Job, secret: int = 1, **options: Any) -> Any:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job)
    return worker.train(work, worker.initialise(work)[1], draws=draws_of(secret), **options)


@pytest.mark.parametrize("section", [DP_SGD, PAPER, FED_AVG, RQM])
def test_nothing_is_told_but_the_update(section: dict[str, object]) -> None:
    found = trained(job_of(section))
    assert found.delta_D.any()
    assert found.metrics == {}
    assert found.evaluation is None
    assert found.num_examples == len(digits_task().load().train)
    told = trained(job_of({**section, "evaluation": True}))
    assert told.evaluation is not None
    assert told.evaluation.num_examples == len(digits_task().load().held_out)
    assert told.metrics == {}


@pytest.mark.parametrize("section", [DP_SGD, PAPER, FED_AVG, RQM])
def test_a_private_job_without_draws_is_a_mistake(section: dict[str, object]) -> None:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of(section))
    base_D = worker.initialise(work)[1]
    with pytest.raises(ValueError, match="a private job needs draws"):
        worker.train(work, base_D)
    with pytest.raises(ValueError, match="a private job needs draws"):
        worker.gradient(work, base_D, 10)


@pytest.mark.parametrize("section", [DP_SGD, PAPER])
def test_the_same_draws_give_the_same_bytes_and_others_do_not(section: dict[str, object]) -> None:
    first = trained(job_of(section))
    assert trained(job_of(section)).delta_D.tobytes() == first.delta_D.tobytes()
    other = trained(job_of(section), secret=2).delta_D
    assert (other != first.delta_D).mean() > 0.99


@pytest.mark.parametrize("section", [FED_AVG, RQM])
def test_where_the_whole_update_is_hidden_training_is_as_ever(section: dict[str, object]) -> None:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of(None))
    plain = worker.train(work, worker.initialise(work)[1])
    assert plain.metrics
    assert plain.evaluation is not None
    assert trained(job_of(section)).delta_D.tobytes() == plain.delta_D.tobytes()


def test_steps_are_as_many_as_are_accounted_for() -> None:
    for epochs, sampling, steps in ((1, 0.2, 5), (3, 0.2, 15), (1, 1.0, 1), (2, 0.03, 67)):
        parts: list[float] = []
        trained(job_of({**DP_SGD, "sampling": sampling}, local_epochs=epochs), progress=parts.append)
        assert parts == pytest.approx([(step + 1) / steps for step in range(steps)])


def test_dp_sgd_can_be_stopped_and_the_model_is_as_it_was() -> None:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of(DP_SGD))
    base_D = worker.initialise(work)[1]
    before = worker.evaluate(work, base_D)
    stop = threading.Event()

    def halfway(part: float) -> None:
        if part > 0.5:
            stop.set()

    with pytest.raises(Stopped, match="stopped at 80%"):
        worker.train(work, base_D, draws=draws_of(), progress=halfway, stop=stop)
    assert worker.evaluate(work, base_D) == before
    again = worker.train(work, base_D, draws=draws_of())
    assert again.delta_D.tobytes() == trained(job_of(DP_SGD)).delta_D.tobytes()


@pytest.mark.parametrize("start", [False, True])
def test_a_delta_that_lets_an_example_be_published_is_refused(start: bool) -> None:
    number = len(digits_task().load().train)
    section = {**DP_SGD, "delta": 0.01, "start": START}
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of(section, "lora-sb"))
    base_D = worker.initialise(work)[1][: worker.layout(work).moving.num_values]
    call = partial(worker.gradient, work, base_D, 10) if start else partial(worker.train, work, base_D)
    with pytest.raises(
        InvalidInput, match=f"^delta 0.01: below 1/n = {1 / number:.2g} is needed for {number} examples$"
    ):
        call(draws=draws_of())


# -- one step, as published ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_the_published_step_clips_the_gradient_of_a_batch_as_one_vector(batch_size: int) -> None:
    task = digits_task()
    data, model = task.load().train, adapted(task, "lora", {"rank": 4, "targets": ["hidden*"]})
    rows = np.argsort(draws_of().random(len(data)), kind="stable")[:batch_size]
    model.module.train()
    loss = torch.nn.functional.cross_entropy(model.module(data.inputs[rows]), data.targets[rows])
    gradient_D = flat(torch.autograd.grad(loss, model.parameters))
    for clip in (float(gradient_D.norm()) / 3, float(gradient_D.norm()) * 3):
        before = flat(model.parameters)
        with kept(model):
            run = run_of(batch_size=batch_size, learning_rate=1.0)
            dpsgd.train_as_published(task, model, data, run, draws_of(), clip=clip, noise_multiplier=0.0)
            step_D = before - flat(model.parameters)
        expected_D = gradient_D * min(1.0, clip / float(gradient_D.norm()))
        torch.testing.assert_close(step_D, expected_D, rtol=1e-3, atol=1e-5)


def test_the_published_step_has_the_noise_that_is_accounted_for() -> None:
    """Chi-square with 1,536 degrees of freedom; a right program fails with probability 1e-9 (two-sided)."""
    task = digits_task()
    data, model = task.load().train, adapted(task, "lora", {"rank": 4, "targets": ["hidden*"]})
    steps = []
    for noise_multiplier in (0.0, 2.0):
        before = flat(model.parameters)
        with kept(model):
            run = run_of(learning_rate=1.0)
            how = {"clip": 0.5, "noise_multiplier": noise_multiplier}
            dpsgd.train_as_published(task, model, data, run, draws_of(), **how)
            steps.append(before - flat(model.parameters))
    noise_D = steps[1] - steps[0]
    low, high = stats.chi2(len(noise_D)).ppf([0.5e-9, 1 - 0.5e-9])
    assert low < float(noise_D @ noise_D) < high


def test_a_published_step_whose_gradient_is_not_finite_is_noise_alone() -> None:
    task = digits_task()
    train = task.load().train
    data = Split(train.inputs * torch.nan, train.targets)
    model = adapted(task, "lora", {"rank": 4, "targets": ["hidden*"]})
    dpsgd.train_as_published(task, model, data, run_of(), draws_of(), clip=0.5, noise_multiplier=1.0)
    assert np.isfinite(model.read()).all()


# -- the start of lora-sb --------------------------------------------------------------------------------------------


def single_gradients(rows: Any) -> list[Vector]:
    """Return single examples' gradients by the adapted weights, from plain backward passes on the base."""
    task = digits_task()
    data = task.load().train
    model: Any = task.build_model()
    weights = [model.hidden1.weight, model.hidden2.weight, model.output.weight]
    found = []
    for row in rows:
        loss = torch.nn.functional.cross_entropy(model(data.inputs[row : row + 1]), data.targets[row : row + 1])
        found.append(flat(torch.autograd.grad(loss, weights)).float().numpy())
    return found


def gradient(section: dict[str, object], samples: int = 40) -> Any:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of({**section, "start": START}, "lora-sb"))
    base_D = worker.initialise(work)[1][: worker.layout(work).moving.num_values]
    found = worker.gradient(work, base_D, samples, draws=draws_of())
    assert worker.gradient(work, base_D, samples, draws=draws_of()).values.tobytes() == found.values.tobytes()
    return found


def test_the_start_of_dp_sgd_clips_each_drawn_example() -> None:
    """The noise by chi-square with 25,856 degrees of freedom; a right program fails with 1e-9 (two-sided)."""
    found = gradient(DP_SGD)
    number = len(digits_task().load().train)
    rows = dpsgd.poisson(draws_of(), number, 0.2).tolist()
    clips = [clipped(each, 0.3) for each in single_gradients(rows)]
    assert any(np.linalg.norm(each) > 0.299 for each in clips)
    noise_D = (found.values.astype(np.float64) - np.sum(clips, axis=0, dtype=np.float64)) / (0.5 * 0.3)
    low, high = stats.chi2(noise_D.size).ppf([0.5e-9, 1 - 0.5e-9])
    assert low < noise_D @ noise_D < high
    assert found.num_examples == number, "how many were drawn is not told"


def test_a_start_without_noise_is_the_clipped_sum() -> None:
    task = digits_task()
    data = task.load().train
    model = adapted(task, "lora-sb", {"rank": 4, "targets": ["hidden*"]})
    run = run_of()
    draws = draws_of()
    how = {"sampling": 0.1, "clip": 0.05, "noise_multiplier": 0.0}
    found = dpsgd.start(task, model, data, run, draws, **how)
    singles = []
    for row in dpsgd.poisson(draws_of(), len(data), 0.1):
        with model.measuring() as measured:
            task.add_gradients(model, Split(data.inputs[row, None], data.targets[row, None]), run, 1)
            singles.append(clipped(measured().copy(), 0.05))
    assert len(singles) > 5
    np.testing.assert_allclose(found, np.sum(singles, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-8)
    broken = Split(data.inputs.clone(), data.targets)
    broken.inputs[dpsgd.poisson(draws_of(), len(data), 0.1)[0]] = torch.nan
    rest = dpsgd.start(task, model, broken, run, draws_of(), **how)
    np.testing.assert_allclose(rest, np.sum(singles[1:], axis=0, dtype=np.float64), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("section", "std"),
    [
        (FED_AVG, 0.0),
        ({**FED_AVG, "noise": "clients"}, 0.15 / math.sqrt(2)),
        ({**FED_AVG, "noise": "local"}, 0.15),
        (PAPER, 0.15),
        (RQM, 0.15),
    ],
)
def test_a_start_that_hides_the_client_clips_the_sum(section: dict[str, object], std: float) -> None:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of(None, "lora-sb"))
    base_D = worker.initialise(work)[1][: worker.layout(work).moving.num_values]
    plain = worker.gradient(work, base_D, 40)
    found = gradient(section)
    assert found.num_examples == plain.num_examples == 40
    assert found.values.tobytes() == noised(clipped(plain.values, 0.3), std, draws_of()).tobytes()


def test_a_start_that_is_not_finite_becomes_noise_and_not_an_error() -> None:
    job = job_of({**FED_AVG, "start": START}, "lora-sb")
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job)
    layout, values = worker.initialise(work)
    worker.set_basis(work, np.full(layout.num_basis_values, 1e30, np.float32))
    base_D = values[: layout.moving.num_values] + np.float32(1e30)
    assert not worker.gradient(work, base_D, 40, draws=draws_of()).values.any()


def test_a_start_can_be_stopped() -> None:
    worker, work = LocalWorker(SHARD, "cpu"), work_of(job_of({**DP_SGD, "start": START}, "lora-sb"))
    base_D = worker.initialise(work)[1][: worker.layout(work).moving.num_values]
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        worker.gradient(work, base_D, 40, draws=draws_of(), stop=stop)
    assert worker.gradient(work, base_D, 40, draws=draws_of()).values.any(), "and the model is as it was"


def test_ticks_of_a_start_rise() -> None:
    task = digits_task()
    model = adapted(task, "lora-sb", {"rank": 4, "targets": ["hidden*"]})
    ticks: list[float] = []
    run: TrainingRun = replace(run_of(), tick=ticks.append)
    dpsgd.start(task, model, task.load().train, run, draws_of(), sampling=0.1, clip=1.0, noise_multiplier=1.0)
    assert ticks == sorted(ticks)
    assert 0 <= ticks[0] < ticks[-1] < 1

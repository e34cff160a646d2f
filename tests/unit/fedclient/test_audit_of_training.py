"""Audits of private training: what a worst-case example, or client, can be told by, against what is claimed for it.

A model's output is its weights times the input, and that is the loss, so that an example's gradient is its input,
wherever training has come to: each step is a release that knows nothing of the others. A sound mechanism fails an audit
here with a chance of 10⁻⁶; the draws are fixed, so that it does not by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from fedclient import dpsgd, private
from fedclient.adapters.base import AdaptedModel
from fedclient.adapters.full import Full
from fedclient.tasks.base import Split, Task, TrainingRun
from fedcore.draws import PrivateDraws
from fedcore.jobfile import Job, TrainingSection
from fedcore.privacy import DpLoraPaper, DpSgd, PrivacySection
from fedprivacy.audit import audit
from tests.support.audits import Plant, claim_of, halve_the_noise, private_job
from tests.support.private import Points

Array = npt.NDArray[np.float64]

DELTA = 0.05
CLIP = 0.5
NUMBER = 64
FAR = 8 * CLIP * torch.eye(NUMBER)
"""Examples whose gradients are eight times as long as the clip, each along an axis of its own, which no other moves:
every step tells as often of one example as there are."""
NOTHING = 0 * FAR
TRIALS = 20_000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch not share out what is too small to be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Linear(Points):
    """The loss is linear in the weights."""

    def build_model(self) -> nn.Module:
        return nn.Linear(NUMBER, 1, bias=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()


@cache
def linear() -> tuple[Task, AdaptedModel]:
    task = Linear({}, {}, 1)
    return task, Full({}).attach(task.build_model(), 1)


def steps_of(section: PrivacySection, steps: int, batch_size: int, inputs: Tensor, draws: PrivateDraws) -> Array:
    """Return what each step of training added up along each axis, noise included: steps × examples."""
    task, model = linear()
    model.write(np.zeros(NUMBER, np.float32))
    places = [model.read().astype(np.float64)]
    share, divisor = (section.sampling, section.sampling * len(inputs)) if isinstance(section, DpSgd) else (1.0, 1.0)
    keys = {"learning_rate": 1.0, "batch_size": batch_size, "local_epochs": max(1, round(steps * share))}
    settings = TrainingSection.model_validate({"optimizer": "sgd", **keys})
    run = TrainingRun(settings, torch.Generator(), lambda _: places.append(model.read().astype(np.float64)))
    private.train(task, model, Split(inputs, torch.zeros(len(inputs))), run, section, draws)
    return -np.diff(places, axis=0) * divisor


def sgd(sampling: float, multiplier: float) -> Job:
    return private_job("dp-sgd", 1e-3, clip=CLIP, noise_multiplier=multiplier, sampling=sampling)


def found(job: Job, batch_size: int = NUMBER, trials: int = TRIALS, *, of: slice = slice(NUMBER)) -> float:
    steps = min(240, -(-trials // of.stop))

    def release(inputs: Tensor, draws: PrivateDraws) -> Array:
        assert isinstance(job.privacy, DpSgd)
        return steps_of(job.privacy, steps, batch_size, inputs, draws)[:, of].ravel()

    return audit(release, FAR, NOTHING, DELTA, trials=trials, secret=b"audit").epsilon


# -- bugs ------------------------------------------------------------------------------------------------------------


def skip_the_clip(patch: pytest.MonkeyPatch) -> None:
    """Of the first example in each part of a batch."""
    right = dpsgd.clip_examples

    def clip_the_others(gradients: list[Tensor], clip: float) -> list[Tensor]:
        pairs = zip(gradients, right(gradients, clip), strict=True)
        return [torch.cat([as_it_is[:1], clipped[1:]]) for as_it_is, clipped in pairs]

    patch.setattr(dpsgd, "clip_examples", clip_the_others)


def skip_the_clients_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dpsgd, "clipped", lambda values, clip: values)


def take_all(patch: pytest.MonkeyPatch) -> None:
    """Every example is in every batch."""
    patch.setattr(dpsgd, "poisson", lambda draws, number, sampling: torch.arange(number))


# -- dp-sgd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "sampling", "multiplier"), [(64, 1.0, 1.0), (64, 0.5, 0.5), (8, 0.3, 0.5)])
def test_steps_tell_as_much_as_claimed(batch_size: int, sampling: float, multiplier: float) -> None:
    job = sgd(sampling, multiplier)
    claimed = claim_of(job, DELTA)
    assert 0.5 * claimed < found(job, batch_size) <= claimed


def test_steps_without_opacus_tell_as_much_as_claimed() -> None:
    job = sgd(0.5, 0.5)
    claimed = claim_of(job, DELTA)
    assert 0.5 * claimed < found(job, 1, 6000) <= claimed


@pytest.mark.parametrize("bug", [halve_the_noise, take_all])
def test_bugs_of_every_example_are_caught(bug: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    job = sgd(0.3, 1.0)
    bug(monkeypatch)
    assert found(job, trials=10_000) > 2 * claim_of(job, DELTA)


def test_an_example_that_is_not_clipped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the first one, so that it comes first in every batch that it is in; only it is looked at."""
    job, first = sgd(0.3, 1.0), slice(1)
    skip_the_clip(monkeypatch)
    assert found(job, trials=700, of=first) > 2 * claim_of(job, DELTA)


# -- dp-lora-paper ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", [None, halve_the_noise, skip_the_clients_clip])
def test_steps_as_published_tell_as_much_as_claimed_and_bugs_are_caught(
    bug: Plant | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is one release of a client, here of a gradient along the first axis alone."""
    job = private_job("dp-lora-paper", 1e-3, clip=CLIP, noise_multiplier=1.0)

    def release(inputs: Tensor, draws: PrivateDraws) -> Array:
        assert isinstance(job.privacy, DpLoraPaper)
        return steps_of(job.privacy, 1, NUMBER, inputs, draws)[:, 0]

    if bug is not None:
        bug(monkeypatch)
    one = 1000 * FAR[:1]  # alone in its batch
    lower = audit(release, one, 0 * one, DELTA, trials=1000 if bug else 3000, secret=b"audit").epsilon
    claimed = claim_of(job, DELTA)
    assert lower > 1.2 * claimed if bug else 0.4 * claimed < lower <= claimed

"""Audits of what hides updates today: the stages `clip` and `gaussian-noise`, and RQM; and of PBM, to compare.

Each mechanism is told apart on its worst inputs: no better than the accountant says, and not much worse, so that the
audit could fail; and with a bug planted in the code, better than claimed. A sound mechanism fails an audit here with a
chance of `FALSE_ALARM`; the draws are fixed, so that it does not by chance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from fedcodec import build_pipeline
from fedcodec.quantisers.rqm import Rqm as Codec
from fedcodec.quantisers.rqm import pmf
from fedcodec.transforms import Clip, GaussianNoise
from fedcore.draws import PrivateDraws
from fedprivacy.audit import FALSE_ALARM, audit
from fedprivacy.events import Adjacency, Gaussian, Pbm, Rqm
from tests.support.audits import Plant, claim, halve_the_noise, pbm_sums, skip_the_clip, sum_pmf, worst_inputs

Array = npt.NDArray[np.float64]
Mechanism = Callable[[Array, PrivateDraws], Array]

DELTA = 0.01
AT_ONCE = 50_000
TRIALS = 200_000
ALONG = np.array([0.6, -0.8, 0.0])
NOTHING = 0 * ALONG
FAR = 10 * ALONG
"""Of an update five times as long as the clip."""

bugs = pytest.mark.parametrize("bug", [halve_the_noise, skip_the_clip])


def found(mechanism: Mechanism, first: Array, second: Array, trials: int = TRIALS, delta: float = DELTA) -> float:
    return audit(mechanism, first, second, delta, trials=trials, false_alarm=FALSE_ALARM, secret=b"audit").epsilon


# -- clip and normal noise -------------------------------------------------------------------------------------------


def stages(multiplier: float) -> Mechanism:
    """Return the two stages, of which the second hides many copies of what the first gives."""

    def release(update_D: Array, draws: PrivateDraws) -> Array:
        clipped_D = Clip(norm=2.0).apply(update_D.astype(np.float32), draws)
        copies = np.tile(clipped_D, AT_ONCE)
        noisy_ND = GaussianNoise(std=2.0 * multiplier).apply(copies, draws).reshape(AT_ONCE, -1)
        along_N: Array = noisy_ND @ ALONG
        return along_N

    return release


CASES = [
    pytest.param(Adjacency.ZERO_OUT, 1.0, NOTHING, id="zero-out"),
    pytest.param(Adjacency.REPLACE, 2.0, -FAR, id="replace-one"),
]


@pytest.mark.parametrize(("adjacency", "multiplier", "second"), CASES)
@pytest.mark.parametrize("delta", [0.01, 0.05])
def test_noise_tells_as_much_as_claimed(adjacency: Adjacency, multiplier: float, second: Array, delta: float) -> None:
    claimed = claim(delta, Gaussian(noise_multiplier=multiplier), adjacency=adjacency)
    assert 0.75 * claimed < found(stages(multiplier), FAR, second, delta=delta) <= claimed


@bugs
@pytest.mark.parametrize(("adjacency", "multiplier", "second"), CASES)
def test_bugs_of_the_noise_are_caught(
    adjacency: Adjacency, multiplier: float, second: Array, bug: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = claim(DELTA, Gaussian(noise_multiplier=multiplier), adjacency=adjacency)
    bug(monkeypatch)
    assert found(stages(multiplier), FAR, second) > 2 * claimed


@pytest.mark.parametrize("bug", [None, halve_the_noise, skip_the_clip])
def test_frames_tell_as_much_as_claimed_and_bugs_are_caught(bug: Plant | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of an update: encoded, decoded, with draws of its own each time."""
    pipeline = build_pipeline([{"codec": "clip", "norm": 2.0}, {"codec": "gaussian-noise", "std": 2.0}])

    def release(update_D: Array, draws: PrivateDraws) -> Array:
        frame = pipeline.encode(update_D.astype(np.float32), draws)
        along: Array = pipeline.decode(frame, update_D.size) @ ALONG
        return along

    claimed = claim(0.05, Gaussian(noise_multiplier=1.0))
    if bug is not None:
        bug(monkeypatch)
    lower = found(release, FAR, NOTHING, trials=6000, delta=0.05)
    assert lower > 2 * claimed if bug else 0.4 * claimed < lower <= claimed


# -- RQM -------------------------------------------------------------------------------------------------------------

EVENTS = [
    Rqm(),
    Rqm(levels=4),
    Rqm(levels=4, clients=3),
    Rqm(levels=8, clients=3),
    Rqm(levels=5, keep=0.3, clip=0.1, extension=0.2, clients=2),
]


def codec_of(event: Rqm) -> Codec:
    return Codec(levels=event.levels, keep=event.keep, clip=event.clip, extension=event.extension)


def summed_levels(stage: Codec, log_ratios_Z: Array, rest: tuple[float, ...]) -> Mechanism:
    """Return what sends the sum of one client's level and those of the rest, as its log likelihood ratio."""

    def release(value: Array, draws: PrivateDraws) -> Array:
        levels = [stage.encode(np.full(AT_ONCE, each, np.float32), 0, draws).codes_n for each in (value, *rest)]
        return log_ratios_Z[np.sum(levels, axis=0, dtype=np.int64)]

    return release


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_levels_tell_as_much_as_claimed_and_halved_noise_is_caught(event: Rqm, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = claim(DELTA, event, adjacency=Adjacency.REPLACE)
    stage = codec_of(event)
    first, second, rest = worst_inputs(stage, event.clients, 0.9 * claimed)
    log_ratios_Z = np.log(sum_pmf(stage, (first, *rest)) / sum_pmf(stage, (second, *rest)))
    release = summed_levels(stage, log_ratios_Z, rest)
    assert 0.75 * claimed < found(release, np.array(first), np.array(second)) <= claimed
    halve_the_noise(monkeypatch)
    assert found(release, np.array(first), np.array(second)) > 1.2 * claimed


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_a_client_that_does_not_clip_is_caught(event: Rqm, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = claim(DELTA, event, adjacency=Adjacency.REPLACE)
    stage = codec_of(event)
    rest = (-stage.clip,) * (event.clients - 1)
    log_ratios_Z = np.log(sum_pmf(stage, (stage.clip, *rest)) / sum_pmf(stage, (-stage.clip, *rest)))
    release = summed_levels(stage, log_ratios_Z, rest)
    far = np.array(1.9 * stage.clip)
    assert 0.75 * claimed < found(release, far, -far) <= claimed
    skip_the_clip(monkeypatch)
    assert found(release, far, -far) > 1.2 * claimed


@pytest.mark.parametrize("event", [Rqm(levels=4, dimension=8, l2_clip=0.5), Rqm(dimension=8, l2_clip=0.25)], ids=str)
def test_vectors_of_levels_tell_no_more_than_claimed_by_their_norm(event: Rqm, monkeypatch: pytest.MonkeyPatch) -> None:
    """That bound is loose: halved noise stays below it, and is not caught by this; no clip at all is."""
    claimed = claim(DELTA, event, adjacency=Adjacency.REPLACE)
    stage, norm = codec_of(event), event.l2_clip or 0.0
    along_D = np.full(event.dimension, event.dimension**-0.5)
    chances = [pmf(value, stage.levels, stage.keep, 1.0, 1.0) for value in (norm * along_D[0], -norm * along_D[0])]
    log_ratios_M = np.log(chances[0] / chances[1])

    def release(update_D: Array, draws: PrivateDraws) -> Array:
        clipped_D = Clip(norm=norm).apply(update_D.astype(np.float32), draws)
        codes_n = stage.encode(np.tile(clipped_D, AT_ONCE // 4), 0, draws).codes_n
        statistics: Array = log_ratios_M[codes_n].reshape(-1, event.dimension).sum(axis=1)
        return statistics

    assert 0.4 * claimed < found(release, 5 * along_D, -5 * along_D) <= claimed
    skip_the_clip(monkeypatch)
    assert found(release, 5 * along_D, -5 * along_D) > 1.2 * claimed


# -- PBM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [Pbm(trials=1), Pbm(trials=4), Pbm(trials=4, clients=5)], ids=str)
def test_coins_tell_as_much_as_claimed_and_bugs_are_caught(event: Pbm) -> None:
    claimed = claim(DELTA, event, adjacency=Adjacency.REPLACE)
    rest = (1.0,) * (event.clients - 1)

    def coins(trials: int) -> Mechanism:
        return lambda value, draws: pbm_sums((float(value), *rest), trials, AT_ONCE, draws).astype(np.float64)

    one, far = np.array(1.0), np.array(1.9)
    assert 0.6 * claimed < found(coins(event.trials), one, -one) <= claimed
    # Four times the coins are half the noise of what is decoded.
    assert found(coins(4 * event.trials), one, -one) > 1.2 * claimed
    assert found(coins(event.trials), far, -far) > 1.2 * claimed

"""What mechanisms draw, from the draws that clients hide by, against their distributions.

Each test fails a correct mechanism with a chance of `FALSE_ALARM` for all that it compares, and its draws are fixed, so
that it does not by chance. Each is shown to fail for a mechanism that is wrong. Of RQM with numpy's draws, and of the
draws themselves, there are tests beside the codec and `fedcore.draws`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom, chi2, norm

from fedcodec import build_pipeline
from fedcodec.quantisers.rqm import Rqm
from fedcodec.transforms import Clip, GaussianNoise
from fedcore.draws import PrivateDraws
from fedprivacy import levels
from fedprivacy import pbm as accounted
from fedprivacy.events import Pbm
from fedprivacy.events import Rqm as Event
from tests.support.audits import halve_the_noise, pbm_sums

Array = npt.NDArray[np.float64]

FALSE_ALARM = 1e-6
DRAWS = 200_000
CLIP, MULTIPLIER = 0.5, 1.5
STD = CLIP * MULTIPLIER


def is_drawn_from(counts_K: npt.NDArray[np.int64], chances_K: Array) -> bool:
    """Whether counts pass Pearson's test; classes that are expected less than 10 times are one."""
    expected_K = counts_K.sum() * chances_K
    is_rare_K = expected_K < 10
    found = np.append(counts_K[~is_rare_K], counts_K[is_rare_K].sum())
    expected = np.append(expected_K[~is_rare_K], expected_K[is_rare_K].sum())
    found, expected = found[expected > 0], expected[expected > 0]
    return bool(((found - expected) ** 2 / expected).sum() <= chi2.isf(FALSE_ALARM, expected.size - 1))


def is_near(values_N: npt.NDArray[np.floating], mean: float, std: float) -> bool:
    """Whether their mean is that of a distribution; normal to a good approximation."""
    return bool(abs(values_N.mean() - mean) <= norm.isf(FALSE_ALARM / 2) * std / values_N.size**0.5)


# -- normal noise ----------------------------------------------------------------------------------------------------


def noise_of_frames(secret: bytes, size: int = DRAWS) -> Array:
    """Return what an update that was clipped and hidden has more than one that was clipped."""
    update_D = np.zeros(size, np.float32)
    update_D[:4] = (3, -4, 12, 84)
    pipeline = build_pipeline([{"codec": "clip", "norm": CLIP}, {"codec": "gaussian-noise", "std": STD}])
    draws = PrivateDraws(secret)
    decoded_D = pipeline.decode(pipeline.encode(update_D, draws), size)
    clipped_D = Clip(norm=CLIP).apply(update_D, draws)
    assert np.linalg.norm(clipped_D.astype(np.float64)) == pytest.approx(CLIP, rel=1e-6)
    return decoded_D.astype(np.float64) - clipped_D


def is_normal(noise_N: Array) -> bool:
    """Pearson's test over 100 classes that are equally likely: of scale and shape at once."""
    edges = norm.ppf(np.linspace(0, 1, 101), scale=STD)
    return is_drawn_from(np.histogram(noise_N, edges)[0], np.full(100, 0.01))


def has_std(noise_N: Array) -> bool:
    """Whether the sum of squares lies within the chi-square distribution's interval: ±0.8 % here."""
    share = float((noise_N**2).sum()) / STD**2
    return bool(chi2.ppf(FALSE_ALARM / 2, noise_N.size) <= share <= chi2.isf(FALSE_ALARM / 2, noise_N.size))


def test_noise_of_frames_is_normal_with_clip_times_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = noise_of_frames(b"a")
    assert is_normal(noise)
    assert has_std(noise)
    assert is_near(noise, 0, STD)
    assert not has_std(1.01 * noise)
    assert not is_normal(1.02 * noise)
    assert not is_near(noise + 0.02 * STD, 0, STD)
    halve_the_noise(monkeypatch)
    assert not has_std(noise_of_frames(b"a"))
    assert not is_normal(noise_of_frames(b"a"))


def correlations(noise_NK: Array) -> Array:
    """Return those of each pair of columns."""
    found: Array = np.asarray(np.corrcoef(noise_NK.T))[np.triu_indices(noise_NK.shape[1], 1)]
    return found


def are_independent(noise_NK: Array) -> bool:
    """Whether no pair of columns, nor of their squares, is correlated, to about 5 / √N."""
    found = np.concatenate([correlations(noise_NK), correlations(noise_NK**2)])
    return bool(np.abs(found).max() <= norm.isf(FALSE_ALARM / 2 / found.size) / len(noise_NK) ** 0.5)


def test_noise_of_coordinates_clients_and_rounds_is_independent() -> None:
    coordinates_ND = GaussianNoise(std=STD).apply(np.zeros(DRAWS, np.float32), PrivateDraws(b"a")).reshape(-1, 8)
    assert are_independent(coordinates_ND.astype(np.float64))
    secrets = [(client, turn) for client in (b"client 1", b"client 2", b"client 3") for turn in (b"1", b"2")]
    hidden = [GaussianNoise(std=STD).apply(np.zeros(DRAWS, np.float32), PrivateDraws(*each)) for each in secrets]
    apart_NK = np.stack(hidden, axis=1).astype(np.float64)
    assert are_independent(apart_NK)
    # The sum of the clients' noise has the variance of all: none cancels another's.
    assert has_std(apart_NK.sum(axis=1) / len(secrets) ** 0.5)
    apart_NK[:, 5] = 0.98 * apart_NK[:, 5] + 0.2 * apart_NK[:, 0]
    assert not are_independent(apart_NK)
    shared = np.random.default_rng(0).normal(size=(DRAWS, 2))
    shared[:, 1] *= np.where(np.abs(shared[:, 0]) > 1, 1.1, 0.95)  # not correlated, yet not independent
    assert not are_independent(shared)


# -- levels ----------------------------------------------------------------------------------------------------------

STAGES = [Rqm(), Rqm(levels=4, keep=0.3), Rqm(levels=7, keep=0.6, clip=0.02, extension=0.01)]


def summed(stage: Rqm, shares: tuple[float, ...], secret: bytes = b"levels") -> npt.NDArray[np.int64]:
    """Return sums of the levels of clients with these values, in clips; each has a secret of its own."""
    total = np.zeros(DRAWS, dtype=np.int64)
    for number, share in enumerate(shares):
        values = np.full(DRAWS, np.float32(share * stage.clip))
        total += stage.encode(values, 0, PrivateDraws(secret, bytes([number]))).codes_n
    return total


def chances_of_sums(stage: Rqm, shares: tuple[float, ...]) -> Array:
    event = Event(levels=stage.levels, keep=stage.keep, clip=stage.clip, extension=stage.extension)
    total = np.ones(1)
    for share in shares:
        total = np.convolve(total, levels.pmf(float(np.float32(share * stage.clip)) / stage.clip, event))
    return total


@pytest.mark.parametrize("shares", [(0.37,), (-1.0,), (1.0, 1.0), (1.0, -0.6, 0.2, 0.0, -1.0)], ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_sums_of_levels_are_drawn_as_accounted_for_and_have_the_sum_as_mean(
    stage: Rqm, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    chances_Z = chances_of_sums(stage, shares)

    def counts() -> npt.NDArray[np.int64]:
        return np.bincount(summed(stage, shares), minlength=chances_Z.size)

    assert is_drawn_from(counts(), chances_Z)
    reach, top = stage.clip + stage.extension, stage.levels - 1
    decoded_Z = -len(shares) * reach + 2 * reach / top * np.arange(chances_Z.size)
    mean = stage.clip * sum(shares)
    std = float(chances_Z @ (decoded_Z - mean) ** 2) ** 0.5
    decoded_N = decoded_Z[summed(stage, shares)]
    assert is_near(decoded_N, mean, std)
    assert not is_near(decoded_N + 0.02 * std, mean, std)
    halve_the_noise(monkeypatch)
    assert not is_drawn_from(counts(), chances_Z)


def test_levels_of_clients_and_coordinates_are_independent() -> None:
    """Were the kept levels shared, levels would agree, or lie as far out, more often than by chance."""
    stage = Rqm()
    alone = [summed(stage, (0.0,), bytes([client])) for client in range(4)]
    apart_NK = np.stack([*alone, np.roll(alone[0], 1)], axis=1).astype(np.float64) - 7.5
    assert are_independent(apart_NK)
    apart_NK[:, 1] *= np.sign(apart_NK[:, 0] * apart_NK[:, 1])
    assert not are_independent(apart_NK)


# -- coins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [1, 4, 15])
@pytest.mark.parametrize("share", [-1.0, 0.0, 0.4])
def test_coins_are_binomial_and_unbiased(trials: int, share: float) -> None:
    event = Pbm(trials=trials, clients=3)
    heads = pbm_sums((share,) * 3, trials, DRAWS, PrivateDraws(b"coins"))
    chances = binom.pmf(np.arange(3 * trials + 1), 3 * trials, 0.5 + event.theta * share)
    assert is_drawn_from(np.bincount(heads, minlength=chances.size), chances)
    decoded = (heads - 1.5 * trials) / (trials * event.theta)
    spread = (3 * accounted.variance(event)) ** 0.5  # at 0, where it is largest
    assert is_near(decoded, 3 * share, spread)
    other = binom.pmf(np.arange(3 * trials + 1), 3 * trials, 0.505 + event.theta * share)
    assert not is_drawn_from(np.bincount(heads, minlength=chances.size), other)
    assert not is_near(decoded + 0.05 * spread, 3 * share, spread)

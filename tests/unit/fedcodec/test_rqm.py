"""The mechanism against its definition, a sum over all sets of kept levels, and reference values.

Reference values are of clip 1, extension 1, 16 levels and keep 0.42, computed apart from this code in binary64.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from fedcodec import build_pipeline
from fedcodec.quantisers.rqm import Rqm, pmf
from fedcore.errors import FrameError, InvalidInput

HALF_AT_0 = "0.00389038 0.00312590 0.00605899 0.01194820 0.02412950 0.05049784 0.11233991 0.28800928"
AT_037 = (
    "0.00155411 0.00123156 0.00234571 0.00452068 0.00884542 0.01766433 0.03632528 0.07829005"
    " 0.18556951 0.39031049 0.14628733 0.06460506 0.03055548 0.01502818 0.00758424 0.00928258"
)
AT_1 = (
    "0.00033875 0.00026473 0.00049575 0.00093548 0.00178155 0.00343162 0.00670607 0.01335643"
    " 0.02731223 0.05810164 0.13229173 0.35304423 0.22211425 0.09057341 0.04150198 0.04775013"
)
REFERENCE = {
    0.0: [float(word) for word in (*HALF_AT_0.split(), *reversed(HALF_AT_0.split()))],
    0.37: [float(word) for word in AT_037.split()],
    1.0: [float(word) for word in AT_1.split()],
}
VARIANCE = {0.0: 0.24349913, 0.37: 0.23061965, 1.0: 0.21543923, -1.0: 0.21543923}

# What a correct sampler fails with: the chance of a false alarm of each Monte Carlo test, over all its comparisons.
FALSE_ALARM = 1e-6
DRAWS = 200_000


def reference_pmf(x: float) -> npt.NDArray[np.float64]:
    return pmf(x, 16, 0.42, 1.0, 1.0)


def levels_of(levels: int, reach: float) -> npt.NDArray[np.float64]:
    return np.array([-reach + 2 * level * reach / (levels - 1) for level in range(levels)])


def brute_force(x: float, levels: int, keep: float, clip: float, extension: float) -> npt.NDArray[np.float64]:
    """Return the distribution from the definition: over every set of kept inner levels."""
    x = min(max(x, -clip), clip)
    values = levels_of(levels, clip + extension)
    found = np.zeros(levels)
    for mask in itertools.product((False, True), repeat=levels - 2):
        probability = math.prod(keep if is_kept else 1 - keep for is_kept in mask)
        kept = [0, *(level for level, is_kept in enumerate(mask, 1) if is_kept), levels - 1]
        upper = next(level for level in kept[1:] if x <= values[level])
        lower = kept[kept.index(upper) - 1]
        up = (x - values[lower]) / (values[upper] - values[lower])
        found[upper] += probability * up
        found[lower] += probability * (1 - up)
    return found


def draws_of(x: float, stage: Rqm, seed: int = 0, count: int = DRAWS) -> npt.NDArray[np.int64]:
    codes = stage.encode(np.full(count, x, np.float32), 0, np.random.default_rng(seed)).codes_n
    return codes.astype(np.int64)


def renyi(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], order: float) -> float:
    if math.isinf(order):
        return float(np.max(np.log(p / q)))
    return float(np.log(np.sum(p**order * q ** (1 - order))) / (order - 1))


@pytest.mark.parametrize("x", REFERENCE)
def test_closed_form_gives_the_reference_values(x: float) -> None:
    np.testing.assert_allclose(reference_pmf(x), REFERENCE[x], rtol=0, atol=6e-9)


@pytest.mark.parametrize("x", VARIANCE)
def test_variance_is_the_reference_value(x: float) -> None:
    values = levels_of(16, 2.0)
    mean = reference_pmf(x) @ values
    assert reference_pmf(x) @ (values - mean) ** 2 == pytest.approx(VARIANCE[x], abs=6e-9)


@pytest.mark.parametrize(
    ("extension", "levels", "keep", "expected"),
    [
        (1.0, 16, 0.42, {1.5: 4.927214, 2: 5.063546, 8: 5.344229, 32: 5.434787, math.inf: 5.469889}),
        (1.0, 16, 0.30, {2: 3.516680, math.inf: 3.982551}),
        (0.5, 16, 0.42, {4: 6.933299, math.inf: 7.239762}),
        (2.0, 16, 0.42, {16: 3.919224, math.inf: 3.976847}),
        (1.0, 8, 0.42, {2: 2.600951, math.inf: 2.999847}),
        (1.0, 2, 0.42, {2: 0.847298, math.inf: math.log(3)}),
        (0.8, 5, 0.4, {8: 2.161039, math.inf: 2.238047}),
    ],
)
def test_worst_divergence_of_one_device_is_the_reference_value(
    extension: float, levels: int, keep: float, expected: dict[float, float]
) -> None:
    values = levels_of(levels, 1 + extension)
    corners = [-1.0, 1.0, *(value for value in values if -1 < value < 1)]
    found = [pmf(x, levels, keep, 1.0, extension) for x in corners]
    for order, divergence in expected.items():
        worst = max(renyi(p, q, order) for p, q in itertools.permutations(found, 2))
        assert worst == pytest.approx(divergence, abs=1e-6)


@given(
    x=st.floats(-1.5, 1.5),
    levels=st.integers(2, 9),
    keep=st.floats(0.01, 0.99),
    clip=st.sampled_from([1.0, 0.25, 3.0]),
    extension=st.floats(0.01, 5),
)
def test_closed_form_is_the_sum_over_all_kept_sets(
    x: float, levels: int, keep: float, clip: float, extension: float
) -> None:
    found = pmf(x, levels, keep, clip, extension)
    np.testing.assert_allclose(found, brute_force(x, levels, keep, clip, extension), rtol=0, atol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found > 0).all()
    clipped = min(max(x, -clip), clip)
    assert found @ levels_of(levels, clip + extension) == pytest.approx(clipped, abs=1e-11)
    np.testing.assert_allclose(pmf(-x, levels, keep, clip, extension), found[::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", range(9))
def test_closed_form_at_a_level_is_the_sum_over_all_kept_sets(level: int) -> None:
    x = levels_of(9, 2.0)[level]
    np.testing.assert_allclose(pmf(x, 9, 0.42, 1.0, 1.0), brute_force(x, 9, 0.42, 1.0, 1.0), rtol=0, atol=1e-12)


CASES = [
    (0.37, Rqm()),
    (1.0, Rqm()),
    (-0.73, Rqm()),
    (0.0, Rqm(levels=2)),
    (0.2, Rqm(levels=3, keep=0.9)),
    (-0.01, Rqm(levels=9, keep=0.05, clip=0.02, extension=0.01)),
    (0.5, Rqm(levels=300, keep=0.02)),
    (9.0, Rqm(levels=5, keep=0.4, clip=2.0, extension=1.6)),
]


@pytest.mark.parametrize(("x", "stage"), CASES, ids=str)
def test_levels_are_drawn_as_often_as_the_closed_form_says(x: float, stage: Rqm) -> None:
    """Each count against Bernstein's bound for a binomial, the chance of a false alarm shared by all levels."""
    expected = DRAWS * pmf(float(np.float32(x)), stage.levels, stage.keep, stage.clip, stage.extension)
    found = np.bincount(draws_of(x, stage), minlength=stage.levels)
    log = math.log(2 * stage.levels / FALSE_ALARM)
    allowed = np.sqrt(2 * expected * log) + log  # ≥ Bernstein: t = √(2 v log) + 2/3 log
    assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize(("x", "stage"), CASES, ids=str)
def test_decoded_mean_is_the_value(x: float, stage: Rqm) -> None:
    decoded = stage.decode(draws_of(x, stage, seed=1).astype(np.uint16), None, 0).values_n.astype(float)
    clipped = min(x, stage.clip)
    # Normal to a good approximation: 5.1 standard errors are passed once in three million.
    assert abs(decoded.mean() - clipped) <= 5.1 * decoded.std() / math.sqrt(DRAWS) + 1e-6 * stage.clip


def test_coins_of_different_values_are_different() -> None:
    # Were the kept levels shared, two neighbours would lie at the same levels far more often than by chance.
    codes = draws_of(0.0, Rqm())
    together = np.mean(codes[::2] == codes[1::2])
    expected = float(np.sum(reference_pmf(0.0) ** 2))
    pairs = DRAWS // 2
    assert abs(together - expected) <= math.sqrt(math.log(2 / FALSE_ALARM) / (2 * pairs))  # Hoeffding


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 257, 1 << 16])
def test_codes_are_levels_and_decode_to_them(levels: int) -> None:
    stage = Rqm(levels=levels, keep=0.001)
    codes = stage.encode(np.linspace(-2, 2, 5000, dtype=np.float32), 0, np.random.default_rng(0)).codes_n
    assert codes.dtype == (np.uint8 if levels <= 256 else np.uint16)
    assert codes.max() < levels
    every = np.arange(levels).astype(codes.dtype)
    np.testing.assert_allclose(stage.decode(every, None, 0).values_n, levels_of(levels, 2.0), rtol=0, atol=2e-7)


def test_levels_are_computed_once_and_nobody_can_change_them() -> None:
    codes = np.zeros(1, dtype=np.uint16)
    books = [
        Rqm(levels=300, clip=clip, keep=keep).decode(codes, None, 0).book for clip in (1, 3) for keep in (0.1, 0.2)
    ]
    assert books[0] is books[1] is not books[2] is books[3]
    for book, reach in zip(books[1:3], (2.0, 4.0), strict=True):
        assert book is not None
        np.testing.assert_allclose(book, levels_of(300, reach), rtol=0, atol=4e-7)
        with pytest.raises(ValueError, match="read-only"):
            book[0] = 0


def test_sum_of_codes_decodes_to_the_sum_of_values() -> None:
    stage = Rqm(levels=7, clip=0.5, extension=0.25)
    codes = [
        stage.encode(np.linspace(-1, 1, 50, dtype=np.float32), 0, np.random.default_rng(seed)).codes_n
        for seed in range(9)
    ]
    summed = np.sum([code.astype(np.int64) for code in codes], axis=0)
    decoded = np.sum([stage.decode(code, None, 0).values_n.astype(float) for code in codes], axis=0)
    np.testing.assert_allclose(9 * -0.75 + 2 * 0.75 * summed / 6, decoded, atol=1e-5)


@pytest.mark.parametrize("keep", [1e-300, 1e-9, 1 - 2**-53])
def test_extreme_probabilities_give_levels_in_range(keep: float) -> None:
    stage = Rqm(keep=keep)
    codes = draws_of(0.1, stage, count=5000)
    # Kept almost never: the outer levels alone. Almost always: the two around the value.
    assert set(codes.tolist()) == ({0, 15} if keep < 0.5 else {7, 8})


def test_whatever_a_value_is_a_level_is_sent() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0], dtype=np.float32)
    stage = Rqm(levels=3, keep=0.5)
    found = np.stack([stage.encode(odd, 0, np.random.default_rng(seed)).codes_n for seed in range(20_000)])
    means = stage.decode(found.ravel(), None, 0).values_n.reshape(found.shape).mean(axis=0)
    # Values lie within ±2: by Hoeffding 0.08 is passed once in 10^13.
    np.testing.assert_allclose(means, [0, 1, -1, 1, -1, 0, 0], atol=0.08)


def test_nothing_is_sent_as_it_is() -> None:
    stages: list[dict[str, JsonValue]] = [{"codec": "per-tensor"}, {"codec": "rqm", "levels": 1 << 16}]
    pipeline = build_pipeline(stages)
    frame = pipeline.encode(np.ones(1, np.float32), np.random.default_rng(0), (1,))
    assert frame[-3] == 0
    with pytest.raises(FrameError, match="which rqm does not allow"):
        pipeline.decode(frame[:-3] + b"\1" + np.float32(1).tobytes()[:2], (1,))


@pytest.mark.parametrize(
    "params",
    [
        {"levels": 1},
        {"levels": (1 << 16) + 1},
        {"keep": 0.0},
        {"keep": 1.0},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": 1e38},
        {"extension": 0.0},
        {"extension": 1e-7},
        {"extension": 1e-3, "clip": 1e4},
    ],
)
def test_parameters_have_bounds(params: dict[str, JsonValue]) -> None:
    with pytest.raises(InvalidInput):
        Rqm.configure(params)

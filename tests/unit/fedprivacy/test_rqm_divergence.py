"""RQM's worst case against its definition, against brute force, and against reference values computed apart."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedcodec.quantisers.rqm import Rqm as Codec
from fedcodec.quantisers.rqm import pmf as codec_pmf
from fedprivacy import others
from fedprivacy.divergence import CURVE_ORDERS, upper_curve, worst_divergence
from fedprivacy.events import Rqm
from fedprivacy.levels import level_values, max_log_ratio, pmf, variance, vertex_pmfs, vertices
from fedprivacy.rqm import max_searched, places, worst_case

Array = npt.NDArray[np.float64]
ORDERS = (1.5, 2, 4, 8, 16, 32, math.inf)
LOCAL = {
    (1.0, 16, 0.42): (4.927214, 5.063546, 5.232880, 5.344229, 5.405081, 5.434787, 5.469889),
    (1.0, 16, 0.30): (3.372832, 3.516680, 3.701421, 3.823432, 3.902853, 3.943717, 3.982551),
    (1.0, 16, 0.57): (7.355522, 7.476341, 7.624033, 7.717541, 7.797102, 7.843701, 7.888231),
    (0.5, 16, 0.42): (6.599131, 6.734043, 6.933299, 7.070990, 7.157032, 7.199617, 7.239762),
    (2.0, 16, 0.42): (3.375514, 3.534863, 3.750018, 3.859437, 3.919224, 3.948863, 3.976847),
    (1.0, 8, 0.42): (2.466329, 2.600951, 2.758231, 2.837378, 2.903988, 2.951320, 2.999847),
    (1.0, 4, 0.42): (1.307299, 1.438382, 1.612760, 1.706901, 1.756582, 1.779772, 1.801521),
    (1.0, 2, 0.70): (0.733969, 0.847298, 1.002871, 1.057515, 1.079433, 1.089332, math.log(3)),
    (0.8, 5, 0.40): (1.854988, 1.980265, 2.113586, 2.161039, 2.187242, 2.208626, 2.238047),
}
# Up to 5 clients every arrangement; from 10 on others alike, for which there may be worse.
SUMS = {
    1: (4.927214, 5.063546, 5.232880, 5.344229, 5.405081, 5.434787),
    2: (4.087304, 4.319297, 4.661633, 4.869542, 5.004566, 5.082088),
    3: (3.443522, 3.798832, 4.367736, 4.685470, 4.861777, 4.962575),
    4: (2.937156, 3.362289, 4.096715, 4.523678, 4.766035, 4.901288),
    5: (2.542574, 2.995243, 3.851676, 4.374942, 4.676449, 4.847142),
    10: (1.461351, 1.856745, 2.904017, 3.752308, 4.297257, 4.620924),
    20: (0.753558, 1.001481, 1.832140, 2.859773, 3.701267, 4.255864),
    40: (0.373961, 0.502705, 1.001284, 1.823741, 2.838126, 3.675274),
}
ALL_ABOVE_40 = (0.360520, 0.485892, 0.982534, 1.823741, 2.838126, 3.675274)

EVENTS = st.builds(
    Rqm,
    levels=st.integers(2, 9),
    keep=st.floats(0.02, 0.98),
    extension=st.floats(0.05, 4),
)
SMALL = st.builds(Rqm, levels=st.integers(2, 5), keep=st.floats(0.1, 0.9), extension=st.floats(0.2, 3))
VALUES = st.floats(-1, 1)


def brute_force(x: float, event: Rqm) -> Array:
    """Return the distribution from the definition: over every set of kept inner levels."""
    values, levels = level_values(event), event.levels
    found = np.zeros(levels)
    for mask in itertools.product((False, True), repeat=levels - 2):
        chance = math.prod(event.keep if is_kept else 1 - event.keep for is_kept in mask)
        kept = [0, *(level for level, is_kept in enumerate(mask, 1) if is_kept), levels - 1]
        upper = next(level for level in kept[1:] if x <= values[level])
        lower = kept[kept.index(upper) - 1]
        up = (x - values[lower]) / (values[upper] - values[lower])
        found[upper] += chance * up
        found[lower] += chance * (1 - up)
    return found


def renyi(p: Array, q: Array, order: float) -> float:
    if math.isinf(order):
        return float(np.max(np.log(p / q)))
    exponents = order * np.log(p) + (1 - order) * np.log(q)
    top = exponents.max()
    return float((np.log(np.exp(exponents - top).sum()) + top) / (order - 1))


def summed(xs: tuple[float, ...], event: Rqm) -> Array:
    total = np.ones(1)
    for x in xs:
        total = np.convolve(total, pmf(x, event))
    return total


# -- one client ------------------------------------------------------------------------------------------------------


@given(EVENTS, VALUES)
def test_pmf_is_the_sum_over_all_kept_sets_and_the_codecs(event: Rqm, x: float) -> None:
    found = pmf(x, event)
    np.testing.assert_allclose(found, brute_force(x, event), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found, codec_pmf(x, event.levels, event.keep, 1.0, event.extension), rtol=1e-9)
    assert found @ level_values(event) == pytest.approx(x, abs=1e-11)


@given(EVENTS, st.floats(0.01, 100), st.floats(-3, 3))
def test_only_proportions_to_the_clip_matter(event: Rqm, clip: float, x: float) -> None:
    scaled = event.model_copy(update={"clip": clip, "extension": event.extension * clip})
    np.testing.assert_allclose(pmf(x, scaled), pmf(x, event), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(pmf(x, event), pmf(max(-1.0, min(x, 1.0)), event))


@given(EVENTS, VALUES)
def test_pmf_is_affine_between_neighbouring_vertices(event: Rqm, x: float) -> None:
    corners = vertices(event)
    between = [np.interp(x, corners, column) for column in vertex_pmfs(event).T]
    np.testing.assert_allclose(pmf(x, event), between, rtol=1e-8, atol=1e-14)


def test_variance_is_the_reference_value() -> None:
    assert [variance(x, Rqm()) for x in (0.0, 0.37, 1.0)] == pytest.approx(
        [0.24349913, 0.23061965, 0.21543923], abs=6e-9
    )
    assert variance(0.0, Rqm(clip=2.0, extension=2.0)) == pytest.approx(4 * 0.24349913, abs=3e-8)


@pytest.mark.parametrize("shape", LOCAL)
def test_worst_case_of_one_client_is_the_reference_value(shape: tuple[float, int, float]) -> None:
    extension, levels, keep = shape
    found = worst_case(Rqm(levels=levels, keep=keep, extension=extension), ORDERS)
    assert found.exact
    assert found.bounds == pytest.approx(LOCAL[shape], abs=1e-6)


def test_extremes_alone_are_not_the_worst_case() -> None:
    corners = [pmf(1.0, Rqm()), pmf(-1.0, Rqm())]
    naive = [max(renyi(p, q, order) for p, q in itertools.permutations(corners)) for order in (8, 16, 32)]
    assert naive == pytest.approx([5.315642, 5.376784, 5.421546], abs=1e-6)
    assert (worst_case(Rqm(), (8, 16, 32)).bounds > np.array(naive) + 0.01).all()


@given(EVENTS, VALUES, VALUES, st.sampled_from(ORDERS))
def test_no_two_values_are_further_apart_than_two_vertices(event: Rqm, x: float, y: float, order: float) -> None:
    bound = worst_case(event, (order,)).bounds[0]
    assert renyi(pmf(x, event), pmf(y, event), order) <= bound * (1 + 1e-9) + 1e-12
    assert bound <= max_log_ratio(event) * (1 + 1e-12)
    # A bound in closed form: an inner level is hit with probability at most `keep`, and at least so often.
    levels, keep, extension = event.levels, event.keep, event.extension
    assert max_log_ratio(event) <= math.log(2 * (1 + extension) / extension) - (levels - 2) * math.log1p(-keep) + 1e-9


# -- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 10])
def test_worst_case_of_a_sum_is_the_reference_value(clients: int) -> None:
    # That others alike are the worst for ten is found by trying all.
    found = worst_case(Rqm(clients=clients), ORDERS[:-1] if clients < 10 else (2, 8, 32))
    assert found.exact
    expected = SUMS[clients] if clients < 10 else SUMS[10][1::2]
    assert found.bounds == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("clients", [10, 20, 40])
def test_others_alike_are_the_reference_value(clients: int) -> None:
    event = Rqm(clients=clients)
    pmfs, limit = vertex_pmfs(event), max_log_ratio(event)
    found = worst_divergence(pmfs, others.alike(pmfs, clients - 1), ORDERS[:-1], limit)
    assert found == pytest.approx(SUMS[clients], abs=1e-6)
    if clients == 40:
        above = others.Others(others.power(pmf(1.0, event), 39)[None], None)
        assert worst_divergence(pmfs, above, ORDERS[:-1], limit) == pytest.approx(ALL_ABOVE_40, abs=1e-6)


@settings(max_examples=15)
@given(SMALL, st.integers(2, 3))
def test_worst_case_of_a_sum_is_that_of_every_choice_of_vertices(event: Rqm, clients: int) -> None:
    event = event.model_copy(update={"clients": clients})
    corners = [float(x) for x in vertices(event)]
    found = worst_case(event, (1.3, 2, 7.5))
    assert found.exact
    for order, bound in zip(found.orders, found.bounds, strict=True):
        worst = max(
            renyi(summed((x, *rest), event), summed((y, *rest), event), order)
            for rest in itertools.product(corners, repeat=clients - 1)
            for x, y in itertools.permutations(corners, 2)
        )
        assert bound == pytest.approx(worst, rel=1e-9)


@given(SMALL, st.lists(VALUES, min_size=1, max_size=3), VALUES, VALUES, st.sampled_from((1.2, 2, 9)))
def test_no_inputs_of_a_sum_do_worse(event: Rqm, rest: list[float], x: float, y: float, order: float) -> None:
    bound = worst_case(event.model_copy(update={"clients": len(rest) + 1}), (order,)).bounds[0]
    assert renyi(summed((x, *rest), event), summed((y, *rest), event), order) <= bound * (1 + 1e-9) + 1e-12


@settings(max_examples=20)
@given(EVENTS, st.integers(1, 4), st.sampled_from((2, 40)))
def test_cores_are_no_more_noise_than_any_arrangement(event: Rqm, num_others: int, steps: int) -> None:
    pmfs, limit = vertex_pmfs(event), max_log_ratio(event)
    exact = worst_divergence(pmfs, others.every_arrangement(pmfs, num_others), (1.5, 4, 20), limit)
    cores = others.cores(pmfs, places(event), num_others, steps)
    assert cores.weights is not None
    np.testing.assert_allclose(cores.weights.sum(axis=1), 1, rtol=1e-9)
    np.testing.assert_allclose(cores.sums.sum(axis=1), 1, rtol=1e-9)
    assert (worst_divergence(pmfs, cores, (1.5, 4, 20), limit) >= exact * (1 - 1e-9)).all()


@pytest.mark.parametrize("clients", [20, 40, 300])
def test_bound_of_many_clients_lies_between_the_worst_found_and_fewer_clients(clients: int) -> None:
    many = worst_case(Rqm(clients=clients), ORDERS)
    assert not many.exact
    assert many.found is not None
    fewer = worst_case(Rqm(clients=6), ORDERS)
    assert (many.bounds >= many.found).all()
    assert (many.bounds <= fewer.bounds).all()
    assert many.bounds[1] <= 1.6 * many.found[1]  # loose, but not useless
    assert worst_case(Rqm(clients=10**6), (2,)).found is None


def test_more_clients_more_extension_and_lower_orders_cost_less() -> None:
    by_clients = [worst_case(Rqm(clients=n), CURVE_ORDERS).bounds for n in (1, 2, 4, 60)]
    assert all((after < before).all() for before, after in itertools.pairwise(by_clients))
    assert all((np.diff(row) > 0).all() for row in by_clients)
    by_extension = [worst_case(Rqm(extension=each, clients=3), (2, 8)).bounds for each in (0.25, 0.5, 1, 2, 4)]
    assert all((after < before).all() for before, after in itertools.pairwise(by_extension))


def test_search_is_as_long_as_it_is_short() -> None:
    assert max_searched(Rqm(clients=5), 20) == 5
    assert max_searched(Rqm(clients=10**9), 20) < 12
    assert max_searched(Rqm(levels=64, clients=40), 20) == 3


@given(st.floats(1.01, 90))
def test_curve_between_orders_is_an_upper_bound(order: float) -> None:
    event = Rqm(levels=6)
    at = worst_case(event, CURVE_ORDERS).bounds
    bound = upper_curve(CURVE_ORDERS, at, max_log_ratio(event), (order,))[0]
    exact = worst_case(event, (order,)).bounds[0]
    assert exact * (1 - 1e-9) <= bound <= exact * 1.25 + 1e-3 or order < 1.25


def test_levels_that_are_never_likely_overflow_nothing() -> None:
    event = Rqm(levels=64, keep=0.9, extension=1e-5, clients=2)
    found = worst_case(event, (1.5, 2, 32, 1000))
    assert np.isfinite(found.bounds).all()
    assert (np.diff(found.bounds) >= 0).all()
    assert found.bounds[-1] <= max_log_ratio(event)


# -- the codec -------------------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-6
"""Chance that a correct codec fails one of the cases below; its draws are fixed, so that it does not by chance."""


@pytest.mark.parametrize(
    ("x", "stage"),
    [
        (0.37, Codec()),
        (1.0, Codec()),
        (-0.73, Codec(levels=7, keep=0.2)),
        (0.01, Codec(levels=5, keep=0.7, clip=0.02, extension=0.01)),
        (5.0, Codec(levels=3, keep=0.5)),
    ],
    ids=str,
)
def test_codec_draws_levels_as_often_as_is_accounted_for(x: float, stage: Codec) -> None:
    draws = 100_000
    event = Rqm(levels=stage.levels, keep=stage.keep, clip=stage.clip, extension=stage.extension)
    codes = stage.encode(np.full(draws, x, np.float32), 0, np.random.default_rng(5)).codes_n
    expected = draws * pmf(float(np.float32(x)) / stage.clip, event)
    found = np.bincount(codes.astype(np.int64), minlength=stage.levels)
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert expected.min() > 10  # or the statistic is not chi-square
    assert statistic <= chi2.isf(FALSE_ALARM, stage.levels - 1)
    # The test can fail: it tells one level's width from the next.
    other = draws * pmf(float(np.float32(x)) / stage.clip, event.model_copy(update={"keep": stage.keep + 0.02}))
    assert float(((found - other) ** 2 / other).sum()) > chi2.isf(FALSE_ALARM, stage.levels - 1)

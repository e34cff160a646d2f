"""Epsilons against reference values, against closed forms, and against each other."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedcore.errors import ConfigError, InvalidInput
from fedprivacy import accountant
from fedprivacy.accountant import epsilon_pld, epsilon_rdp, guarantee, rdp_curve
from fedprivacy.divergence import CURVE_ORDERS
from fedprivacy.dplora import readings
from fedprivacy.events import (
    Adjacency,
    ClipCount,
    Everyone,
    FixedSize,
    Gaussian,
    History,
    Pbm,
    Poisson,
    Release,
    Rqm,
    Trust,
    Unit,
)
from fedprivacy.planning import gaussian_steps, sampling_of
from fedprivacy.rqm import worst_case


def gaussian(multiplier: float, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE, **release: object) -> History:
    made = Release.model_validate({"mechanisms": (Gaussian(noise_multiplier=multiplier),), **release})
    return History(unit=Unit.CLIENT, adjacency=adjacency, releases=(made,))


def levels(count: int = 1, adjacency: Adjacency = Adjacency.REPLACE, **event: object) -> History:
    made = Release(mechanisms=(Rqm.model_validate(event),), count=count)
    return History(unit=Unit.CLIENT, adjacency=adjacency, trust=Trust.SECURE_SUM, releases=(made,))


@pytest.mark.parametrize(
    ("rate", "multiplier", "steps", "delta", "rdp", "pld"),
    [
        (0.01, 1.0, 1000, 1e-5, 2.101367, 1.828244),
        (0.004, 1.1, 10000, 1e-5, 2.013059, 1.841037),
        (0.1, 2.0, 50, 1e-5, 1.843952, 1.652502),
        (1, 2.0, 50, 1e-5, 22.019852, 20.675508),
        (0.02, 0.8, 500, 1e-6, 6.164547, 5.440308),
        (1, 10.0, 50, 1e-5, 3.188992, 2.943225),
        (0.05, 1.0, 200, 1e-5, 5.367864, 4.765920),
        (8 / 51_494, 2.0, 50, 1e-5, 0.1028781, 0.0012384),
    ],
)
def test_epsilons_are_the_reference_values(
    rate: float, multiplier: float, steps: int, delta: float, rdp: float, pld: float
) -> None:
    history = gaussian_steps(multiplier, steps, sampling_of(rate))
    assert epsilon_rdp(history, delta) == pytest.approx(rdp, abs=2e-6)
    assert epsilon_pld(history, delta) == pytest.approx(pld, abs=2e-6)


def gaussian_delta(multiplier: float, epsilon: float) -> float:
    """Return δ of one Gaussian release, in closed form (Balle, Wang, 2018, theorem 8)."""
    half = 1 / (2 * multiplier)
    at = epsilon * multiplier
    return float(norm.cdf(half - at) - math.exp(epsilon) * norm.cdf(-half - at))


@pytest.mark.parametrize(("multiplier", "epsilon"), [(0.5, 9.9973), (1, 4.3772), (2, 1.9931), (4, 0.9263)])
def test_one_gaussian_release_costs_what_the_closed_form_says(multiplier: float, epsilon: float) -> None:
    found = epsilon_pld(gaussian(multiplier), 1e-5)
    assert found == pytest.approx(epsilon, abs=1e-4)
    assert found is not None
    assert gaussian_delta(multiplier, found) == pytest.approx(1e-5, rel=1e-3)
    # The classical formula says less than that where it does not hold.
    assert (math.sqrt(2 * math.log(1.25e5)) / multiplier < epsilon) == (multiplier == 0.5)


def test_replacing_one_moves_a_sum_twice_as_far_for_both_accountants() -> None:
    replaced, half = gaussian(2.0, Adjacency.REPLACE, count=3), gaussian(1.0, count=3)
    for epsilon in (epsilon_rdp, epsilon_pld):
        assert (
            epsilon(replaced, 1e-5) == epsilon(half, 1e-5) == epsilon(gaussian(1.0, Adjacency.ZERO_OUT, count=3), 1e-5)
        )
    all_drawn = gaussian(2.0, Adjacency.REPLACE, count=3, sampling=FixedSize(size=10, population=10))
    assert epsilon_rdp(all_drawn, 1e-5) == pytest.approx(epsilon_rdp(half, 1e-5))
    assert epsilon_pld(all_drawn, 1e-5) == pytest.approx(epsilon_pld(half, 1e-5), rel=1e-3)


def test_fixed_size_sampling_costs_less_than_everyone_and_about_what_rdp_says() -> None:
    drawn = gaussian(2.0, Adjacency.REPLACE, sampling=FixedSize(size=10, population=1000), count=1000)
    everyone = gaussian(2.0, Adjacency.REPLACE, count=1000)
    by_rdp, by_pld = epsilon_rdp(drawn, 1e-5), epsilon_pld(drawn, 1e-5)
    assert by_pld is not None
    assert 0.5 * by_rdp < by_pld < by_rdp < epsilon_rdp(everyone, 1e-5) / 10
    assert by_pld > 1.1 * (epsilon_pld(gaussian_steps(1.0, 1000, Poisson(rate=0.01)), 1e-5) or 0)


def test_the_count_of_adaptive_clipping_is_part_of_the_same_draw() -> None:
    # Andrew and others: z_delta = (z^-2 - (2 std)^-2)^(-1/2) on the update makes both together cost what z does.
    for std, expected in ((5.0, 1.005038), (50.0, 1.000050)):
        rest = (1 - (2 * std) ** -2) ** -0.5
        assert rest == pytest.approx(expected, abs=1e-6)
        mechanisms = (Gaussian(noise_multiplier=rest), ClipCount(std=std))
        both = Release(mechanisms=mechanisms, sampling=Poisson(rate=0.1), count=20)
        history = History(unit=Unit.CLIENT, releases=(both,))
        assert epsilon_pld(history, 1e-5) == pytest.approx(
            epsilon_pld(gaussian(1.0, sampling=Poisson(rate=0.1), count=20), 1e-5)
        )
    alone = History(unit=Unit.CLIENT, releases=(Release(mechanisms=(ClipCount(std=1.5),)),))
    assert epsilon_rdp(alone, 1e-5) == pytest.approx(epsilon_rdp(gaussian(3.0), 1e-5))


def test_releases_of_different_kinds_add_up() -> None:
    steps = Release(mechanisms=(Gaussian(noise_multiplier=2.0),), count=4)
    value = Release(mechanisms=(Rqm(clients=3, levels=4, dimension=2),), count=2)
    coins = Release(mechanisms=(Pbm(trials=4, clients=3, dimension=3),), count=2)
    orders = np.array(CURVE_ORDERS)

    def of(*releases: Release) -> History:
        return History(unit=Unit.CLIENT, adjacency=Adjacency.ZERO_OUT, releases=releases)

    np.testing.assert_allclose(
        rdp_curve(of(steps, value, coins), orders), sum(rdp_curve(of(each), orders) for each in (steps, value, coins))
    )
    np.testing.assert_allclose(rdp_curve(of(steps), orders), 4 * orders / 8, rtol=1e-9)
    together, apart = (epsilon_pld(each, 1e-5) for each in (of(steps, value), of(steps)))
    assert together is not None
    assert apart is not None
    assert apart < together < apart + (epsilon_pld(of(value), 1e-7) or math.inf) + 1


def test_levels_alone_cost_what_is_known_of_one_value() -> None:
    # Of these orders alone and others alike: 3.04 after one round, 13.10 after ten; the bound is for all, and larger.
    worst = worst_case(Rqm(clients=40), (1.5, 2, 4, 8, 16, 32))
    assert worst.found is not None
    for rounds, expected in ((1, 3.04), (10, 13.10)):
        orders = np.array(worst.orders)
        each = rounds * worst.found + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
        assert each.min() == pytest.approx(expected, abs=6e-3)
        assert epsilon_rdp(levels(rounds, clients=40), 1e-5) > expected
    found = [epsilon_pld(levels(rounds), 1e-5) for rounds in (1, 100)]
    assert found == pytest.approx([5.47, 511.5], rel=1e-3)
    for epsilon in (epsilon_rdp, epsilon_pld):
        assert epsilon(levels(2, dimension=3, levels=4), 1e-5) == pytest.approx(epsilon(levels(6, levels=4), 1e-5))


def test_losses_are_given_up_where_no_grid_holds_them() -> None:
    assert epsilon_pld(levels(50, dimension=4096), 1e-5) is None
    assert epsilon_pld(levels(dimension=16, l2_clip=0.1), 1e-5) is None
    assert epsilon_pld(gaussian(0.001), 1e-5) is None
    assert epsilon_rdp(gaussian(0.001), 1e-5) > 5e5


@settings(max_examples=15)
@given(st.floats(0.4, 5), st.floats(0.001, 0.9), st.integers(1, 500))
def test_more_steps_more_sampling_less_noise_cost_more(multiplier: float, rate: float, steps: int) -> None:
    history = gaussian_steps(multiplier, steps, sampling_of(rate))
    costlier = [
        gaussian_steps(multiplier, steps + 1, sampling_of(rate)),
        gaussian_steps(multiplier, steps, sampling_of(min(1.0, rate * 1.1))),
        gaussian_steps(multiplier * 0.9, steps, sampling_of(rate)),
    ]
    for more in costlier:
        for order in (2.0, 16.0):
            assert rdp_curve(more, np.array([order]))[0] > rdp_curve(history, np.array([order]))[0]
        assert epsilon_rdp(more, 1e-5) >= epsilon_rdp(history, 1e-5)
    assert epsilon_rdp(history, 1e-6) >= epsilon_rdp(history, 1e-5)


def test_nothing_released_costs_nothing() -> None:
    nothing = guarantee(History(unit=Unit.CLIENT), 1e-5)
    assert (nothing.epsilon, nothing.sampling) == (0.0, ("nothing released",))


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_delta_must_be_a_chance(delta: float) -> None:
    for epsilon in (epsilon_rdp, epsilon_pld, guarantee):
        with pytest.raises(InvalidInput, match=r"delta .*: above 0 and below 1"):
            epsilon(gaussian(1.0), delta)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"roundtable\[privacy\]"):
        epsilon_rdp(gaussian(1.0), 1e-5)


# -- the statement ---------------------------------------------------------------------------------------------------


def test_orders_that_are_left_out_are_not_told_and_all_else_is(caplog: pytest.LogCaptureFixture) -> None:
    absl = logging.getLogger("absl")
    epsilon = epsilon_rdp(gaussian(0.987, sampling=Poisson(rate=0.1)), 1e-5)
    assert math.isfinite(epsilon)
    assert not caplog.records
    # The library does have something to say here, and may say it to others.
    before = list(absl.filters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(absl, "addFilter", lambda _: absl.warning("something else"))
        assert epsilon_rdp(gaussian(0.986, sampling=Poisson(rate=0.1)), 1e-5) == pytest.approx(epsilon, rel=1e-2)
    assert caplog.messages[0] == "something else"
    assert "_compute_log_a_frac failed to converge" in caplog.messages[1]
    epsilon_rdp(gaussian(0.985, sampling=Poisson(rate=0.1)), 1e-5)
    assert absl.filters == before


def test_guarantee_is_stated_whole() -> None:
    found = guarantee(gaussian_steps(1.0, 1000, Poisson(rate=0.01)), 1e-5)
    assert found.epsilon == found.epsilon_pld == pytest.approx(1.828244, abs=2e-6)
    assert found.epsilon_rdp == pytest.approx(2.101367, abs=2e-6)
    text = found.text()
    for word in (
        "epsilon: 1.828",
        "delta: 1e-05",
        "one example of one client",
        "is there or is not (add-or-remove-one)",
        "central",
        "probability 0.01",
        "PLD), dp-accounting 0.",
        "epsilon (RDP): 2.101",
        "not covered: what all of a client's examples have in common",
        "not covered: the one who adds the noise",
    ):
        assert word in text
    tree = found.as_json()
    assert json.loads(json.dumps(tree)) == tree
    assert tree["unit"] == "example"
    assert tree["epsilon"] == found.epsilon


def test_guarantee_takes_the_smaller_bound_and_names_it() -> None:
    found = guarantee(levels(50, dimension=64, l2_clip=0.25, clients=40), 1e-5)
    assert found.epsilon_pld is None
    assert found.epsilon == found.epsilon_rdp
    assert found.accountant.startswith("Rényi divergences (RDP)")
    assert "sums over fewer clients than stated" in found.text()
    assert "epsilon (PLD): not known" in found.text()
    assert guarantee(gaussian(1.0, sampling=Everyone()), 1e-5).sampling == (
        "none: the unit is taken to be in every release",
    )


# -- DP-LoRA ---------------------------------------------------------------------------------------------------------


def test_dp_lora_of_the_paper_is_not_private() -> None:
    found = {each.name: guarantee(each.history, 1e-5) for each in readings(2.0, 50)}
    first = found["client-one-clip"]
    assert (first.epsilon, first.epsilon_rdp) == pytest.approx((20.675508, 22.019852), abs=2e-6)
    assert (first.unit, first.adjacency, first.trust) == (Unit.CLIENT, Adjacency.ZERO_OUT, Trust.LOCAL)
    # A and B clipped each move by √2 clips together; a clipped mean of a batch by 2 if one example is another.
    expected = {
        name: 2 / factor
        for name, factor in (("client-two-clips", 2**0.5), ("example-one-clip", 2.0), ("example-two-clips", 8**0.5))
    }
    for name, multiplier in expected.items():
        assert found[name].epsilon == pytest.approx(epsilon_pld(gaussian(multiplier, count=50), 1e-5), rel=1e-6)
    assert [each.epsilon for each in found.values()] == sorted(each.epsilon for each in found.values())
    assert found["example-two-clips"].epsilon > 90

"""What jobs release, against formulas and dp-accounting asked directly."""

from __future__ import annotations

from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

import fedprivacy.ledger
from fedcore.errors import InvalidInput
from fedcore.jobfile import Job, parse_job
from fedprivacy.accountant import epsilon_pld, guarantee
from fedprivacy.events import Adjacency, Gaussian, History, Release, Trust, Unit
from fedprivacy.guarantee import Guarantee
from fedprivacy.jobs import EVERYBODY, Accounting, Round, update_multiplier, with_noise
from fedprivacy.ledger import Ledger

DELTA = 1e-5
QUORUM = 3
FEW = Round(clients=QUORUM, assigned=4, available=4)


def job(privacy: dict[str, Any], rounds: int = 10, **sections: dict[str, Any]) -> Job:
    tree = {
        "job": {"name": "x", "rounds": rounds},
        "task": {"name": "digits"},
        "schedule": {"cohort": 4, "quorum": QUORUM},
        "privacy": {"delta": DELTA, **privacy},
        **sections,
    }
    return parse_job(tree, "x")


def accounting(privacy: dict[str, Any], **more: Any) -> Accounting:
    found = Accounting.of(job(privacy, **more))
    assert found is not None
    return found


FEDAVG = {"mechanism": "dp-fedavg", "clip": 1.0, "noise_multiplier": 2.0}
SGD = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 2.0, "sampling": 0.1}


def epsilon(found: Accounting, *releases: Release) -> float:
    ledger = Ledger(found.history())
    for release in releases:
        ledger.add(["ann"], release)
    return ledger.worst(DELTA).epsilon


def directly(event: dp.DpEvent, count: int) -> float:
    return float(PLDAccountant().compose(event, count).get_epsilon(DELTA))


def test_dp_sgd_counts_every_step_of_every_round() -> None:
    found = accounting(SGD, training={"local_epochs": 3})
    (release,) = found.planned(1, 10).releases
    assert release.count == 10 * 30  # 3 epochs of 1 / 0.1 steps
    assert (found.unit, found.adjacency, found.trust) == (Unit.EXAMPLE, Adjacency.ZERO_OUT, Trust.LOCAL)
    spent = epsilon(found, *[found.trained(FEW, 1)] * 2)
    assert spent == pytest.approx(directly(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), 60), rel=1e-3)


def test_dp_lora_as_published_has_its_real_epsilon() -> None:
    found = accounting({"mechanism": "dp-lora-paper", "clip": 10.0, "noise_multiplier": 2.0}, rounds=50)
    ledger = Ledger(found.history())
    assert ledger.worst(DELTA, then=found.planned(1, 50)).epsilon_pld == pytest.approx(20.675508, abs=1e-2)
    assert ledger.worst(DELTA, then=found.planned(1, 50)).epsilon_rdp == pytest.approx(22.019852, abs=1e-3)


@pytest.mark.parametrize(("clients", "multiplier"), [(3, 2.0), (4, 2 * (4 / 3) ** 0.5), (12, 4.0)])
def test_shares_of_noise_add_up(clients: int, multiplier: float) -> None:
    found = accounting({**FEDAVG, "noise": "clients"})
    (event,) = found.trained(Round(clients, clients, clients), 1).mechanisms
    assert event.kind == "gaussian"
    assert event.noise_multiplier == pytest.approx(multiplier)
    assert found.trust is Trust.DISTRIBUTED


@pytest.mark.parametrize(
    ("cohort", "multiplier", "expected"), [(100, 1.0, 1.005038), (1000, 1.0, 1.000050), (40, 2.0, 2.309401)]
)
def test_a_clip_that_follows_the_norms_takes_its_share_of_the_noise(
    cohort: int, multiplier: float, expected: float
) -> None:
    assert update_multiplier(multiplier, cohort / 20) == pytest.approx(expected, abs=1e-6)
    found = accounting({**FEDAVG, "noise_multiplier": multiplier, "adaptive": {}}, schedule={"cohort": cohort})
    release = found.trained(FEW, 1)
    assert [each.kind for each in release.mechanisms] == ["gaussian", "clip-count"]
    fixed = accounting({**FEDAVG, "noise_multiplier": multiplier})
    assert epsilon(found, release) == pytest.approx(epsilon(fixed, fixed.trained(FEW, 1)), rel=1e-9)


def test_a_cohort_that_is_too_small_for_a_clip_that_follows_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"noised by 0.5 alone costs what noise multiplier 1 does, and 1 is asked"):
        update_multiplier(1.0, 10 / 20)


def test_secret_cohorts_cost_everybody_what_drawing_costs() -> None:
    found = accounting({**FEDAVG, "secret_cohort": True})
    drawn, all_of_them = (found.trained(Round(2, 4, available), 1) for available in (40, 4))
    assert found.adjacency is Adjacency.REPLACE
    assert found.charged(["ann", "bob"]) == (EVERYBODY,)
    assert epsilon(found, drawn) < epsilon(found, all_of_them) / 2
    # Replacing one moves a sum by two clips.
    assert epsilon(found, all_of_them) == pytest.approx(directly(dp.GaussianDpEvent(1.0), 1), rel=1e-3)


def test_each_is_charged_for_the_rounds_that_it_was_in() -> None:
    found = accounting(FEDAVG)
    ledger = Ledger(found.history())
    rounds = [["ann", "bob"], ["ann"], ["ann", "cleo"], ["bob"]]
    for names in rounds:
        ledger.add(names, found.trained(FEW, 1))
    for name, count in (("ann", 3), ("bob", 2), ("cleo", 1)):
        assert ledger.worst(DELTA, [name]).epsilon == pytest.approx(directly(dp.GaussianDpEvent(2.0), count), rel=1e-3)
    assert ledger.worst(DELTA) == ledger.worst(DELTA, ["ann"])
    assert ledger.worst(DELTA, ["dan"]).epsilon == 0
    then = found.history(found.trained(FEW, 1))
    assert ledger.worst(DELTA, ["bob", "cleo"], then) == ledger.worst(DELTA, ["ann"])


def test_releases_of_other_sizes_are_compared_by_epsilon_and_not_by_number() -> None:
    found = accounting({**FEDAVG, "noise": "clients"})
    ledger = Ledger(found.history())
    for _ in range(3):
        ledger.add(["often"], found.trained(Round(300, 300, 300), 1))
    ledger.add(["once"], found.trained(FEW, 1))
    assert ledger.worst(DELTA) == ledger.worst(DELTA, ["once"])


def test_noise_that_is_left_out_is_what_the_budget_allows() -> None:
    for privacy in ({**SGD, "epsilon": 3.0}, {**FEDAVG, "epsilon": 3.0, "noise": "clients"}):
        found = Accounting.of(with_noise(job({**privacy, "noise_multiplier": None})))
        assert found is not None
        whole = Ledger(found.history()).worst(DELTA, then=found.planned(1, 10)).epsilon
        assert 2.99 < whole <= 3.0
    with pytest.raises(InvalidInput, match="no noise multiplier up to"):
        with_noise(job({**FEDAVG, "epsilon": 1e-6, "delta": 1e-12, "noise_multiplier": None}, rounds=10**6))


def test_the_start_is_one_more_release_and_the_first_round() -> None:
    start = {"clip": 5.0, "noise_multiplier": 4.0}
    found = accounting({**SGD, "start": start})
    first, rest = found.planned(1, 10).releases
    assert first.mechanisms == (Gaussian(noise_multiplier=4.0),)
    assert (first.count, first.sampling) == (1, rest.sampling)
    assert rest.count == 9 * 10
    assert found.planned(1, 4, with_start=False).releases[0].count == 40


def test_levels_are_counted_by_dimension_or_by_norm() -> None:
    stages = {"uplink": [{"codec": "clip", "norm": 0.25}, {"codec": "rqm", "clip": 1.0}]}
    rqm = {"mechanism": "rqm"}
    alone = accounting(rqm, compression=stages).trained(FEW, 64).mechanisms[0]
    summed = accounting({**rqm, "trust": "central"}, compression=stages).trained(Round(40, 40, 40), 64).mechanisms[0]
    assert alone.model_dump(include={"clients", "dimension", "l2_clip"}) == {
        "clients": 1,
        "dimension": 64,
        "l2_clip": 0.25,
    }
    assert summed == alone.model_copy(update={"clients": 40})


def test_of_many_histories_the_worst_is_found_without_a_loss_distribution_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 clients, each with releases of other sizes."""
    found = accounting({**FEDAVG, "noise": "clients"})
    ledger, rng = Ledger(found.history()), np.random.default_rng(1)
    for clients in range(3, 9):
        names = [f"c{number}" for number in np.flatnonzero(rng.random(10) < 0.5)]
        ledger.add(names, found.trained(Round(clients, clients, clients), 1))
    tried = 0

    def counted(history: History, delta: float, *, with_pld: bool = True) -> Guarantee:
        nonlocal tried
        tried += with_pld
        return guarantee(history, delta, with_pld=with_pld)

    monkeypatch.setattr(fedprivacy.ledger, "_cached", counted)
    monkeypatch.setattr(fedprivacy.ledger, "MAX_LOSSES", 2)
    worst = ledger.worst(DELTA)
    assert 1 <= tried <= 2
    each = [ledger.of(f"c{number}") for number in range(10)]
    by_rdp = sorted((guarantee(one, DELTA, with_pld=False).epsilon, index) for index, one in enumerate(each))
    assert (epsilon_pld(each[by_rdp[-1][1]], DELTA) or 0) <= worst.epsilon <= by_rdp[-1][0]

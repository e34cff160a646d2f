"""The server's noise: how much, on what, and who may not be longer than it is made for.

Statistical tests hold with a probability of at least 1 − 1e-9 for right code (two-sided, by scipy's quantiles).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedcore.errors import UpdateRejected
from fedcore.jobfile import parse_job
from fedcore.messages import UpdateHeader, WorkKind
from fedcore.part import Part, dense_parts
from fedprivacy.jobs import Accounting, update_multiplier
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.noise import Noise, largest_norm, next_clip, noise_of, within
from fedserver.state.records import AssignmentRecord, AttemptRecord, VersionRecord

FALSE_ALARM = 1e-9
D = 40_000
DIGEST = "ab" * 32
LATEST = VersionRecord("j", 1, DIGEST, DIGEST, b"", DIGEST, None, 3, 3, 1, 1, 1.0)


def accounting(**privacy: Any) -> Accounting:
    section = {"mechanism": "dp-fedavg", "delta": 1e-5, "clip": 2.0, "noise_multiplier": 1.5, **privacy}
    tree = {"job": {"name": "x", "rounds": 3}, "task": {"name": "t"}, "schedule": {"cohort": 40}, "privacy": section}
    found = Accounting.of(parse_job(tree, "x"))
    assert found is not None
    return found


def attempt(accepted: int, assigned: int, within_clip: int = 0) -> Attempt:
    found = Attempt(AttemptRecord("j", 1, 0, WorkKind.TRAIN, 0.0, 1.0, available=assigned), 0.0, None)
    for number in range(assigned):
        key, place = f"{number:032x}", ("j", 1, 0, WorkKind.TRAIN)
        found.assignments[key] = AssignmentRecord(key, *place, f"c{number}", 0.0)
        if number < accepted:
            found.headers[f"c{number}"] = UpdateHeader(
                federation="f",
                update_id=key,
                assignment_id=key,
                job_id="0" * 32,
                version=1,
                kind=WorkKind.TRAIN,
                layout_digest=DIGEST,
                frame_bytes=0,
                frame_digest=DIGEST,
                num_examples=1,
                within_clip=number < within_clip,
            )
    return found


def noise(found: Accounting, tried: Attempt, latest: VersionRecord = LATEST, *, start: bool = False) -> Noise:
    made = noise_of(found, tried, latest, start=start)
    assert made is not None
    return made


def check_std(values: np.ndarray[Any, Any], std: float) -> None:
    """Compare the second moment with the χ² interval, and the mean with the normal one."""
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], values.size) / values.size
    assert low < np.mean(np.square(values)) / std**2 < high
    assert abs(values.mean()) < stats.norm.ppf(1 - FALSE_ALARM / 2) * std / math.sqrt(values.size)


def test_the_mean_gets_clip_times_multiplier_over_the_number_of_clients() -> None:
    mean_D = np.full(D, 0.25, dtype=np.float32)
    blocks = list(noise(accounting(), attempt(5, 8)).on_mean([mean_D[:1000], mean_D[1000:]]))
    assert [block.dtype for block in blocks] == [np.float32] * 2
    found = np.concatenate(blocks).astype(np.float64) - 0.25
    check_std(found, 2.0 * 1.5 / 5)
    lag = found[:-1] * found[1:] / (2.0 * 1.5 / 5) ** 2
    assert abs(lag.mean()) < stats.norm.ppf(1 - FALSE_ALARM / 2) / math.sqrt(lag.size)


def test_a_secret_cohorts_mean_is_over_all_that_were_asked() -> None:
    mean_D = np.full(D, 0.4, dtype=np.float32)  # of 5 that have answered
    (block,) = noise(accounting(secret_cohort=True), attempt(5, 8)).on_mean([mean_D])
    check_std(block.astype(np.float64) - 0.4 * 5 / 8, 2.0 * 1.5 / 8)


def test_the_start_has_a_clip_and_a_multiplier_of_its_own() -> None:
    total_D = np.zeros(D)
    noise(accounting(start={"clip": 7.0, "noise_multiplier": 3.0}), attempt(5, 8), start=True).on_sum(total_D)
    check_std(total_D, 21.0)


def test_the_clip_in_force_is_that_of_the_version() -> None:
    (block,) = noise(accounting(adaptive={}), attempt(5, 8), replace(LATEST, clip=0.5)).on_mean(
        [np.zeros(D, np.float32)]
    )
    check_std(block.astype(np.float64), 0.5 * update_multiplier(1.5, 40 / 20) / 5)


def test_noise_is_another_one_each_time_unless_it_is_unsafe() -> None:
    zeros = np.zeros(4, np.float32)
    secret = [next(noise(accounting(), attempt(5, 8)).on_mean([zeros])).tobytes() for _ in range(2)]
    assert secret[0] != secret[1]
    unsafe = [next(noise(accounting(unsafe_seed=3), attempt(5, 8)).on_mean([zeros])).tobytes() for _ in range(2)]
    assert unsafe[0] == unsafe[1]


@pytest.mark.parametrize("privacy", [{"noise": "local"}, {"noise": "clients"}])
def test_elsewhere_the_server_adds_nothing(privacy: dict[str, Any]) -> None:
    assert noise_of(accounting(**privacy), attempt(5, 8), LATEST, start=False) is None
    assert noise_of(None, attempt(5, 8), LATEST, start=False) is None
    assert largest_norm(accounting(**privacy), WorkKind.TRAIN, LATEST) is None


def test_the_clip_follows_the_share_of_updates_below_it() -> None:
    """log C moves by −rate · (b − quantile); b has noise of count_std / n, which is averaged out over 4,000 draws."""
    found = accounting(adaptive={"quantile": 0.6, "rate": 0.5, "count_std": 3.0}, noise_multiplier=1.0)
    moves = [
        math.log((next_clip(found, attempt(10, 12, within_clip=8), LATEST) or math.nan) / 2.0) for _ in range(4000)
    ]
    expected, std = -0.5 * (0.8 - 0.6), 0.5 * 3.0 / 10
    check_std((np.array(moves) - expected), std)
    assert next_clip(accounting(), attempt(10, 12), LATEST) is None


def test_the_clip_stays_within_bounds() -> None:
    found = accounting(adaptive={"rate": 10.0, "count_std": 1000.0}, noise_multiplier=1.0)
    for clip in (1e-6, 1e6):
        made = [next_clip(found, attempt(1, 1), replace(LATEST, clip=clip)) for _ in range(20)]
        assert all(each is not None and 0.999e-6 < each <= 1e6 for each in made)


def test_what_is_longer_than_the_clip_is_refused() -> None:
    values = np.full(100, 0.2, dtype=np.float32)  # of norm 2
    assert largest_norm(accounting(), WorkKind.TRAIN, LATEST) == 2.0
    assert [part.size for part in within(dense_parts([values[:40], values[40:]]), 2.0)] == [40, 60]
    with pytest.raises(UpdateRejected, match=r"an update of L2 norm 2.002, the job's clip is 2"):
        list(within(dense_parts([values * np.float32(1.001)]), 2.0))
    with pytest.raises(UpdateRejected, match="norm inf"):
        list(within(dense_parts([values * np.float32(np.inf)]), 2.0))


def test_values_that_are_not_sent_one_by_one_count_too() -> None:
    sparse = Part(0, 100, np.array([1]), np.array([0.0], dtype=np.float32), rest=0.3)
    with pytest.raises(UpdateRejected, match=r"norm 2\.98"):
        list(within([sparse], 2.0))

"""Whole private jobs on virtual time: engine, runner and torch as they are; what leaves, what is counted, what stops.

Statistical tests hold with a probability of at least 1 − 1e-9 for right code.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fedsim.simulation
from fedclient.ledger import MemoryLedger
from fedcodec import build_pipeline
from fedcore.errors import JobFailed
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Vector
from fedcore.messages import UpdateHeader, UploadState, WorkKind
from fedprivacy.jobs import Accounting, Round
from fedprivacy.ledger import Ledger
from fedsim.simulation import Simulated, make_clients, simulate
from fedsim.transport import InProcessTransport

RAW = build_pipeline([{"codec": "raw"}])
FEDAVG = {"mechanism": "dp-fedavg", "clip": 0.5, "noise_multiplier": 1.0}
SGD = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 1.0, "sampling": 0.2}
START = {"start": {"clip": 1.0, "noise_multiplier": 1.0}}
FALSE_ALARM = 1e-9
ALL = Round(clients=3, assigned=3, available=3)


def make_job(privacy: dict[str, Any], *, rounds: int = 2, cohort: int = 3, **sections: dict[str, Any]) -> Job:
    tree: dict[str, Any] = {
        "job": {"name": "private", "rounds": rounds, "seed": 4},
        "task": {"name": "digits"},
        "training": {"learning_rate": 0.01},
        "aggregator": {"max_examples": 1},
        "schedule": {"cohort": cohort, "quorum": cohort},
        "privacy": {"delta": 1e-3, **privacy},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_job(tree, "private")


def run(job: Job, clients: int = 3) -> Simulated:
    return asyncio.run(simulate(job, make_clients(job, clients, {})))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[UpdateHeader, bytes]]:
    """Every update that has left a client."""
    found: list[tuple[UpdateHeader, bytes]] = []

    class Transport(InProcessTransport):
        async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
            found.append((UpdateHeader.from_bytes(header), bytes(frame)))
            return await super().send_update(header, signature, frame)

    monkeypatch.setattr(fedsim.simulation, "InProcessTransport", Transport)
    return found


def values(frame: bytes) -> Vector:
    return RAW.decode(memoryview(frame), [(len(frame) - 7) // 4])


def trained(sent: list[tuple[UpdateHeader, bytes]], version: int) -> list[Vector]:
    return [values(frame) for header, frame in sent if (header.kind, header.version) == (WorkKind.TRAIN, version)]


def check_std(found: np.ndarray[Any, Any], std: float) -> None:
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], found.size) / found.size
    assert low < np.mean(np.square(found)) / std**2 < high


def epsilon(job: Job, rounds: int, who: Round = ALL) -> float:
    accounting = Accounting.of(job)
    assert accounting is not None
    ledger = Ledger(accounting.history())
    for _ in range(rounds):
        ledger.add(["anybody"], accounting.trained(who, 1))
    return ledger.worst(1e-3).epsilon


def test_clients_clip_and_the_server_adds_noise(sent: list[tuple[UpdateHeader, bytes]]) -> None:
    simulated = run(make_job(FEDAVG, rounds=1))
    (version_0,) = [values(frame) for header, frame in sent if header.kind is WorkKind.INITIALISE]
    updates = trained(sent, 0)
    norms = [float(np.linalg.norm(update.astype(np.float64))) for update in updates]
    assert norms == [pytest.approx(0.5, rel=1e-6)] * 3
    assert all(norm <= 0.5 for norm in norms)
    version_1 = np.frombuffer(simulated.state, "<f4").astype(np.float64)
    noise_D = version_1 - version_0 - np.mean(updates, axis=0)
    check_std(noise_D, 0.5 * 1.0 / 3)


@pytest.mark.parametrize(("noise", "std"), [("clients", 0.5 / math.sqrt(3)), ("local", 0.5)])
def test_clients_add_their_noise_after_the_clip(sent: list[tuple[UpdateHeader, bytes]], noise: str, std: float) -> None:
    """The update itself is at most 0.5 long in some 10,000 values: a ten thousandth of the noise's square."""
    simulated = run(make_job({**FEDAVG, "noise": noise}, rounds=1))
    updates = trained(sent, 0)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], updates[0].size) / updates[0].size
    for update in updates:
        assert low < np.mean(np.square(update.astype(np.float64))) / std**2 < high + 1e-3
    # Draws of two clients have nothing in common.
    together = float(np.mean(updates[0] * updates[1])) / std**2
    assert abs(together) < stats.norm.ppf(1 - FALSE_ALARM / 2) / math.sqrt(updates[0].size) + 1e-3
    (version_0,) = [values(frame) for header, frame in sent if header.kind is WorkKind.INITIALISE]
    version_1 = np.frombuffer(simulated.state, "<f4")
    assert np.abs(version_1 - version_0 - np.mean(updates, axis=0)).max() < 1e-6  # the server adds nothing


@pytest.mark.parametrize(
    ("privacy", "sections"),
    [
        (FEDAVG, {}),
        ({**FEDAVG, "noise": "local"}, {}),
        (SGD, {"aggregator": {"max_examples": 5}}),
        ({**SGD, **START}, {"adapter": {"name": "lora-sb", "rank": 4}, "aggregator": {"max_examples": 5}}),
        ({**FEDAVG, **START}, {"adapter": {"name": "lora-sb", "rank": 4}}),
        ({"mechanism": "dp-lora-paper", "clip": 1.0, "noise_multiplier": 1.0}, {"adapter": {"name": "lora"}}),
        ({"mechanism": "rqm"}, {"compression": {"preset": "rqm"}, "adapter": {"name": "lora", "rank": 2}}),
    ],
    ids=lambda value: str(value.get("noise", value.get("mechanism", ""))) if "mechanism" in value else "",
)
def test_nothing_else_that_depends_on_the_data_leaves(
    sent: list[tuple[UpdateHeader, bytes]], privacy: dict[str, Any], sections: dict[str, Any]
) -> None:
    simulated = run(make_job(privacy, **sections))
    kinds = {header.kind for header, _ in sent}
    assert WorkKind.TRAIN in kinds
    assert (WorkKind.GRADIENT in kinds) == ("start" in privacy)
    for header, _ in sent:
        assert header.metrics == header.evaluation == {}
        assert header.evaluated_examples == 0
        assert header.encoding_error is None
        assert header.num_examples <= (5 if "sampling" in privacy else 1)
    assert simulated.status["evaluated"] is None


LARGE = {"start": {"clip": 0.01, "noise_multiplier": 100.0}}
LEVELS = {"compression": {"uplink": [{"codec": "clip"}, {"codec": "rqm"}]}}


@pytest.mark.parametrize(
    ("privacy", "sections"),
    [
        (SGD, {}),
        ({**FEDAVG, "noise": "local"}, {}),
        ({"mechanism": "rqm", "trust": "local"}, LEVELS),
        ({"mechanism": "rqm", "trust": "central"}, LEVELS),
        ({"mechanism": "dp-lora-paper", "clip": 1.0, "noise_multiplier": 1.0}, {}),
    ],
)
def test_gradients_of_the_start_leave_with_their_noise(
    sent: list[tuple[UpdateHeader, bytes]], privacy: dict[str, Any], sections: dict[str, Any]
) -> None:
    """Of standard deviation 1; a client's clipped gradients are at most 0.01 long, with DP-SGD for each example."""
    run(make_job({**privacy, **LARGE}, rounds=1, adapter={"name": "lora-sb", "rank": 4}, **sections))
    gradients = [values(frame) for header, frame in sent if header.kind is WorkKind.GRADIENT]
    assert len(gradients) == 3
    for gradient in gradients:
        low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], gradient.size) / gradient.size
        assert low < np.mean(np.square(gradient.astype(np.float64))) < high + 0.05


def test_the_server_adds_its_noise_to_the_sum_of_gradients(sent: list[tuple[UpdateHeader, bytes]]) -> None:
    """Clients send the same twice; what the server makes of that is another start each time."""
    start = {"start": {"clip": 10.0, "noise_multiplier": 100.0}}
    job = make_job({**FEDAVG, **start}, rounds=1, adapter={"name": "lora-sb", "rank": 4})
    assert len({run(job).state for _ in range(2)}) == 2
    assert len({frame for header, frame in sent if header.kind is WorkKind.GRADIENT}) == 3


def test_every_client_notes_the_start_and_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers: list[MemoryLedger] = []

    class Ledger(MemoryLedger):
        def __init__(self) -> None:
            super().__init__()
            ledgers.append(self)

    monkeypatch.setattr(fedsim.simulation, "MemoryLedger", Ledger)
    run(make_job({**SGD, **START}, rounds=3, adapter={"name": "lora-sb", "rank": 4}))
    for ledger in ledgers:
        with ledger.locked() as accounts:
            assert (accounts.in_all().updates, accounts.in_all().unprotected) == (3, 0)
    assert len(ledgers) == 3


def test_epsilon_is_shown_by_version_now_and_at_the_end() -> None:
    job = make_job(FEDAVG, rounds=3)
    shown: list[dict[str, Any]] = []
    simulated = asyncio.run(simulate(job, make_clients(job, 3, {}), show=lambda tree: shown.append(tree["jobs"][0])))
    expected = [0.0, *(epsilon(job, rounds) for rounds in (1, 2, 3))]
    assert [row["epsilon"] for row in simulated.history] == pytest.approx(expected)
    running = [
        each for each in shown if each["status"] == "running" and each["privacy"] and each["version"] is not None
    ]
    for each in running:
        assert each["privacy"]["epsilon_at_end"] == pytest.approx(expected[-1])
        # It is counted before the version is there.
        assert each["privacy"]["epsilon"] >= expected[each["version"]] - 1e-9
    privacy = simulated.status["privacy"]
    assert privacy["epsilon"] == privacy["epsilon_at_end"] == pytest.approx(expected[-1])
    assert privacy["guarantee"]["unit"] == "client"
    json.dumps(privacy, allow_nan=False)


def test_a_budget_ends_the_job_before_the_round_that_would_exceed_it(sent: list[tuple[UpdateHeader, bytes]]) -> None:
    job = make_job({**FEDAVG, "evaluation": True}, rounds=9)
    budget = (epsilon(job, 2) + epsilon(job, 3)) / 2
    simulated = run(make_job({**FEDAVG, "evaluation": True, "epsilon": budget}, rounds=9))
    assert simulated.version.version == 2
    assert len([header for header, _ in sent if header.kind is WorkKind.TRAIN]) == 2 * 3
    assert simulated.status["privacy"]["epsilon"] == pytest.approx(epsilon(job, 2))
    assert simulated.status["evaluated"]["version"] == 2
    spent = f"from {epsilon(job, 2):.4g} to {epsilon(job, 3):.4g} at delta 0.001, and {budget:g} may be spent"
    assert simulated.status["failure"] == f"privacy budget: one more round would bring epsilon {spent}"


def test_noise_that_a_budget_allows_lets_the_job_reach_its_end() -> None:
    simulated = run(make_job({**SGD, "noise_multiplier": None, "epsilon": 4.0}, rounds=2))
    assert simulated.version.version == 2
    ended, begun = simulated.status["finished_at"], simulated.status["submitted_at"]
    assert ended - begun < 1, "virtual time went on while epsilon was computed"
    assert 3.9 < simulated.status["privacy"]["epsilon"] <= 4.0


def test_everybody_pays_for_a_secret_cohort_and_only_members_for_a_known_one() -> None:
    """12 clients, 2 of which are asked. What is drawn from in secret is everybody."""
    known = run(make_job(FEDAVG, rounds=3, cohort=2), 12)
    secret = run(make_job({**FEDAVG, "secret_cohort": True}, rounds=3, cohort=2), 12)
    by_job = {each.status["privacy"]["guarantee"]["adjacency"]: each.history for each in (known, secret)}
    job = make_job({**FEDAVG, "secret_cohort": True}, rounds=3, cohort=2)
    drawn = [epsilon(job, rounds, Round(2, 2, 12)) for rounds in (1, 2, 3)]
    assert [row["epsilon"] for row in by_job["replace-one"][1:]] == pytest.approx(drawn)
    member = [epsilon(make_job(FEDAVG), rounds) for rounds in (1, 2, 3)]
    for row, most in zip(by_job["zero-out"][1:], member, strict=True):
        assert member[0] - 1e-9 <= row["epsilon"] <= most + 1e-9


@pytest.mark.parametrize("privacy", [FEDAVG, {**FEDAVG, "noise": "local"}, SGD])
def test_runs_repeat_only_with_an_unsafe_seed(privacy: dict[str, Any]) -> None:
    def state(**more: Any) -> bytes:
        return run(make_job({**privacy, **more}, rounds=1)).state

    assert state(unsafe_seed=3) == state(unsafe_seed=3)
    assert len({state(unsafe_seed=3), state(unsafe_seed=4), state(), state()}) == 4


def test_the_clip_follows_the_norms() -> None:
    """No update is below a tiny clip, so it grows by exp(rate · quantile) a round, but for the noise of the count."""
    section = {**FEDAVG, "clip": 1e-4, "noise_multiplier": 0.002, "adaptive": {"rate": 1.0, "count_std": 0.002}}
    simulated = run(make_job(section, rounds=3))
    clips = [1e-4, *(row["clip"] for row in simulated.history[1:])]
    assert np.diff(np.log(clips)) == pytest.approx([0.5] * 3, abs=0.01)


def test_a_client_whose_delta_is_too_large_says_so() -> None:
    with pytest.raises(JobFailed, match=r"delta 0\.1: below 1/n"):
        run(make_job({**SGD, "delta": 0.1}))

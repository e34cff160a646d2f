"""A client's policy and ledger over real processes: the last word, also after kill -9."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import Exit
from fedcore.jobfile import Job, parse_job
from tests.support.gate import TASK_FILE, Gate, open_gate
from tests.support.processes import Deployment, Process, Tree, deployed, run

CLIENT = "client"
MULTIPLIER = 4.0
TWO_ROUNDS = 1.5
"""Two rounds with that multiplier cost epsilon 1.36, three 1.70."""


@pytest.fixture
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path) as deployment:
        deployment.enrol(CLIENT)
        yield deployment


def set_policy(deployment: Deployment, text: str) -> None:
    (deployment.home(CLIENT) / "policy.toml").write_text(text, encoding="utf-8")


def start_client(deployment: Deployment, gate: Gate) -> Process:
    options = ("--log-format", "json", "--log-level", "debug", "--data", f"gate={gate.port}", "--task-file", TASK_FILE)
    client = deployment.start("fedclient", "run", "--folder", deployment.home(CLIENT), *options)
    client.wait_for_event("connected")
    return client


def job_with(privacy: dict[str, Any] | None) -> Job:
    tree = {
        "job": {"name": "kept", "rounds": 5, "seed": 7},
        "task": {"name": "gated"},
        "training": {"learning_rate": 0.1},
        "aggregator": {"max_examples": 1},
        "schedule": {"cohort": 1},
    }
    return parse_job(tree if privacy is None else {**tree, "privacy": privacy}, "job")


PRIVATE = job_with(
    {"mechanism": "dp-fedavg", "noise": "local", "clip": 1.0, "noise_multiplier": MULTIPLIER, "delta": 1e-5}
)


def spent(deployment: Deployment) -> Tree:
    shown = run("fedclient", "privacy", "--folder", deployment.home(CLIENT), "--json")
    assert shown.wait() == 0, shown.story()
    found: Tree = json.loads(shown.out[0])
    return found


def declined(deployment: Deployment, job_id: str) -> str:
    """Return why the client has declined, as the operator sees it."""
    return str(deployment.wait_for(job_id, lambda job: job["last_decline"] is not None)["last_decline"]["reason"])


def test_a_client_stops_at_its_own_limit_and_the_operator_sees_why(deployment: Deployment, gate: Gate) -> None:
    set_policy(deployment, f"tasks = ['gated']\n[privacy]\nepsilon_per_job = {TWO_ROUNDS}\n")
    client = start_client(deployment, gate)
    job_id = deployment.submit(PRIVATE)
    with gate.opened():
        reason = declined(deployment, job_id)
        assert deployment.status(job_id)["version"] == 2
        assert reason.startswith("this client's policy: job 'kept' would bring epsilon to 1.698")
        assert reason.endswith(f"(delta 1e-05), its limit per job is {TWO_ROUNDS}")
        shown = run("fedserver", "status", job_id, "--folder", deployment.state, "--json")
        assert json.loads(shown.out[0])["jobs"][0]["last_decline"]["reason"] == reason

        client.kill()
        client = start_client(deployment, gate)  # is asked again, and has forgotten nothing
        assert client.wait_for_event("assignment declined")["reason"] == reason
    (job,) = spent(deployment)["jobs"]
    assert (job["job_id"], job["updates"], job["guarantee"]["trust"]) == (job_id, 2, "local")
    assert job["left"] == pytest.approx(TWO_ROUNDS - job["epsilon"])
    assert job["epsilon"] < TWO_ROUNDS


def test_an_update_that_was_noted_and_never_arrived_counts(deployment: Deployment, gate: Gate) -> None:
    set_policy(deployment, f"[privacy]\nepsilon_per_job = {TWO_ROUNDS}\n")
    client = start_client(deployment, gate)
    job_id = deployment.submit(PRIVATE)
    held = gate.wait_for_client()
    deployment.server.kill()  # so that nothing of the update can arrive
    held.release()
    client.wait_for_event("release noted", job=job_id, version=0)
    client.kill()
    deployment.start_server()
    start_client(deployment, gate)
    with gate.opened():
        assert "its limit per job is" in declined(deployment, job_id)
    assert deployment.status(job_id)["version"] == 1
    assert spent(deployment)["in_all"]["updates"] == 2


def test_a_job_without_privacy_is_refused_before_anything_is_built(deployment: Deployment, gate: Gate) -> None:
    set_policy(deployment, "[privacy]\n")
    start_client(deployment, gate)
    job_id = deployment.submit(job_with(None))
    assert "only jobs with [privacy], which job 'kept' has not" in declined(deployment, job_id)
    assert spent(deployment) == {"jobs": [], "in_all": spent(deployment)["in_all"]}
    assert not (deployment.home(CLIENT) / "privacy-ledger.jsonl").exists()


def test_a_client_whose_ledger_is_damaged_does_not_start(deployment: Deployment, gate: Gate) -> None:
    client = start_client(deployment, gate)
    with gate.opened():
        deployment.finish(deployment.submit(job_with(None)))
    assert spent(deployment)["in_all"]["unprotected"] == 5
    assert client.stop() == 0
    ledger = deployment.home(CLIENT) / "privacy-ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-200])
    again = deployment.start("fedclient", "run", "--folder", deployment.home(CLIENT), "--log-format", "json")
    assert again.wait() == Exit.STATE_UNUSABLE
    assert any("nothing is released without it" in line for line in again.err)

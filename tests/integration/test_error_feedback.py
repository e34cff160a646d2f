"""Error feedback over real processes: kill -9 of client and server at the worst moments changes no byte.

One client trains; its six values go up one at a time, so every version depends on what the ones before left out.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.jobfile import Job, parse_job
from tests.support.gate import TASK_FILE, Gate, open_gate
from tests.support.processes import Deployment, Process, bytes_of, deployed

CLIENT, OTHER = "client", "other"
ROUNDS = 5


@pytest.fixture
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path) as deployment:
        deployment.enrol(CLIENT)
        yield deployment


def start_client(deployment: Deployment, gate: Gate, name: str = CLIENT) -> Process:
    options = ("--log-format", "json", "--log-level", "debug", "--data", f"gate={gate.port}", "--task-file", TASK_FILE)
    client = deployment.start("fedclient", "run", "--folder", deployment.home(name), *options)
    client.wait_for_event("connected")
    return client


def job_with(feedback: bool, **schedule: object) -> Job:
    uplink = [{"codec": "top-k", "fraction": 0.2}, {"codec": "rice"}]
    return parse_job(
        {
            "job": {"name": f"feedback-{feedback}", "rounds": ROUNDS, "seed": 7},
            "task": {"name": "gated"},
            "training": {"learning_rate": 0.1},
            "compression": {"uplink": uplink, "error_feedback": {} if feedback else None},
            "schedule": {"cohort": 1, **schedule},
        },
        "job",
    )


def undisturbed(deployment: Deployment, gate: Gate, *, feedback: bool) -> list[tuple[object, ...]]:
    with gate.opened():
        return bytes_of(deployment.finish(deployment.submit(job_with(feedback))))


def test_a_client_killed_after_it_kept_the_rest_and_a_server_killed_after_it_counted_change_no_byte(
    deployment: Deployment, gate: Gate
) -> None:
    client = start_client(deployment, gate)
    job_id = deployment.submit(job_with(feedback=True))
    gate.wait_for_client().release()  # version 0

    held = gate.wait_for_client()
    deployment.server.send(signal.SIGSTOP)  # so that nothing of the update can arrive
    held.release()
    client.wait_for_event("residual kept", job=job_id, version=1)
    client.kill()
    deployment.server.send(signal.SIGCONT)
    client = start_client(deployment, gate)
    gate.wait_for_client().release()  # version 1 again

    held = gate.wait_for_client()
    deployment.server.kill()
    held.release()  # trained while nobody is there
    client.wait_for_event("residual kept", job=job_id, version=2)
    deployment.start_server()

    held = gate.wait_for_client()  # version 3, assigned by a server that has its knowledge from the journal
    client.kill()
    deployment.server.kill()
    deployment.start_server()
    start_client(deployment, gate)
    with gate.opened():
        disturbed = bytes_of(deployment.finish(job_id))

    assert disturbed == undisturbed(deployment, gate, feedback=True)
    assert disturbed != undisturbed(deployment, gate, feedback=False), "nothing was fed back"
    kept = sorted(path.name for path in (deployment.home(CLIENT) / "residuals").glob(f"{job_id}.*"))
    assert kept == [f"{job_id}.{ROUNDS - 2}", f"{job_id}.{ROUNDS - 1}"]


def test_an_update_in_a_round_that_is_abandoned_takes_nothing_away(deployment: Deployment, gate: Gate) -> None:
    job = job_with(feedback=True, cohort=2, quorum=2)
    start_client(deployment, gate)
    with gate.opened(), open_gate() as others:
        deployment.enrol(OTHER)
        other = start_client(deployment, others, OTHER)
        job_id = deployment.submit(job)
        others.wait_for_client().release()  # version 0

        held = others.wait_for_client()
        deployment.wait_for(job_id, lambda state: (state["version"], state["accepted"]) == (1, 1))
        other.send(signal.SIGTERM)
        held.release()
        assert other.wait() == 0
        deployment.server.wait_for_event("abandoned", job=job_id, kind="train", version=1)

        start_client(deployment, others, OTHER)
        with others.opened():
            disturbed = bytes_of(deployment.finish(job_id))
            assert disturbed == bytes_of(deployment.finish(deployment.submit(job)))


def test_a_client_whose_disk_takes_no_rest_declines_and_says_why(deployment: Deployment, gate: Gate) -> None:
    in_the_way = deployment.home(CLIENT) / "residuals"
    in_the_way.write_text("no folder can be made here")
    client = start_client(deployment, gate)
    job_id = deployment.submit(job_with(feedback=True, deadline_s=10.0, max_retries=1_000_000))
    with gate.opened():
        reason = str(client.wait_for_event("assignment declined")["reason"])
        assert "cannot prepare the folder" in reason
        assert deployment.server.wait_for_event("declined", job=job_id)["reason"] == reason
        in_the_way.unlink()  # after the deadline it is asked again, in the same session
        disturbed = bytes_of(deployment.finish(job_id))
    assert disturbed == undisturbed(deployment, gate, feedback=True)

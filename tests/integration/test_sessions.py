"""`fedclient run` as a process: across a server's restart, at its own end, with its owner's task, with wrong data."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.jobfile import Job, load_job, parse_job
from fedcore.messages import WorkKind
from fedserver.state.sqlite import SqliteStore
from tests.support.gate import TASK_FILE, Gate, open_gate
from tests.support.processes import Deployment, Process, deployed, digits_job, run

OWN_TASK = Path(__file__).parents[2] / "examples" / "own_task"
FOREVER = 10_000


def gated_job(name: str, rounds: int, local_epochs: int = 1) -> Job:
    return parse_job(
        {
            "job": {"name": name, "rounds": rounds},
            "task": {"name": "gated"},
            "training": {"local_epochs": local_epochs},
            "schedule": {"cohort": 1, "deadline_s": 120.0},
        },
        name,
    )


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("gated")) as deployment:
        yield deployment


@pytest.fixture
def gated(federation: Deployment, gate: Gate) -> Iterator[Deployment]:
    """A server without jobs and one client, which trains when the test says so."""
    start_gated(federation, gate)
    yield federation
    federation.clients["client"].discard()
    with federation.operator() as server:
        for job in server.status()["jobs"]:
            if job["status"] == "running":
                server.stop(job["job_id"])


def start_gated(deployment: Deployment, gate: Gate) -> Process:
    client = deployment.start_client("client", {"gate": gate.port}, [TASK_FILE])
    client.wait_for_event("connected")
    return client


def test_a_client_finishes_its_training_across_a_servers_outage(gated: Deployment, gate: Gate) -> None:
    client = gated.clients["client"]
    job_id = gated.submit(gated_job("outage", rounds=2))

    # The server goes and comes while the client trains.
    held = gate.wait_for_client()
    gated.server.kill()
    gated.start_server()
    client.wait_for_event("connected", count=2)
    held.release()
    held.wait_until_trained()
    client.wait_for_event("update counted", kind="train", version=0)

    # The server goes, the client is done with its training, the server comes.
    held = gate.wait_for_client()
    gated.server.kill()
    held.release()
    held.wait_until_trained()
    gated.start_server()
    client.wait_for_event("update counted", kind="train", version=1)

    history = gated.finish(job_id)
    assert [row["num_updates"] for row in history] == [1, 1, 1]
    for version in (0, 1):
        assert len(client.events("assignment", kind="train", version=version)) == 1, "trained twice for one round"
    assert not client.events("update rejected")
    assert client.stop() == 0, client.story()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_training_at_its_next_step_and_leaves_nothing(
    gated: Deployment, gate: Gate, number: signal.Signals, code: int
) -> None:
    client = gated.clients["client"]
    kept = sorted(path.name for path in gated.home("client").iterdir())
    around = sorted(path.name for path in gated.folder.iterdir())
    job_id = gated.submit(gated_job("endless", rounds=1, local_epochs=FOREVER))
    gate.wait_for_client().release()
    client.send(number)
    # Far less than that training would take.
    assert client.wait(deadline_s=10) == code, client.story()
    assert client.out == []
    declined = gated.server.wait_for_event("declined", job=job_id)
    assert "shutting down" in declined["reason"]
    with gated.operator() as server:
        assert server.status()["clients"]["connected"] == 0
    assert sorted(path.name for path in gated.home("client").iterdir()) == kept
    assert sorted(path.name for path in gated.folder.iterdir()) == around


def test_a_second_signal_ends_a_client_whose_task_does_not_stop(gated: Deployment, gate: Gate) -> None:
    client = gated.clients["client"]
    gated.submit(gated_job("deaf", rounds=1))
    gate.wait_for_client()  # and it is never let go
    client.send(signal.SIGTERM)
    client.wait_for_event("stopping")
    assert client.is_running
    assert client.stop(deadline_s=10) == 0, client.story()


def test_a_client_that_stopped_gets_new_work_when_it_is_back(gated: Deployment, gate: Gate) -> None:
    job_id = gated.submit(gated_job("back", rounds=1))
    held = gate.wait_for_client()
    client = gated.clients["client"]
    client.send(signal.SIGTERM)
    client.wait_for_event("stopping")
    held.release()
    assert client.wait() == 0, client.story()
    start_gated(gated, gate)
    gate.wait_for_client().release()
    history = gated.finish(job_id)
    assert [row["num_updates"] for row in history] == [1, 1]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three clients with a task of their own, and one without it whose data option for the digits is wrong."""
    with deployed(tmp_path_factory.mktemp("mixed")) as deployment:
        for shard in range(3):
            data = {"shard": shard, "num_shards": 3}
            deployment.start_client(f"client-{shard + 1}", data, [OWN_TASK / "task.py"])
        deployment.start_client("wrong", {"shard": 9, "num_shards": 3})
        for client in deployment.clients.values():
            client.wait_for_event("connected")
        yield deployment


def test_a_task_from_a_file_runs_through_the_daemon_and_the_simulator(mixed: Deployment, tmp_path: Path) -> None:
    job_file = OWN_TASK / "job.toml"
    history = mixed.finish(mixed.submit(load_job(job_file)))
    assert history[-1]["evaluation"]["accuracy"] > history[0]["evaluation"]["accuracy"]
    simulated = run(
        *("fedsim", "run", job_file, "--clients", "3", "--no-pooled", "--json"),
        *("--task-file", OWN_TASK / "task.py"),
        folder=tmp_path,
    )
    assert simulated.wait() == 0, simulated.story()
    assert json.loads(simulated.out[-1])["model_sha256"] == history[-1]["sha256"]


def test_a_client_without_the_task_is_never_asked(mixed: Deployment) -> None:
    job_id = mixed.submit(load_job(OWN_TASK / "job.toml"))
    history = mixed.finish(job_id)
    assert [row["num_updates"] for row in history[1:]] == [3] * (len(history) - 1)
    for name, client in mixed.clients.items():
        assert bool(client.events("assignment", job=job_id)) == (name != "wrong")


def test_wrong_data_is_a_reason_to_decline_and_the_others_go_on_at_once(mixed: Deployment) -> None:
    job = digits_job("one-is-wrong", cohort=4, rounds=2, schedule={"quorum": 3, "deadline_s": 600.0})
    job_id = mixed.submit(job)
    history = mixed.finish(job_id, deadline_s=30)  # not the 600 s for which the server would wait for somebody
    assert [row["num_updates"] for row in history[1:]] == [3, 3]
    declined = mixed.server.wait_for_event("declined", job=job_id)
    assert declined["client"] == "wrong"
    assert "shard 9 does not exist" in declined["reason"]
    assert mixed.clients["wrong"].is_running, "one job that it cannot do is no reason to leave"
    mixed.server.kill()
    store = SqliteStore(mixed.state / "store.sqlite")
    try:
        rows = [
            row for kind in WorkKind for row in store.assignments(job_id, 0, 0, kind)
        ]  # whichever it was given first
        (journaled,) = [row for row in rows if row.client == "wrong"]
    finally:
        store.close()
    assert (journaled.ended, journaled.text) == ("declined", declined["reason"])

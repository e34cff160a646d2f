"""Several jobs in one daemon, and the operator's commands that follow and stop them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from fedsim.simulation import make_clients, simulate
from tests.support.processes import Deployment, bytes_of, deployed, digits_job, run

NUM_CLIENTS = 3


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("jobs")) as deployment:
        yield deployment


def test_a_watch_says_whom_a_job_waits_for_and_ends_with_it(deployment: Deployment) -> None:
    job = digits_job("watched")
    job_id = deployment.submit(job)
    watches = [
        deployment.start("fedserver", "status", "watched", "--watch", "--folder", deployment.state, *options)
        for options in ([], ["--json"])
    ]
    text, as_json = watches
    for watch in watches:
        watch.wait_for_line("watched")
    deployment.start_digits_clients(NUM_CLIENTS)
    for watch in watches:
        assert watch.wait() == 0, watch.story()

    assert any("making version 0: waits for 1 client" in line for line in text.out), text.story()
    assert "finished" in text.out[-1]
    states = [json.loads(line) for line in as_json.out]
    assert states[0]["clients"] == {"connected": 0, "enrolled": 0}
    first, last = states[0]["jobs"][0], states[-1]["jobs"][0]
    assert (first["job_id"], first["status"]) == (job_id, "running")
    assert first["waiting_for"] == {"what": "clients", "missing": 1, "clients": []}
    assert (last["status"], last["version"]) == ("finished", job.job.rounds)
    assert last["evaluated"]["version"] == job.job.rounds


def test_a_watch_sits_out_a_restart_of_the_server(deployment: Deployment) -> None:
    job_id = deployment.submit(digits_job("outlived", cohort=NUM_CLIENTS + 1))
    watch = deployment.start("fedserver", "status", "outlived", "--watch", "--folder", deployment.state)
    # Version 0 needs one client only; for the first round there is one too few.
    watch.wait_for_line("waits for 1 client")
    deployment.server.kill()
    deployment.start_server()
    with deployment.operator() as server:
        assert server.stop(job_id).status == "stopped"
    assert watch.wait() == 10, watch.story()
    assert "trying again" in "\n".join(watch.err)
    assert "stopped by an operator" in watch.out[-1] + watch.err[-1]


def test_two_jobs_at_once_give_each_the_bytes_that_it_has_alone(deployment: Deployment) -> None:
    jobs = [
        digits_job("one", rounds=4),
        digits_job(
            "other", rounds=3, job={"name": "other", "rounds": 3, "seed": 11}, adapter={"name": "full"}, cohort=3
        ),
    ]
    ids = [deployment.submit(job) for job in jobs]
    histories = [deployment.finish(job_id) for job_id in ids]
    turns = [
        entry["job"]
        for entry in deployment.server.events("assigned")
        if entry["job"] in ids and entry["kind"] == "train"
    ]
    assert turns != sorted(turns, key=ids.index), "one job ran after the other, so this shows nothing"
    for job, history in zip(jobs, histories, strict=True):
        alone = asyncio.run(simulate(job, make_clients(job, NUM_CLIENTS, {})))
        assert bytes_of(history) == bytes_of(alone.history)


def test_a_job_can_be_stopped_and_keeps_what_it_has(deployment: Deployment) -> None:
    job_id = deployment.submit(digits_job("long", rounds=100_000))
    submitted = deployment.wait_for(job_id, lambda job: bool(job["version"] and job["version"] >= 2))
    stopped = run("fedserver", "stop", "long", "--folder", deployment.state, "--json")
    assert stopped.wait() == 0, stopped.story()
    assert json.loads(stopped.out[-1]) == {"job_id": job_id, "status": "stopped"}
    after = deployment.status(job_id)
    assert (after["status"], after["failure"]) == ("stopped", "stopped by an operator")
    assert after["version"] >= submitted["version"]
    assert deployment.history(job_id)[-1]["version"] == after["version"]
    watch = run("fedserver", "status", "long", "--watch", "--folder", deployment.state)
    assert watch.wait() == 10, watch.story()
    # The clients are free for the next job, and the stopped one stays stopped.
    deployment.finish(deployment.submit(digits_job("next", rounds=1)))
    deployment.server.kill()
    deployment.start_server()
    assert deployment.status(job_id)["status"] == "stopped"


def test_a_job_is_named_by_the_start_of_its_id_too_and_an_unknown_one_is_not_found(deployment: Deployment) -> None:
    job_id = deployment.submit(digits_job("named", cohort=50))
    stopped = run("fedserver", "stop", job_id[:8], "--folder", deployment.state)
    assert stopped.wait() == 0, stopped.story()
    unknown = run("fedserver", "stop", "unheard-of", "--folder", deployment.state)
    assert unknown.wait() == 4
    assert "unheard-of" in unknown.err[-1]
    assert "Traceback" not in unknown.story()

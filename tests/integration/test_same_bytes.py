"""One job, one seed: the daemon with client processes and the simulator give the same model bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.jobfile import Job
from fedsim.simulation import make_clients, simulate
from tests.support.processes import Deployment, bytes_of, deployed, digits_job, run

NUM_CLIENTS = 3
BF16 = [{"codec": "bf16"}]
TENTH = [{"codec": "top-k", "fraction": 0.1}, {"codec": "bf16"}, {"codec": "rice"}]
JOBS = {
    job.job.name: job
    for job in (
        digits_job("plain"),
        digits_job(
            "adam-bf16", server_optimizer={"name": "adam"}, compression={"uplink": BF16, "downlink": BF16}, rounds=3
        ),
        digits_job(  # whoever is left out of a round has something left from the one before
            "feedback", cohort=2, rounds=5, compression={"uplink": TENTH, "error_feedback": {"decay": 0.9}}
        ),
        digits_job("fed-sb", adapter={"name": "lora-sb", "rank": 4, "dropout": 0.1}, rounds=3),
        digits_job("fed-sb-votes", adapter={"name": "lora-sb", "rank": 4, "votes": True}, compression={"uplink": BF16}),
        digits_job("ffa", adapter={"name": "ffa-lora", "rank": 4}, server_optimizer={"name": "adam"}),
        digits_job("two-of-three", cohort=2, rounds=3, adapter={"name": "full"}, server_optimizer={"name": "momentum"}),
    )
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("same-bytes")) as deployment:
        deployment.start_digits_clients(NUM_CLIENTS)
        yield deployment


@pytest.mark.parametrize("job", JOBS.values(), ids=lambda job: job.job.name)
def test_the_daemon_and_the_simulator_agree_on_every_version(deployment: Deployment, job: Job) -> None:
    job_id = deployment.submit(job)
    deployed_history = deployment.finish(job_id)
    simulated = asyncio.run(simulate(job, make_clients(job, NUM_CLIENTS, {})))
    assert [row["version"] for row in deployed_history] == list(range(job.job.rounds + 1))
    assert len({row["sha256"] for row in deployed_history}) == job.job.rounds + 1, "training changed nothing"
    assert bytes_of(deployed_history) == bytes_of(simulated.history)
    with deployment.operator() as server:
        newest = server.version(job_id)
        assert server.read_version(newest) == simulated.state
    assert newest.basis_sha256 == simulated.version.basis_blob
    assert (newest.basis_sha256 is None) == (job.adapter.name in {"lora", "full"})


def test_a_second_run_on_the_same_clients_gives_the_same_bytes_again(deployment: Deployment) -> None:
    job = JOBS["plain"]
    first, second = (deployment.finish(deployment.submit(job)) for _ in range(2))
    assert bytes_of(first) == bytes_of(second)


def test_the_commands_end_with_the_same_model(deployment: Deployment, tmp_path: Path) -> None:
    job_file = tmp_path / "job.toml"
    job_file.write_text(
        '[job]\nname = "commands"\nrounds = 2\nseed = 7\n[task]\nname = "digits"\n'
        '[adapter]\nname = "lora"\nrank = 4\n[schedule]\ncohort = 3\nquorum = 3\n'
    )
    submitted = run("fedserver", "submit", job_file, "--folder", deployment.state, "--wait", "--json")
    assert submitted.wait() == 0, submitted.story()
    simulated = run("fedsim", "run", job_file, "--clients", str(NUM_CLIENTS), "--no-pooled", "--json", folder=tmp_path)
    assert simulated.wait() == 0, simulated.story()
    (job,) = json.loads(submitted.out[-1])["jobs"]
    assert job["status"] == "finished"
    assert json.loads(simulated.out[-1])["model_sha256"] == job["latest"]["sha256"]

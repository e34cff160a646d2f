"""A client whose base model differs in one bit takes no part, says why, and holds nobody up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.jobfile import Job, parse_job
from tests.support.processes import Deployment, Process, deployed, run

TASK_FILE = Path(__file__).parents[1] / "support" / "flipped_task.py"
JOB = """\
[job]
name = "{name}"
rounds = 1
seed = 3
{pin}
[task]
name = "flipped"

[adapter]
name = "lora"
rank = 2

[schedule]
cohort = 2
quorum = 2
deadline_s = 120
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("bases")) as deployment:
        yield deployment


def digest_of(file: Path, *options: str) -> str:
    found = run("fedclient", "base", file, "--task-file", TASK_FILE, "--json", *options)
    assert found.wait() == 0, found.story()
    answer = json.loads(found.out[-1])
    assert answer["path"] == str(file)
    return str(answer["base_digest"])


def start(deployment: Deployment, name: str, flip: int = -1) -> Process:
    client = deployment.start_client(name, {"flip": flip}, [TASK_FILE])
    client.wait_for_event("connected")
    return client


def submit(deployment: Deployment, file: Path) -> str:
    submitted = run("fedserver", "submit", file, "--folder", deployment.state)
    assert submitted.wait() == 0, submitted.story()
    return submitted.out[-1]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_one_bit_is_one_too_many(deployment: Deployment, tmp_path: Path, is_pinned: bool) -> None:
    file, name = tmp_path / "job.toml", "pinned" if is_pinned else "first-decides"
    file.write_text(JOB.format(name=name, pin=""))
    right, wrong = digest_of(file), digest_of(file, "--data", "flip=200")
    assert right != wrong
    if is_pinned:
        file.write_text(JOB.format(name=name, pin=f'base_digest = "{right}"'))
    job_id = submit(deployment, file)
    # Pinned, it is found before it makes version 0; else with the first work after somebody else has.
    clients = []
    if not is_pinned:
        clients.append(start(deployment, f"ann-{name}"))
        deployment.wait_for(job_id, lambda job: job["version"] == 0)
    clients.append(start(deployment, f"odd-{name}", flip=200))
    declined = deployment.server.wait_for_event("declined", job=job_id)
    clients += [start(deployment, f"{other}-{name}") for other in (["ann", "berta"] if is_pinned else ["berta"])]

    assert declined["client"] == f"odd-{name}"
    assert wrong in declined["reason"]
    assert right in declined["reason"]
    assert "use the same revision of the model's files" in declined["reason"]
    history = deployment.finish(job_id)
    assert [row["num_updates"] for row in history] == [1, 2]
    assert deployment.status(job_id)["base_digest"] == right
    assert len(deployment.server.events("declined", job=job_id)) == 1
    for process in clients:
        process.stop()

    exported = run("fedserver", "export", job_id, "--out", tmp_path / "out", "--folder", deployment.state)
    assert exported.wait() == 0, exported.story()
    assert right in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_who_pins_what_nobody_has_gets_no_version(deployment: Deployment, tmp_path: Path) -> None:
    job: Job = parse_job(
        {
            "job": {"name": "nobodys", "rounds": 1, "base_digest": "ab" * 32},
            "task": {"name": "flipped"},
            "adapter": {"name": "full"},
            "schedule": {"cohort": 1},
        },
        "job",
    )
    job_id = deployment.submit(job)
    client = start(deployment, "cleo")
    declined = deployment.server.wait_for_event("declined", job=job_id)
    assert "nothing is frozen of this client's" in declined["reason"]
    assert deployment.status(job_id)["base_digest"] == "ab" * 32
    with deployment.operator() as server:
        server.stop(job_id)
    client.stop()

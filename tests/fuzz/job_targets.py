"""Job files, as people write them and as they cross the wire."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedcore.errors import JobFileError
from fedcore.jobfile import MAX_JOB_BYTES, Job, load_job, parse_job
from fedserver.cli.toml_text import toml_text
from fedserver.rounds.plan import make_plan
from tests.fuzz.target import BOMBS, Target, check_refusal, scratch_folder
from tests.support.exports import make_job

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
FILE: Final = scratch_folder() / "job.toml"


def read_toml(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        job = load_job(FILE)
    except JobFileError as error:
        check_refusal(error)
        return
    check_job(job)
    assert parse_job(tomllib.loads(toml_text(job.model_dump(mode="json"))), "toml") == job


def read_json(data: bytes) -> None:
    try:
        job = Job.from_json(data)
    except JobFileError as error:
        check_refusal(error)
        return
    check_job(job)


def check_job(job: Job) -> None:
    written = job.to_json()
    assert len(written) <= MAX_JOB_BYTES
    assert Job.from_json(written) == job
    assert Job.from_json(written).to_json() == written
    if job.privacy is not None and job.privacy.epsilon is not None:
        return  # what a budget allows takes seconds to find
    try:
        plan = make_plan(job, "job")
    except JobFileError as error:
        check_refusal(error)
        return
    assert make_plan(plan.job, "job").job == plan.job
    assert plan.job == job or job.compression.preset is not None


def toml_files() -> Iterator[bytes]:
    for path in sorted(EXAMPLES.rglob("*.toml")):
        yield path.read_bytes()
    yield b'[job]\nname = "a"\nrounds = 1\n[task]\nname = "b"\nx = [1, 2.5, {y = "\\u00e9"}, 1979-05-27, inf]\n'
    yield b'[job]\nname = "a"\n[task]\nname = "b"\n[schedule]\ncohort = 3\nquorum = 4\nunknown = 0x10\n'
    yield from (b"[task]\nx = " + bomb for bomb in BOMBS)


def json_texts() -> Iterator[bytes]:
    yield make_job().to_json()
    yield make_job(
        compression={"uplink": [{"codec": "bf16"}], "downlink": [{"codec": "raw"}]},
        server_optimizer={"name": "adam", "learning_rate": 0.5},
        training={"optimizer": "sgd", "max_grad_norm": 1.0},
        aggregator={"rule": "weighted-mean", "max_abs": 2.0},
    ).to_json()
    yield b'{"job":{"name":"a","rounds":1},"task":{"name":"b","x":[NaN,"\\ud800"]},"schedule":{"cohort":1}}'
    yield from BOMBS


TARGETS: Final = (
    Target("job-toml", read_toml, toml_files, max_bytes=1 << 14, runs=5_000),
    Target("job-json", read_json, json_texts, max_bytes=MAX_JOB_BYTES + 1),
)

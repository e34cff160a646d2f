"""`fedsim compare` as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.processes import run

JOB = """
[job]
name = "{name}"
rounds = 2
seed = 7
[task]
name = "digits"
{task}
[adapter]
name = "lora"
rank = 64
targets = ["hidden*"]
alpha = 128
[training]
learning_rate = 0.003
[compression]
preset = "{preset}"
[schedule]
cohort = 2
deadline_s = 5
max_retries = 0
"""
KEYS = {
    "job",
    "final_accuracy",
    "final_loss",
    "uplink_bytes",
    "raw_uplink_bytes",
    "relative_error",
    "epsilon",
    "downlink_bytes",
    "ratio",
    "rounds",
}
NUM_VALUES = 64 * (64 + 128 + 128 + 128)  # both factors of both hidden layers
HEADERS = 2000
"""More bytes than an update's header and signature have."""


def write(folder: Path, name: str, preset: str, task: str = "") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(JOB.format(name=name, preset=preset, task=task), encoding="utf-8")
    return path


def test_jobs_are_compared_by_what_they_sent_and_reached(tmp_path: Path) -> None:
    files = [write(tmp_path, name, name) for name in ("none", "fedzip")]
    out = tmp_path / "out"
    done = run("fedsim", "compare", *files, "--out", out, "--clients", "3", "--json")
    assert done.wait() == 0, done.story()
    plain, packed = json.loads(done.out[0])
    assert plain.keys() >= KEYS
    assert plain.keys() == packed.keys()
    assert [row["job"] for row in (plain, packed)] == ["none", "fedzip"]
    assert [row["clients"] for row in (plain, packed)] == [3, 3]

    raw_bytes = 4 * NUM_VALUES * 2 * 2  # two updates for each of two versions
    first_bytes = 4 * NUM_VALUES  # version 0 is never encoded
    assert plain["raw_uplink_bytes"] == packed["raw_uplink_bytes"] == raw_bytes
    assert raw_bytes + first_bytes < plain["uplink_bytes"] < raw_bytes + first_bytes + 8 * HEADERS
    assert first_bytes < packed["uplink_bytes"] < raw_bytes / 30 + first_bytes + 8 * HEADERS
    assert packed["ratio"] == raw_bytes / packed["uplink_bytes"]
    assert (plain["relative_error"], 0 < packed["relative_error"] < 1) == (0.0, True)
    assert plain["model_sha256"] != packed["model_sha256"]

    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for row in (plain, packed):
        assert (out / row["job"] / "adapter_model.safetensors").is_file()
        summary = json.loads((out / f"{row['job']}.json").read_text(encoding="utf-8"))
        assert row == {"job": row["job"], "seed": 7, **summary}


def test_a_job_that_fails_does_not_lose_the_others_results(tmp_path: Path) -> None:
    files = [write(tmp_path, "bad", "none", task='partition = { kind = "odd" }'), write(tmp_path, "good", "int8")]
    out = tmp_path / "out"
    done = run("fedsim", "compare", *files, "--out", out, "--seeds", "2", "--log-level", "error")
    assert done.wait() == 10, done.story()
    heading, line, plot = done.out
    assert heading.startswith("job ")
    assert re.fullmatch(r"good +2 +\d+\.\d% \(.*% to .*%\) .*", line)
    assert plot == f"plot: {out / 'comparison.png'}"
    errors = [line for line in done.err if line.startswith("error: ")]
    assert [line.partition(" gave up")[0] for line in errors] == [
        f"error: bad, seed {seed}: job 'bad' failed:" for seed in (7, 8)
    ]
    assert sorted(path.parent.parent.name for path in out.glob("*/good/adapter_model.safetensors")) == [
        "seed-7",
        "seed-8",
    ]


@pytest.mark.parametrize("presets", [("none", "none"), ("none", "rqm")])
def test_jobs_that_cannot_be_compared_are_refused_before_any_runs(tmp_path: Path, presets: tuple[str, str]) -> None:
    first, second = (tmp_path / str(number) for number in range(2))
    files = []
    for folder, preset in zip((first, second), presets, strict=True):
        folder.mkdir()
        files.append(write(folder, "same" if presets[1] == "none" else preset, preset))
    done = run("fedsim", "compare", *files, "--out", tmp_path / "out")
    assert done.wait() == 3, done.story()
    assert [line[:7] for line in done.err] == ["error: "]
    assert not (tmp_path / "out").exists()

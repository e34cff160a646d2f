"""`fedsim run --adapter`: the federation and its pooled bound start from the same values."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsim.cli import app
from tests.support.adapters import factors, write_adapter

SIDES = {"hidden1": (128, 64), "hidden2": (128, 128)}
JOB = """\
[job]
name = "given"
rounds = 1
[task]
name = "digits"
[adapter]
name = "{name}"
rank = 2
alpha = 8.0
targets = ["hidden*"]
[training]
learning_rate = 1e-12
[schedule]
cohort = 2
"""


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def summary(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    file = tmp_path / "job.toml"
    file.write_text(JOB.format(name=name))
    done = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "out"), "--json", *options])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["lora", "ffa-lora"])
def test_who_learns_nothing_begins_and_ends_as_good_as_the_adapter_is(tmp_path: Path, name: str) -> None:
    plain = summary(tmp_path, name)
    found = summary(tmp_path, name, "--adapter", str(write_adapter(tmp_path / "adapter", factors(SIDES))))
    for each in (plain, found):
        assert each["final_accuracy"] == each["pooled_accuracy"] == each["base_accuracy"]
    assert found["final_accuracy"] != plain["final_accuracy"]

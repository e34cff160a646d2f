"""The adapter in examples/, installed as its README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.processes import command

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_adapter"


@pytest.mark.slow
def test_an_installed_adapter_is_found_by_its_name_and_trains(tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--target"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, site, EXAMPLE], check=True)
    path = os.pathsep.join([str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    arguments = ["run", "examples/own_adapter/job.toml", "--clients", "3", "--no-pooled", "--json", "--out"]
    done = subprocess.run(
        [command("fedsim"), *arguments, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 8
    (file,) = (tmp_path / "out").rglob("model.safetensors")
    tensors = load_file(file)
    assert {name: value.shape for name, value in tensors.items()} == {
        "hidden1.scale": (128,),
        "hidden2.scale": (128,),
        "output.scale": (10,),
    }
    assert all(abs(value - 1).max() > 0.05 for value in tensors.values())


def test_it_is_as_short_as_is_said() -> None:
    assert len((EXAMPLE / "ia3.py").read_text().splitlines()) <= 40
    assert re.search(r'^ia3 = "ia3:Ia3"$', (EXAMPLE / "pyproject.toml").read_text(), re.MULTILINE)

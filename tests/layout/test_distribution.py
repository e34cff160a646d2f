"""What a user installs: the wheel is complete, and wheel and editable install import."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NAMES = [Path(path).name for path in PACKAGES]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = out.glob("*.whl")
    return path


def import_everything(code: str, cwd: Path) -> dict[str, Path]:
    """Import the packages in a fresh interpreter, return the folder that each one came from."""
    lines = "".join(f"import {name}; print({name}.__path__[0])\n" for name in NAMES)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + lines], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.stderr == "", "is Roundtable installed in this environment? (make venv)"
    return dict(zip(NAMES, map(Path, done.stdout.splitlines()), strict=True))


def test_the_wheel_carries_every_file_of_every_package(wheel: Path) -> None:
    expected = {
        f"{Path(package).name}/{path.relative_to(ROOT / package).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    folders = import_everything(f"import sys; sys.path.insert(0, {str(site)!r})\n", tmp_path)
    assert folders == {name: site / name for name in NAMES}


def test_the_editable_install_imports_from_the_working_tree(tmp_path: Path) -> None:
    folders = import_everything("", tmp_path)
    assert folders == {Path(package).name: ROOT / package for package in PACKAGES}


@pytest.mark.parametrize("script", PYPROJECT["project"]["scripts"])
def test_every_command_has_its_function(script: str) -> None:
    module, _, function = PYPROJECT["project"]["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_constraints_pin_every_dependency_exactly_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    declared = {
        re.sub(r"[-_.]+", "-", name.group()).lower()
        for requirement in [
            *PYPROJECT["project"]["dependencies"],
            *(line for extra in extras for line in extra),
        ]
        if (name := re.match(r"[A-Za-z0-9._-]+", requirement))
    } - {"roundtable"}
    assert sorted(declared - pinned) == []
    assert "torch==2.13.0" in lines

"""The shape of the house: which folders are packages and which are source roots."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("aggregators", "compression", "proto")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / path for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


@pytest.mark.parametrize("name", SOURCE_ROOTS)
def test_a_source_root_holds_exactly_one_package_and_no_module_of_its_own(name: str) -> None:
    packages = [path.name for path in (ROOT / name).iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(packages) == 1
    assert packages[0].startswith("fed")
    # An __init__.py here would make `compression` importable, and Python 3.14's gzip imports that name.
    assert list((ROOT / name).glob("*.py*")) == []


def test_the_standard_library_compresses_when_python_starts_at_the_root() -> None:
    code = "import gzip, bz2, lzma; print(gzip.decompress(gzip.compress(b'ok')).decode())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("ok\n", "")


def test_no_test_is_called_compression() -> None:
    assert [path for path in (ROOT / "tests").rglob("*") if path.stem == "compression"] == []


def test_test_folders_are_not_packages_and_file_names_are_unique() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert [path for path in files if path.name == "__init__.py"] == []
    names = [path.name for path in files]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_fed_package_is_named_in_pyproject() -> None:
    parents = [ROOT, *(ROOT / name for name in SOURCE_ROOTS)]
    found = {path for parent in parents for path in parent.glob("fed*") if path.is_dir()}
    assert found == set(PACKAGES)


def test_the_source_roots_are_on_the_path_of_every_tool() -> None:
    expected = {".", *SOURCE_ROOTS}
    assert set(PYPROJECT["tool"]["hatch"]["build"]["dev-mode-dirs"]) == expected
    # A script finds what lies beside it, so mypy has to find the parts of examples/demo.py too.
    assert set(PYPROJECT["tool"]["mypy"]["mypy_path"]) == {*expected, "examples"}
    assert set(PYPROJECT["tool"]["pytest"]["ini_options"]["pythonpath"]) == expected


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_is_typed_and_says_what_it_is(package: Path) -> None:
    assert (package / "py.typed").is_file()
    assert (package / "__init__.py").read_text().startswith('"""')


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_folder_with_modules_is_a_regular_package(package: Path) -> None:
    folders = {path.parent for path in package.rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file()) == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_module_is_longer_than_400_lines(package: Path) -> None:
    modules = [path for path in package.rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules}
    assert {name: length for name, length in lengths.items() if length > 400} == {}

"""Nothing in the packages may turn bytes into code: no pickle in any disguise, no eval, no unsafe yaml."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
FOLDERS = [*WHEEL["packages"], "examples", "scripts"]

BANNED_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "_pickle"}
BANNED_CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "compile",
    "__import__",
}


def unsafe_imports(tree: ast.Module) -> Iterator[str]:
    """Yield `line: what` for each import of a banned module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.split(".")[0] in BANNED_MODULES:
                yield f"{getattr(node, 'lineno', 0)}: import {module}"


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for: `t` -> `torch`, `load` -> `torch.load`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unsafe_uses(source: str) -> Iterator[str]:
    """Yield `line: what` for each banned import or use in `source`."""
    tree = ast.parse(source)
    yield from unsafe_imports(tree)
    names = imported_names(tree)

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        # Naming one is enough: `loader = torch.load` would hide the call.
        if isinstance(node, ast.Attribute | ast.Name) and full_name(node) in BANNED_CALLS:
            yield f"{node.lineno}: {full_name(node)}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            if not refused:
                yield f"{node.lineno}: allow_pickle"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_can_turn_bytes_into_code(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): uses
        for path in (ROOT / folder).rglob("*.py")
        if (uses := list(unsafe_uses(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as harmless",
        "import dill.session",
        "def f():\n    import marshal",
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.load",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader)",
        "eval('1')",
        "exec(text)",
    ],
)
def test_the_guard_sees(source: str) -> None:
    assert list(unsafe_uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import yaml\nyaml.safe_load(t)",
        "np.load(p, allow_pickle=False)",
    ],
)
def test_the_guard_lets_pass(source: str) -> None:
    assert list(unsafe_uses(source)) == []

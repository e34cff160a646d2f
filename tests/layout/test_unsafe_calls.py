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

BANNED_MODULES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "runpy", "shelve", "_pickle"}
BANNED_CALLS = {
    "torch.package.PackageImporter",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "pandas.read_pickle",
    "eval",
    "exec",
    "compile",
    "__import__",
    "importlib.__import__",
}
# Whatever of torch is called load reads a pickle: torch.load, torch.jit.load, torch.hub.load, torch.serialization.load.
BANNED_ENDINGS = {"torch": ".load"}
# These name code to run. Only who reads a table of our own or a file that the machine's owner has named may do so.
LOADERS = {"importlib.import_module", "importlib.util.spec_from_file_location"}
MAY_LOAD = {"fedcore/registry.py", "fedclient/tasks/files.py"}


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


def is_banned(name: str) -> bool:
    root, _, _ = name.partition(".")
    name = name.removeprefix("builtins.")
    return name in BANNED_CALLS | LOADERS or (root in BANNED_ENDINGS and name.endswith(BANNED_ENDINGS[root]))


def unsafe_uses(source: str) -> Iterator[str]:
    """Yield `line: what` for each banned import or use in `source`."""
    tree = ast.parse(source)
    yield from unsafe_imports(tree)
    names = imported_names(tree)

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        if isinstance(node, ast.Call) and len(node.args) > 1 and full_name(node.func) == "getattr":
            return f"{full_name(node.args[0])}.{ast.unparse(node.args[1])[1:-1]}"  # a constant without its quotes
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        # Naming one is enough: `loader = torch.load` would hide the call.
        if isinstance(node, ast.Attribute | ast.Name | ast.Call) and is_banned(full_name(node)):
            yield f"{node.lineno}: {full_name(node)}"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" or is_banned(f"{node.module}.{alias.name}"):
                    yield f"{node.lineno}: {node.module}.{alias.name}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            if not refused:
                yield f"{node.lineno}: allow_pickle"
        if isinstance(node, ast.Constant) and node.value == "allow_pickle":
            yield f"{node.lineno}: allow_pickle as a string"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_can_turn_bytes_into_code(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): uses
        for path in (ROOT / folder).rglob("*.py")
        if (uses := list(unsafe_uses(path.read_text())))
    }
    loading = {path: uses for path, uses in found.items() if path in MAY_LOAD}
    assert {path: uses for path, uses in found.items() if path not in MAY_LOAD} == {}
    assert all(use.endswith(tuple(LOADERS)) for uses in loading.values() for use in uses)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads as harmless",
        "import dill.session",
        "def f():\n    import marshal",
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.load",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader)",
        "from numpy import load\nload('x', allow_pickle=1)",
        "np.load('x', **{'allow_pickle': True})",
        "import torch.serialization\ntorch.serialization.load('x')",
        "from torch.jit import load as read\nread('x')",
        "import torch\ngetattr(torch, 'load')('x')",
        "from torch import *",
        "import joblib\njoblib.load('x')",
        "import yaml as y\ny.full_load(text)",
        "from yaml import load",
        "eval('1')",
        "exec(text)",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as run\nrun(text)",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as get\nget(name)",
        "import importlib.util\nimportlib.util.spec_from_file_location(name, path)",
    ],
)
def test_the_guard_sees(source: str) -> None:
    assert list(unsafe_uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "task.load()",
        "import json\njson.load(file)",
        "getattr(model, 'eval')()",
        "import re\nre.compile('x')",
        "import yaml\nyaml.safe_load(t)",
        "np.load(p, allow_pickle=False)",
    ],
)
def test_the_guard_lets_pass(source: str) -> None:
    assert list(unsafe_uses(source)) == []

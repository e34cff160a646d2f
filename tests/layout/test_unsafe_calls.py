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

# Each with all that is in it: a module with its functions, a class with its methods.
BANNED = {
    # what is a pickle, or unpickles
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "logging.config.listen",
    "marshal",
    "multiprocessing",
    "pandas.read_pickle",
    "pickle",
    "shelve",
    "torch.package",
    # what makes objects or code of text
    "builtins.__import__",
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "importlib.__import__",
    "logging.config.dictConfig",
    "logging.config.fileConfig",
    "runpy",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}
BUILTINS = {name.removeprefix("builtins.") for name in BANNED if name.startswith("builtins.")}
# Whatever of torch is called load reads a pickle: torch.load, torch.jit.load, torch.hub.load, torch.serialization.load.
BANNED_ENDINGS = {"torch": ".load"}
# These name code to run. Only who reads a table of our own or a file that the machine's owner has named may do so.
LOADERS = {
    "importlib.import_module",
    "importlib.machinery",
    "importlib.util.spec_from_file_location",
    "pkgutil",
    "sys.modules",
    "zipimport",
}
MAY_LOAD = {"fedcore/registry.py", "fedclient/tasks/files.py"}
# What of numpy has `allow_pickle`, and how many arguments come before that.
ARRAY_READERS = {"load": 2, "read_array": 1, "NpzFile": 2}


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
    parts = ["builtins", name] if name in BUILTINS else name.split(".")
    holders = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return bool(holders & (BANNED | LOADERS)) or name.endswith(BANNED_ENDINGS.get(parts[0], "\n"))


def may_allow_pickle(node: ast.AST, callee: str) -> bool:
    """Return whether `allow_pickle` is given: by its name, by its position, or in what is spread over arguments."""
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    if isinstance(node, ast.Constant):
        return node.value == "allow_pickle"
    parts = callee.split(".")
    if not isinstance(node, ast.Call) or parts[0] not in {"numpy", "np"} or parts[-1] not in ARRAY_READERS:
        return False
    is_spread = any(isinstance(part, ast.Starred) for part in node.args) or None in {word.arg for word in node.keywords}
    return is_spread or len(node.args) > ARRAY_READERS[parts[-1]]


def unsafe_uses(source: str) -> Iterator[str]:
    """Yield `line: what` for each banned import or use in `source`."""
    tree = ast.parse(source)
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
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if alias.name == "*" or is_banned(start + alias.name):
                    yield f"{node.lineno}: {start}{alias.name}"
        if may_allow_pickle(node, full_name(node.func) if isinstance(node, ast.Call) else ""):
            yield f"{getattr(node, 'lineno', 0)}: allow_pickle"


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
        "import numpy as np\nnp.load(p, None, True)",
        "import numpy as np\nnp.load(*arguments)",
        "import numpy as np\nnp.load(p, **options)",
        "import numpy\nnumpy.lib.format.read_array(f, True)",
        "from numpy.lib import format as npy\nnpy.read_array(f, True)",
        "from numpy.lib.format import read_array\nread_array(f, True)",
        "import numpy as np\nnp.lib.npyio.NpzFile(f, False, True)",
        "import multiprocessing.connection",
        "from multiprocessing import connection",
        "from multiprocessing.connection import Listener",
        "import multiprocessing as m\nm.connection.Client(address)",
        "import logging.config\nlogging.config.listen()",
        "from logging import config\nconfig.listen()",
        "from logging.config import listen",
        "import importlib.machinery",
        "from importlib.machinery import SourceFileLoader as Reader",
        "import importlib\nimportlib.machinery.SourceFileLoader(name, path)",
        "import sys\nsys.modules['pickle'].loads(data)",
        "from sys import modules",
        "import shelve",
        "import shelve as shelf, json\nshelf.open(path)",
        "from joblib import load",
        "import pandas as pd\npd.read_pickle(path)",
        "import pandas\npandas.read_pickle(path)",
        "from pandas import read_pickle as read",
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
        "np.load(p, None)",
        "numpy.lib.format.read_array(f)",
        "other.load(p, None, True)",
        "load(*arguments)",
        "import logging.config",
        "import sys\nsys.path",
        "import pandas\npandas.read_csv(path)",
        "import importlib.metadata\nimportlib.metadata.version(name)",
    ],
)
def test_the_guard_lets_pass(source: str) -> None:
    assert list(unsafe_uses(source)) == []

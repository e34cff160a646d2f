"""The server installs and runs with the base dependencies alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Runs in a fresh interpreter: every name of an extra is refused, then every module of the server is imported.
IMPORT_ALL = """
import importlib, pkgutil, sys

EXTRAS = {"bitsandbytes", "datasets", "dp_accounting", "grpc_tools", "hypothesis", "matplotlib", "opacus", "peft",
          "psutil", "pyarrow", "pytest", "scipy", "sklearn", "torch", "transformers", "yaml"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"{name} belongs to an extra", name=name)

sys.meta_path.insert(0, Refuse())
for name in ("fedcore", "fedcodec", "fedagg", "fedprivacy", "fedproto", "fedserver"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
import fedserver.cli, fedserver.daemon
print("torch" in sys.modules)
"""


def test_every_module_of_the_server_imports_without_the_extras() -> None:
    roots = [str(ROOT / name) for name in (".", "aggregators", "compression", "proto")]
    code = f"import sys; sys.path[:0] = {roots!r}\n{IMPORT_ALL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "False\n"

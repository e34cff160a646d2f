"""Make the peers' environment: `python benchmarks/peers/install.py`, once; the versions are pinned beside this file.

Flower has two ways to run a federation that are measured here: the deployment runtime (HTTP), and the older
`start_server`/`start_client` (gRPC, deprecated). One release has both.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv-flower"


def install() -> Path:
    """Return the environment's `bin`, made on first use."""
    marker = VENV / ".installed"
    wanted = (HERE / "requirements-flower.txt").read_text(encoding="ascii")
    if not marker.exists() or marker.read_text(encoding="ascii") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip: list[str | Path] = [VENV / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "-r", HERE / "requirements-flower.txt"], check=True)
        marker.write_text(wanted, encoding="ascii")
    return VENV / "bin"


if __name__ == "__main__":
    install()

"""Small and read-only disks, in mount namespaces of their own: for those who may mount."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.processes import Process


def can_mount() -> bool:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs root")


@contextmanager
def mounted(script: str) -> Iterator[tuple[str, ...]]:
    """Yield what runs a command where the shell commands `script` have mounted something; nobody else sees that."""
    holder = Process("unshare", "--mount", "sh", "-ec", f"{script}; echo mounted; exec sleep infinity")
    try:
        holder.wait_for_line("mounted")
        yield ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "--wd=/", "--")
    finally:
        holder.discard()

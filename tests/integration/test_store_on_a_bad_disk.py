"""Full and read-only disks: one clear error, and afterwards everything that was acknowledged is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedserver.state.folder import StateFolder
from tests.support.disks import needs_mount

# Fills the disk until the storage fails and prints the error; then makes room, reopens and compares.
FILL = """
import asyncio, hashlib, resource, sys
from pathlib import Path
from fedcore.clock import SystemClock
from fedcore.errors import StorageFailed
from fedserver.state.records import ClientRecord
from fedserver.state.folder import StateFolder
from fedserver.state.journal import Journal

what, how, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
done = []

async def records(folder):
    journal = Journal(folder.store, SystemClock())
    while not journal.failed.done():
        name = f"c{len(done)}"
        try:
            await journal.write(ClientRecord(name, "0" * 3000, b"", 1.0, 2.0))
            done.append(name)
        except StorageFailed as error:
            print(error)
    await journal.close()

def blobs(folder):
    try:
        while True:
            # Of growing size, so that a limit on the size of files is met too.
            done.append(folder.blobs.put(f"{len(done)}".encode() * (len(done) + 1) * 1000))
    except StorageFailed as error:
        print(error)

def upload(folder):
    spool = folder.blobs.spool("upload-1")
    try:
        while True:
            spool.append(len(done).to_bytes(2, "big") * 15_000)
            done.append(len(done).to_bytes(2, "big") * 15_000)
    except StorageFailed as error:
        print(error)
    assert spool.num_bytes == sum(map(len, done))

ballast = root / "ballast"
ballast.write_bytes(b"x" * 300_000)
with StateFolder.create(root / "state", "fed-1"):
    pass
with StateFolder.open(root / "state") as folder:
    if how == "limited":  # files may not grow: for those who may not mount
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
    asyncio.run(records(folder)) if what == "records" else {"blobs": blobs, "upload": upload}[what](folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
ballast.unlink()
with StateFolder.open(root / "state") as folder:
    assert done
    if what == "records":
        assert set(done) <= {client.name for client in folder.store.clients()}
        folder.store.write([ClientRecord("after", "", b"", 1.0, 2.0)])
        assert folder.store.client("after")
    elif what == "blobs":
        assert set(done) == set(folder.blobs.digests())
        for digest in done:
            assert hashlib.sha256(folder.blobs.open(digest)).hexdigest() == digest
    else:
        whole = b"".join(done)
        spool = folder.blobs.spool("upload-1")
        # The beginning of an append that failed may be there: it is what the sender would send next.
        rest = len(done).to_bytes(2, "big") * 15_000
        spool.append(rest[spool.num_bytes - len(whole):])
        spool.seal(hashlib.sha256(whole + rest).hexdigest(), len(whole + rest))
"""
OPEN = """
import sys
from pathlib import Path
from fedcore.errors import StorageFailed
from fedserver.state.folder import StateFolder
try:
    StateFolder.open(Path(sys.argv[1]))
except StorageFailed as error:
    print(error)
"""


def printed(*command: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout.splitlines()


def under_mount(mount: str, *command: str) -> list[str]:
    """Run `command` after the shell command `mount`; what that mounts is gone when the command ends."""
    return printed("unshare", "--mount", "sh", "-ec", f'{mount}; exec "$@"', "sh", *command)


@pytest.mark.parametrize("what", ["records", "blobs", "upload"])
@pytest.mark.parametrize("how", ["limited", pytest.param("full", marks=needs_mount)])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, how: str, what: str) -> None:
    command = (sys.executable, "-c", FILL, what, how, str(tmp_path))
    if how == "full":
        lines = under_mount(f"mount -t tmpfs -o size=2m none '{tmp_path}'", *command)
    else:
        lines = printed(*command)
    assert len(lines) == 1
    assert re.search("disk is full|No space left|File too large|disk I/O error", lines[0])
    assert str(tmp_path / "state") in lines[0]


@needs_mount
def test_a_read_only_disk_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with StateFolder.create(path, "fed-1"):
        pass
    mount = f"mount --bind '{path}' '{path}'; mount -o remount,bind,ro '{path}'"
    lines = under_mount(mount, sys.executable, "-c", OPEN, str(path))
    assert lines == [f"cannot lock {path}: Read-only file system"]

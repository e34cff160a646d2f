"""`fedserver init` and `fedserver run` where nothing can be written: one clear line, exit code 11, and nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcore.errors import Exit
from tests.support.disks import mounted, needs_mount
from tests.support.processes import Process, command, run

pytestmark = needs_mount
ANY_PORTS = ("--port", "0", "--enrolment-port", "0", "--metrics-port", "0")


def fedserver(under: tuple[str, ...], *arguments: str | Path) -> Process:
    return run(*under, command("fedserver"), *arguments)


def said(failed: Process) -> str:
    """Return the one line that a command ended with for want of a disk."""
    assert failed.wait() == Exit.STORAGE_FAILED, failed.story()
    assert "Traceback" not in failed.story()
    (line,) = [line for line in failed.err if line.startswith("error: ")]
    return line


@contextmanager
def serving(under: tuple[str, ...], folder: Path) -> Iterator[Process]:
    """Run a server in the block; it must start."""
    server = Process(*under, command("fedserver"), "run", "--folder", folder, "--host", "127.0.0.1")
    try:
        server.wait_for_line("serving at")
        yield server
    finally:
        server.discard()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = run("fedserver", "init", "--folder", tmp_path / "state", *ANY_PORTS)
    assert made.wait() == Exit.OK, made.story()
    return tmp_path / "state"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_read_only_folder_is_one_clear_line_and_stays_as_it_is(folder: Path) -> None:
    root = folder.parent
    before = contents(root)
    with mounted(f"mount --bind '{root}' '{root}'; mount -o remount,bind,ro '{root}'") as there:
        line = said(fedserver(there, "run", "--folder", folder, "--host", "127.0.0.1"))
        assert line == f"error: cannot lock {folder}: Read-only file system"
        line = said(fedserver(there, "init", "--folder", root / "new"))
        assert line == f"error: cannot create {root / 'new'}: Read-only file system"
    assert contents(root) == before
    with serving((), folder) as server:
        assert server.stop() == Exit.OK


def test_a_full_disk_is_one_clear_line_whenever_it_is_met_and_costs_nothing(folder: Path) -> None:
    disk = folder.parent / "disk"
    disk.mkdir()
    state, ballast = disk / "state", disk / "ballast"
    with mounted(f"mount -t tmpfs -o size=4m none '{disk}'; cp -a '{folder}' '{state}'") as there:

        def fill() -> None:
            assert run(*there, "dd", "if=/dev/zero", f"of={ballast}", "bs=4k").wait() == 1, "until nothing fits"

        def make_room() -> None:
            assert run(*there, "rm", ballast).wait() == 0

        fill()
        assert str(disk) in said(fedserver(there, "run", "--folder", state, "--host", "127.0.0.1"))
        assert "No space left" in said(fedserver(there, "init", "--folder", disk / "new"))
        make_room()
        made = fedserver(there, "init", "--folder", disk / "new", *ANY_PORTS)
        assert made.wait() == Exit.OK, made.story()
        with serving(there, state) as server:
            assert fedserver(there, "token", "ann", "--folder", state).wait() == Exit.OK
            fill()
            while (asked := fedserver(there, "token", "berta", "--folder", state)).wait() == Exit.OK:
                pass  # SQLite's log had room left
            assert asked.wait() in (Exit.STORAGE_FAILED, Exit.UNREACHABLE), asked.story()
            assert str(state) in said(server)
        make_room()
        with serving(there, state) as server:
            assert fedserver(there, "token", "ann", "--folder", state).wait() == Exit.OK
            assert server.stop() == Exit.OK

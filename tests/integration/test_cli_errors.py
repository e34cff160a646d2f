"""What users get wrong, with real processes: one clear line, a documented exit code, no traceback, state intact."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedcore.errors import Exit

JOB = '[job]\nname = "small"\nrounds = 1\n\n[task]\nname = "played"\n\n[schedule]\ncohort = 1\n'
TIMEOUT_S = 60


def fedserver(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedserver", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def fails(expected: Exit, *arguments: str) -> str:
    """Run a command that must fail with one line, and return that line's text."""
    done = fedserver(*arguments)
    assert done.returncode == expected, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip()


def logged_failure(expected: Exit, *arguments: str) -> str:
    """Run a `fedserver run` that must fail; its log may say more, but there is one error and no traceback."""
    done = fedserver("run", *arguments)
    assert done.returncode == expected, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds, without the lock: it names the process that had it last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass
class Running:
    process: subprocess.Popen[str]
    address: str
    enrolment_address: str


@contextmanager
def running(folder: Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "fedserver", "run", "--folder", str(folder), "--json"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            yield Running(process, ready["address"], ready["enrolment_address"])
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == Exit.OK


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    ports = ["--port", "0", "--enrolment-port", "0", "--metrics-port", "0"]
    done = fedserver("init", "--folder", str(made), *ports)
    assert (done.returncode, done.stderr) == (Exit.OK, "")
    return made


def test_a_server_starts_says_where_and_leaves_no_trace(folder: Path) -> None:
    with running(folder) as server:
        assert server.address.startswith("localhost:")
        done = fedserver("submit", "--folder", str(folder), str(_job_file(folder.parent)))
        job_id = done.stdout.strip()
        assert done.returncode == Exit.OK
        fails(Exit.NOT_FOUND, "status", "nope", "--folder", str(folder))
    assert not (folder / "running.json").exists()
    with running(folder):  # what was acknowledged is there again
        done = fedserver("status", "--folder", str(folder), "--json")
        assert [job["job_id"] for job in json.loads(done.stdout)["jobs"]] == [job_id]


def test_a_port_in_use_is_exit_code_6(folder: Path) -> None:
    before = contents(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = ["--folder", str(folder), "--host", "127.0.0.1"]
        for option in ("--port", "--enrolment-port", "--metrics-port"):
            assert port in logged_failure(Exit.ADDRESS_IN_USE, *where, option, port)
    assert contents(folder) == before
    with running(folder):
        pass  # with ports that are free it starts


def test_a_locked_folder_is_exit_code_7_and_its_server_goes_on(folder: Path) -> None:
    with running(folder) as server:
        text = logged_failure(Exit.STATE_LOCKED, "--folder", str(folder), "--host", "127.0.0.1")
        assert str(server.process.pid) in text
        assert fedserver("status", "--folder", str(folder)).returncode == Exit.OK


def test_a_folder_of_a_newer_format_is_exit_code_8(folder: Path) -> None:
    ours = (folder / "format").read_bytes()
    (folder / "format").write_text('{"federation": "federation", "format": 2}\n')
    before = contents(folder)
    assert "newer" in logged_failure(Exit.STATE_UNUSABLE, "--folder", str(folder))
    assert contents(folder) == before
    (folder / "format").write_bytes(ours)
    with running(folder):
        pass


@pytest.mark.parametrize("command", [["run"], ["status"], ["jobs"], ["clients"], ["token", "ann"], ["stop", "x"]])
def test_a_missing_folder_is_exit_code_8_with_the_way_out(command: list[str], tmp_path: Path) -> None:
    text = fails(Exit.STATE_UNUSABLE, *command, "--folder", str(tmp_path / "none"))
    assert "`fedserver init`" in text
    assert list(tmp_path.iterdir()) == []


def test_initialising_twice_is_exit_code_8(folder: Path) -> None:
    before = contents(folder)
    assert "already" in fails(Exit.STATE_UNUSABLE, "init", "--folder", str(folder))
    assert contents(folder) == before


def test_bad_settings_are_exit_code_3(folder: Path) -> None:
    with (folder / "server.toml").open("a") as file:
        file.write("prot = 1\n")
    for command in ("run", "status"):
        assert "prot" in fails(Exit.INVALID, command, "--folder", str(folder))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rounds = 1", "rounds = 0", "job.rounds"),
        ("rounds", "runds", "did you mean 'rounds'"),
        ('name = "played"', 'name = "a/b"', "task.name"),
        ("[schedule]", '[aggregator]\nrule = "mean"\n[schedule]', "known: fedex-lora, flexlora"),
        ("[schedule]", '[compression]\ndownlink = [{ codec = "zip" }]\n[schedule]', "unknown codec 'zip'"),
        ("[schedule]", '[server_optimizer]\nname = "adan"\n[schedule]', "did you mean 'adam'"),
        ("[schedule]", '[server_optimizer]\nname = "adam"\nbeta = 0.9\n[schedule]', "beta"),
    ],
)
def test_a_bad_job_file_is_exit_code_3_before_the_server_is_asked(old: str, new: str, named: str, folder: Path) -> None:
    file = _job_file(folder.parent, JOB.replace(old, new, 1))
    for arguments in (["check"], ["submit", "--folder", str(folder)]):
        done = fedserver(*arguments, str(file))
        assert (done.returncode, done.stdout) == (Exit.INVALID, "")
        assert all(line.startswith(f"error: {file}: ") for line in done.stderr.splitlines())
        assert named in done.stderr


def test_a_job_file_that_is_not_there_is_exit_code_3(folder: Path) -> None:
    missing = folder.parent / "none.toml"
    assert str(missing) in fails(Exit.INVALID, "submit", "--folder", str(folder), str(missing))


def test_nobody_at_the_address_is_exit_code_5(folder: Path) -> None:
    assert str(folder) in fails(Exit.UNREACHABLE, "status", "--folder", str(folder))
    with running(folder) as server:
        address = server.address
        left_behind = (folder / "running.json").read_bytes()
    (folder / "running.json").write_bytes(left_behind)  # as after a crash
    assert address in fails(Exit.UNREACHABLE, "jobs", "--folder", str(folder))
    answer = fedserver("token", "ann", "--folder", str(folder), "--json")
    assert json.loads(answer.stderr)["error"] == {
        "code": "unreachable",
        "exit_code": 5,
        "text": f"no answer from {address}: connection refused; does `fedserver run` run there?",
    }


def _job_file(folder: Path, text: str = JOB) -> Path:
    file = folder / "job.toml"
    file.write_text(text)
    return file

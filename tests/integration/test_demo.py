"""The demo as a user starts it, with all its processes; and that none of them stays, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
KEYS = {
    "base_accuracy",
    "final_accuracy",
    "pooled_accuracy",
    "base_loss",
    "final_loss",
    "pooled_loss",
    "rounds",
    "clients",
    "uplink_bytes",
    "round_uplink_bytes",
    "downlink_bytes",
    "raw_uplink_bytes",
    "ratio",
    "relative_error",
    "epsilon",
    "model_sha256",
    "adapter",
    "model_card",
    "plot",
}
END_S = 30
KILLED_S = 10


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), "--folder", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def running_demo(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Start a demo and yield it with its output; at the end nothing of it is left, or the test fails."""
    command = [sys.executable, str(DEMO), "--folder", str(folder), *options]
    # Its errors go to the same place, so that an assertion on its lines shows them.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout
    finally:
        process.kill()
        process.communicate()


def until(output: IO[str], pattern: str) -> None:
    """Read on to the first line with `pattern`."""
    seen = []
    for line in output:
        seen.append(line)
        if re.search(pattern, line):
            return
    pytest.fail(f"no line with {pattern!r}:\n{''.join(seen)}")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return every process that has `folder` in its command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in argument for argument in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_short_demo_leaves_its_figures_and_files_and_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = demo(folder, "--rounds", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert processes_of(folder) == []

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == summary
    assert set(summary) == KEYS
    assert (summary["rounds"], summary["clients"]) == (3, 5)
    assert summary["base_accuracy"] < summary["final_accuracy"] < summary["pooled_accuracy"]
    assert len(bytes.fromhex(summary["model_sha256"])) == 32
    assert 0 < summary["uplink_bytes"] < 1e6
    assert 0 < summary["downlink_bytes"] < 1e6
    assert summary["ratio"] == summary["raw_uplink_bytes"] / summary["uplink_bytes"] < 1
    assert summary["relative_error"] == 0
    assert (Path(summary["adapter"]) / "adapter_model.safetensors").is_file()
    assert Path(summary["model_card"]).read_text(encoding="utf-8").startswith("---")
    assert Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    assert sorted(log.stem for log in (folder / "logs").iterdir()) == [
        *(f"client-{number}" for number in range(1, 6)),
        "fedserver",
        "operator",
        "pooled",
    ]


@pytest.mark.slow
def test_another_codec_is_used_and_what_it_saved_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = demo(folder, "--rounds", "2", "--codec", "fedzip")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["ratio"] > 4  # version 0 goes up as it is, and every update has its header
    assert 0 < summary["relative_error"] < 1
    assert re.search(rf"codec +fedzip: {summary['ratio']:.3g} × fewer bytes up than raw values", done.stdout)
    assert "kmeans" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_codec_that_does_not_go_with_the_job_is_refused_at_once(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo", "--codec", "rqm")
    assert done.returncode == 3
    assert "aggregator.max_examples" in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_ctrl_c_during_a_round_ends_every_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with running_demo(folder, "--rounds", "10000") as (process, output):
        until(output, "round [1-9]")  # a quick round may share its line with the next
        assert len(processes_of(folder)) >= 7  # server, five clients, the status that is shown
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # impatience does no harm
        assert process.wait(END_S) == 130
        assert processes_of(folder) == []
        until(output, "stopped; every process has ended")


def test_kill_9_takes_the_processes_along(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with running_demo(folder) as (process, output):
        until(output, "server at")
        started = psutil.Process(process.pid).children()
        assert started
        process.kill()
        _, alive = psutil.wait_procs(started, timeout=KILLED_S)
        # Where nothing reaps orphans they stay as zombies, which run no more.
        assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_server_that_dies_ends_the_demo_with_the_end_of_its_log(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with running_demo(folder) as (process, output):
        until(output, "server at")
        pid = int((folder / "state" / "lock").read_text(encoding="ascii"))
        os.kill(pid, signal.SIGKILL)
        until(output, "error: fedserver run was killed by SIGKILL")
        assert "fedserver.log" in output.readline()
        assert process.wait(END_S) == 1
        assert processes_of(folder) == []


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work", encoding="utf-8")
    done = demo(tmp_path)
    assert done.returncode == 3
    assert "holds thesis.txt and was not made by the demo" in done.stderr
    assert list(tmp_path.iterdir()) == [precious]


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with (tmp_path / ".roundtable-demo").open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        done = demo(tmp_path)
    assert done.returncode == 7
    assert "another demo runs in" in done.stderr


def test_more_clients_are_needed_than_asked_for(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo", "--clients", "2")
    assert done.returncode == 3
    assert "trains 5 in each round" in done.stderr


def test_a_wrong_job_leaves_the_results_of_the_last_demo(tmp_path: Path) -> None:
    (tmp_path / ".roundtable-demo").touch()
    (tmp_path / "summary.json").touch()
    done = demo(tmp_path, "--rounds", "0")
    assert done.returncode == 3
    assert "job.rounds" in done.stderr
    assert (tmp_path / "summary.json").exists()

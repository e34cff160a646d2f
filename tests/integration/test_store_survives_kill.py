"""kill -9 while records and blobs are written: whatever was acknowledged is there afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from fedserver.state.folder import StateFolder

# Five writers at once, so that batches form. Each puts a blob, then a record that names it, then prints its id.
WRITER = """
import asyncio, sys
from pathlib import Path
from fedcore.clock import SystemClock
from fedcore.errors import UpdateResult
from fedcore.messages import WorkKind
from fedserver.state.records import UpdateRecord
from fedserver.state.folder import StateFolder
from fedserver.state.journal import Journal

async def main(path, start):
    with StateFolder.open(path) as folder:
        journal = Journal(folder.store, SystemClock())
        async def work(worker):
            for number in range(start, sys.maxsize):
                name = f"{worker}-{number}"
                blob = await asyncio.to_thread(folder.blobs.put, name.encode() * 100)
                await journal.write(UpdateRecord(
                    name, "a", "j", 0, 0, WorkKind.TRAIN, "c", UpdateResult.ACCEPTED, "", b"h" * 2000, b"s",
                    blob, 0, 1, "{}", 1.0,
                ))
                print(name, flush=True)
        await asyncio.gather(*(work(worker) for worker in range(5)))

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_every_acknowledged_record_and_its_blob_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with StateFolder.create(path, "fed-1"):
        pass
    acknowledged: set[str] = set()
    lengths = random.Random(1)
    for number in range(6):
        acknowledged |= write_until_killed(path, number * 1_000_000, lengths.randint(1, 150))
        with StateFolder.open(path) as folder:
            found = folder.store.updates("j", 0)
            assert acknowledged <= {record.update_id for record in found}
            # Records that were durable but not yet acknowledged are whole too.
            for record in found:
                assert record.blob is not None
                assert bytes(folder.blobs.open(record.blob)) == record.update_id.encode() * 100
            assert list((path / "temporary").iterdir()) == []


def write_until_killed(path: Path, start: int, num_lines: int) -> set[str]:
    """Kill the writer when it has acknowledged `num_lines` records, and return all that it acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(start)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.kill()
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    # A line without its end was cut by the kill: the record is durable, but take nobody's word for half a line.
    return {line.strip() for line in lines if line.endswith("\n")}

"""Making, opening and locking a state folder."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedcore.errors import InvalidInput, StateLocked, StateUnusable, StorageFailed
from fedserver.state.folder import FORMAT, StateFolder, read_format
from fedserver.state.records import ClientRecord

CLIENT = ClientRecord("ada", "0a", b"", 1.0, 2.0)
HOLD = """
import sys
from pathlib import Path
from fedserver.state.folder import StateFolder

with StateFolder.open(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with StateFolder.create(tmp_path / "state", "fed-1") as folder:
        (folder.keys / "ca.pem").write_text("key")
    return tmp_path / "state"


def test_what_was_made_is_opened(path: Path) -> None:
    with StateFolder.open(path) as folder:
        assert folder.federation == "fed-1"
        assert (folder.keys / "ca.pem").read_text() == "key"
        folder.store.write([CLIENT])
        digest = folder.blobs.put(b"bytes")
    with StateFolder.open(path) as folder:
        assert folder.store.clients() == [CLIENT]
        assert bytes(folder.blobs.open(digest)) == b"bytes"


def test_only_the_owner_may_enter(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "keys").stat().st_mode & 0o777 == 0o700


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with StateFolder.create(tmp_path / "a" / "b" / "state", "fed-1"):
        pass
    assert read_format(tmp_path / "a" / "b" / "state") == "fed-1"


def test_a_creation_that_failed_leaves_no_state_folder_and_can_be_repeated(tmp_path: Path) -> None:
    def fail() -> None:
        with StateFolder.create(tmp_path, "fed-1") as folder:
            (folder.keys / "ca.pem").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(StateUnusable, match="fedserver init"):
        StateFolder.open(tmp_path)
    with StateFolder.create(tmp_path, "fed-2"):
        pass
    assert read_format(tmp_path) == "fed-2"


def test_a_state_folder_is_not_made_twice(path: Path) -> None:
    with pytest.raises(StateUnusable, match="already, of federation 'fed-1'"), StateFolder.create(path, "fed-2"):
        pass
    assert read_format(path) == "fed-1"


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StateUnusable, match=r"'thesis\.tex'"), StateFolder.create(tmp_path, "fed-1"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_the_federation_id_is_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="federation id"), StateFolder.create(tmp_path / "state", "a/b"):
        pass
    assert not (tmp_path / "state").exists()


def test_a_missing_folder_points_to_init(tmp_path: Path) -> None:
    with pytest.raises(StateUnusable, match="fedserver init"):
        StateFolder.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_place_of_the_folder_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StateUnusable, match="fedserver init"):
        StateFolder.open(tmp_path / "state")
    with pytest.raises(StorageFailed, match="Not a directory"), StateFolder.create(tmp_path / "state", "fed-1"):
        pass


def test_a_newer_format_names_both_numbers(path: Path) -> None:
    (path / "format").write_text(f'{{"federation": "fed-1", "format": {FORMAT + 41}}}')
    with pytest.raises(StateUnusable, match=f"format {FORMAT + 41}, newer than format {FORMAT}"):
        StateFolder.open(path)


@pytest.mark.parametrize("text", ["", "1", "[]", "{}", '{"federation": 1, "format": 1}', "\x00\xff", "[" * 4000])
def test_a_damaged_format_file_is_reported(path: Path, text: str) -> None:
    (path / "format").write_text(text)
    with pytest.raises(StateUnusable, match="damaged"):
        StateFolder.open(path)


def test_a_damaged_database_is_reported_and_leaves_the_folder_unlocked(path: Path) -> None:
    (path / "store.sqlite").write_bytes(b"this is no database" * 1000)
    for _ in range(2):
        with pytest.raises(StateUnusable, match="the database is damaged"):
            StateFolder.open(path)


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [
        (b"lovelace", b"\xff\xfelovela"),  # a value that is not UTF-8
        (b"signing_key BLOB", b"signing_kez BLOB"),  # a column that is no longer there
        (b"sqlite_autoindex_clients", b"sqliTe_\xb9utoindex_clients"),  # SQLite's own message is not UTF-8 then
    ],
)
def test_a_database_with_damaged_pages_is_reported(path: Path, sound: bytes, damaged: bytes) -> None:
    with StateFolder.open(path) as folder:
        folder.store.write([replace(CLIENT, name="lovelace")])
    file = path / "store.sqlite"
    data = file.read_bytes()
    assert sound in data
    file.write_bytes(data.replace(sound, damaged))
    with pytest.raises(StateUnusable, match="the database is damaged"), StateFolder.open(path) as folder:
        folder.store.clients()


def test_a_value_that_this_version_does_not_know_is_reported(path: Path) -> None:
    connection = sqlite3.connect(path / "store.sqlite")
    connection.execute(
        "INSERT INTO jobs (job_id, name, spec, status, submitted_at, failure) VALUES ('j', 'n', x'', 'paused', 1, '')"
    )
    connection.commit()
    connection.close()
    with StateFolder.open(path) as folder, pytest.raises(StateUnusable, match="'paused'"):
        folder.store.jobs()


def test_a_second_process_is_told_who_works_there(path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_env()
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(StateLocked, match=f"process {holder.pid}$"):
            StateFolder.open(path)
        holder.kill()
    StateFolder.open(path).close()  # the lock went with the process


def test_the_same_process_cannot_open_it_twice_either(path: Path) -> None:
    with StateFolder.open(path), pytest.raises(StateLocked, match=f"process {os.getpid()}$"):
        StateFolder.open(path)


def test_closing_twice_is_harmless(path: Path) -> None:
    folder = StateFolder.open(path)
    folder.close()
    folder.close()
    StateFolder.open(path).close()


def child_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

"""What a server reads from its state folder after a disk, or a person, has changed it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigError, NotFound, StateError, StateUnusable, UpdateRejected, UpdateResult
from fedcore.messages import WorkKind
from fedserver.cli import connect
from fedserver.config import FILE, ServerConfig
from fedserver.state.base import Spool
from fedserver.state.blobs import FolderBlobs
from fedserver.state.folder import FORMAT, read_format
from fedserver.state.memory import MemoryBlobs
from fedserver.state.records import (
    AssignmentRecord,
    AttemptRecord,
    ClientRecord,
    JobRecord,
    JobStatus,
    Record,
    TokenRecord,
    UpdateRecord,
    VersionRecord,
)
from fedserver.state.sqlite import SqliteStore
from tests.fuzz.target import BOMBS, Reader, Target, check_refusal, scratch_folder

ID: Final = "0" * 32
DIGEST: Final = hashlib.sha256(b"").hexdigest()

# -- small files -----------------------------------------------------------------------------------------------------


def read_settings(data: bytes) -> None:
    reader = Reader(data)
    name, read = SETTINGS[reader.number() % len(SETTINGS)]
    folder = settings_folder()
    sound = (folder / name).read_bytes()
    (folder / name).write_bytes(reader.rest())
    try:
        read(folder)
    finally:
        (folder / name).write_bytes(sound)


def format_file(folder: Path) -> None:
    try:
        federation = read_format(folder)
    except StateUnusable as error:
        check_refusal(error)
        return
    assert isinstance(federation, str)


def settings_file(folder: Path) -> None:
    try:
        config = ServerConfig.load(folder)
    except ConfigError as error:
        check_refusal(error)
        return
    config.save(folder)
    assert ServerConfig.load(folder) == config


def running_file(folder: Path) -> None:
    try:
        address = connect._address(folder)
    except StateUnusable as error:
        check_refusal(error)
        return
    assert json.loads((folder / connect._RUNNING).read_bytes())["address"] == address


SETTINGS: Final[list[tuple[str, Callable[[Path], None]]]] = [
    ("format", format_file),
    (FILE, settings_file),
    (connect._RUNNING, running_file),
]


@cache
def settings_folder() -> Path:
    folder = scratch_folder()
    (folder / "format").write_text(json.dumps({"federation": "north", "format": FORMAT}) + "\n")
    ServerConfig(public_host="fe80::1").save(folder)
    (folder / connect._RUNNING).write_text(json.dumps({"address": "127.0.0.1:8470"}))
    return folder


def settings() -> Iterator[bytes]:
    for index, (name, _) in enumerate(SETTINGS):
        yield bytes([index]) + (settings_folder() / name).read_bytes()
        yield from (bytes([index]) + b"x = " * (name == FILE) + bomb for bomb in BOMBS)
    yield b'\0{"federation": 1, "format": 2}'
    yield b'\1public_host = "fe80::1%eth0"\nhost = "::"\nport = 1_0\nmetrics_host = "a.b"\nmetrics_port = -1\n'


# -- the database ----------------------------------------------------------------------------------------------------


def read_database(data: bytes) -> None:
    """Overwrite some places of a sound database: place (3 bytes), length (1), bytes. First of all its length (3)."""
    reader = Reader(data)
    sound = database()
    damaged = bytearray(sound[: len(sound) - reader.number(3) % len(sound)])
    while not reader.is_empty:
        place, length = reader.number(3) % len(sound), reader.number() % 16
        damaged[place : place + length] = reader.take(length)
    path = database_folder() / "store.sqlite"
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(damaged)
    try:
        store = SqliteStore(path)
        try:
            records = everything(store)
        finally:
            store.close()
    except StateError as error:
        check_refusal(error)
        return
    for record in records:  # a changed value is a value; what was read can be looked at
        assert repr(record)


def everything(store: SqliteStore) -> list[Record]:
    found: list[Record] = [*store.clients(), *store.tokens(), *store.jobs()]
    found += [*store.versions(ID), *store.attempts(ID), *store.assignments(ID, 1, 0), *store.updates(ID, 1)]
    one = (store.client("alice"), store.token(DIGEST), store.job(ID), store.latest_version(ID), store.update(ID))
    return [*found, *(record for record in one if record is not None)]


@cache
def database_folder() -> Path:
    return scratch_folder()


@cache
def database() -> bytes:
    path = database_folder() / "sound.sqlite"
    store = SqliteStore(path)
    store.write(
        [
            ClientRecord("alice", "1f", b"k" * 32, 1.0, 2.5),
            ClientRecord("bob", "2f", b"k" * 32, 1.0, 2.5, revoked_at=2.0),
            TokenRecord(DIGEST, "alice", 1.0, 2.5, used_at=1.5),
            JobRecord(ID, "digits", b"{}", JobStatus.RUNNING, 3.0, layout=b"[]"),
            AttemptRecord(ID, 1, 0, WorkKind.TRAIN, 4.0, 5.0),
            AssignmentRecord(ID, ID, 1, 0, WorkKind.TRAIN, "alice", 4.0, "done"),
            UpdateRecord(
                *(ID, ID, ID, 1, 0, WorkKind.TRAIN, "alice", UpdateResult.ACCEPTED, ""),
                *(b"{}", b"s" * 64, DIGEST, 83, 10, "{}", 4.5),
            ),
            *(
                VersionRecord(ID, version, DIGEST, DIGEST, b"RTF1", DIGEST, None, 1, 10, 100, 200, 6.0)
                for version in range(3)
            ),
        ]
    )
    store.close()
    return path.read_bytes()


def damages() -> Iterator[bytes]:
    sound, length = database(), bytes(3)
    yield length
    yield (len(sound) - 100).to_bytes(3, "little")
    yield (len(sound) // 2).to_bytes(3, "little")
    for word in (b"alice", b"running", b"train", b"accepted", b"UNIQUE (name)", b"signing_key BLOB", b"CREATE INDEX"):
        place = sound.index(word)
        yield length + place.to_bytes(3, "little") + b"\4" + b"\xff\xfe{\0"
        yield length + (place - 8).to_bytes(3, "little") + b"\1\x0c"  # the types of a row stand before it
    yield length + struct.pack("<I", 16)[:3] + b"\2\1\0"


# -- spools ----------------------------------------------------------------------------------------------------------


def use_spools(data: bytes) -> None:
    reader, twins = Reader(data), Twins()
    try:
        while not reader.is_empty:
            twins.act(reader)
    finally:
        twins.clear()


class Twins:
    """Spools in files and in memory that are used alike, beside a dictionary of what should be in them.

    Attributes:
        over: pairs of spools that were sealed or discarded.
    """

    def __init__(self) -> None:
        self.files, self.memory = folder_blobs(), MemoryBlobs()
        self.expected: dict[str, bytes] = {}
        self.sealed: set[str] = set()
        self.over: list[tuple[Spool, Spool]] = []

    def act(self, reader: Reader) -> None:
        operation, key = reader.number() % 6, "abc"[reader.number() % 3]
        pair = self.files.spool(key), self.memory.spool(key)
        held = self.expected.get(key, b"")
        assert [spool.num_bytes for spool in pair] == [len(held), len(held)]
        match operation:
            case 0 | 1:
                piece = reader.take(reader.number())
                pair[0].append(memoryview(piece))
                pair[1].append(piece)
                self.expected[key] = held + piece
            case 2:
                self.seal(pair, key, reader.number() % 4)
            case 3:
                for spool in pair:
                    spool.discard()
                self.end(pair, key)
            case 4:
                self.restart()
            case 5:
                for blobs in (self.files, self.memory):
                    blobs.discard_spools({key})
                self.expected = {key: held} if key in self.expected else {}
        assert all(is_over(spool) for pair in self.over for spool in pair)

    def seal(self, pair: tuple[Spool, Spool], key: str, wrong: int) -> None:
        held = self.expected.get(key, b"")
        digest = hashlib.sha256(held + b"x" * (wrong == 1)).hexdigest()
        answers = [seal(spool, digest, len(held) + (wrong == 2)) for spool in pair]
        right = {1: UpdateResult.WRONG_DIGEST, 2: UpdateResult.WRONG_SIZE}.get(wrong, digest)
        assert answers == [right, right]
        if right == digest:
            self.sealed.add(digest)
            assert [bytes(blobs.open(digest)) for blobs in (self.files, self.memory)] == [held, held]
        self.end(pair, key)

    def end(self, pair: tuple[Spool, Spool], key: str) -> None:
        self.over.append(pair)
        self.expected.pop(key, None)

    def restart(self) -> None:
        """A new process finds what the old one wrote."""
        folder_blobs.cache_clear()
        self.files, self.over = folder_blobs(), []
        found = {key: size for key, size in self.files.spools().items() if size}
        assert found == {key: len(content) for key, content in self.expected.items() if content}

    def clear(self) -> None:
        self.files.discard_spools(set())
        for digest in self.sealed:
            self.files.delete(digest)


def seal(spool: Spool, digest: str, num_bytes: int) -> str:
    try:
        return spool.seal(digest, num_bytes)
    except UpdateRejected as error:
        return error.reason


def is_over(spool: Spool) -> bool:
    spool.discard()
    try:
        spool.append(b"late")
    except NotFound:
        return True
    return False


@cache
def spool_folder() -> Path:
    return scratch_folder()


@cache
def folder_blobs() -> FolderBlobs:
    return FolderBlobs(spool_folder())


def spool_uses() -> Iterator[bytes]:
    append = b"\0\0\5first" + b"\1\0\6second" + b"\0\1\0"
    yield append + b"\2\0\0" + b"\0\0\3new"
    yield append + b"\4\0" + b"\2\0\1" + b"\2\1\2"
    yield append + b"\3\0" + b"\5\1" + b"\4\1" + b"\2\1\0" + b"\2\2\0"


TARGETS: Final = (
    Target("settings", read_settings, settings, max_bytes=16_000),
    Target("database", read_database, damages, max_bytes=256, runs=3_000),
    Target("spool", use_spools, spool_uses, max_bytes=512, runs=300),
)

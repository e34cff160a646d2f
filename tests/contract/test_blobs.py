"""What blobs promise, in memory and in a folder."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput, NotFound, UpdateRejected, UpdateResult
from fedserver.state.base import Blobs
from fedserver.state.blobs import FolderBlobs
from fedserver.state.memory import MemoryBlobs

DATA = bytes(range(256)) * 20
DIGEST = hashlib.sha256(DATA).hexdigest()
EMPTY = hashlib.sha256(b"").hexdigest()


@pytest.fixture(params=["memory", "folder"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return MemoryBlobs() if request.param == "memory" else FolderBlobs(tmp_path)


@pytest.mark.parametrize("data", [DATA, bytearray(DATA), memoryview(DATA), memoryview(DATA).cast("f")])
def test_bytes_come_back_under_their_sha256(blobs: Blobs, data: bytes | bytearray | memoryview) -> None:
    assert DIGEST not in blobs
    assert blobs.put(data) == DIGEST
    assert DIGEST in blobs
    assert blobs.open(DIGEST) == DATA
    assert blobs.size(DIGEST) == len(DATA)
    assert list(blobs.digests()) == [DIGEST]


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 10), (4, 5000), (5000, 5000), (5120, 1), (9999, 1), (0, 0)])
def test_a_part_of_a_blob_is_read_by_itself(blobs: Blobs, offset: int, num_bytes: int) -> None:
    blobs.put(DATA)
    assert blobs.read(DIGEST, offset, num_bytes) == DATA[offset : offset + num_bytes]


def test_the_empty_blob_is_a_blob(blobs: Blobs) -> None:
    assert blobs.put(b"") == EMPTY
    assert bytes(blobs.open(EMPTY)) == b""
    assert blobs.size(EMPTY) == 0


def test_the_same_bytes_are_one_blob(blobs: Blobs) -> None:
    assert blobs.put(DATA) == blobs.put(DATA)
    assert list(blobs.digests()) == [DIGEST]


def test_an_open_blob_is_read_only_and_outlives_its_deletion(blobs: Blobs) -> None:
    blobs.put(DATA)
    view = blobs.open(DIGEST)
    blobs.delete(DIGEST)
    blobs.delete(DIGEST)
    assert view == DATA
    assert view.readonly
    assert DIGEST not in blobs


def test_a_missing_blob_is_not_found(blobs: Blobs) -> None:
    with pytest.raises(NotFound, match=DIGEST):
        blobs.open(DIGEST)
    with pytest.raises(NotFound, match=DIGEST):
        blobs.size(DIGEST)
    with pytest.raises(NotFound, match=DIGEST):
        blobs.read(DIGEST, 0, 1)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n"])
def test_what_is_no_digest_is_refused_before_it_becomes_a_path(blobs: Blobs, digest: str) -> None:
    with pytest.raises(InvalidInput, match="SHA-256"):
        blobs.open(digest)
    with pytest.raises(InvalidInput, match="SHA-256"):
        blobs.delete(digest)
    with pytest.raises(InvalidInput, match="SHA-256"):
        assert digest in blobs


def test_a_writer_shows_nothing_before_its_commit(blobs: Blobs) -> None:
    with blobs.writer() as writer:
        for start in range(0, len(DATA), 100):
            writer.write(DATA[start : start + 100])
        assert list(blobs.digests()) == []
        assert writer.commit() == DIGEST
    assert blobs.open(DIGEST) == DATA


def test_a_writer_left_without_a_commit_leaves_nothing(blobs: Blobs) -> None:
    with blobs.writer() as writer:
        writer.write(DATA)
    assert list(blobs.digests()) == []


def test_a_spool_becomes_a_blob_when_all_has_arrived(blobs: Blobs) -> None:
    spool = blobs.spool("upload-1")
    assert spool.num_bytes == 0
    spool.append(DATA[:1000])
    assert blobs.spool("upload-1").num_bytes == 1000
    blobs.spool("upload-1").append(memoryview(DATA)[1000:])
    assert blobs.spools() == {"upload-1": len(DATA)}
    assert DIGEST not in blobs
    assert spool.seal(DIGEST, len(DATA)) == DIGEST
    assert blobs.open(DIGEST) == DATA
    assert blobs.spools() == {}


def test_an_empty_spool_can_be_sealed(blobs: Blobs) -> None:
    assert blobs.spool("nothing").seal(EMPTY, 0) == EMPTY


@pytest.mark.parametrize(
    ("digest", "num_bytes", "reason"),
    [
        (DIGEST, len(DATA) + 1, UpdateResult.WRONG_SIZE),
        (DIGEST, len(DATA) - 1, UpdateResult.WRONG_SIZE),
        (EMPTY, len(DATA), UpdateResult.WRONG_DIGEST),
    ],
)
def test_a_spool_that_is_not_what_was_announced_is_discarded(
    blobs: Blobs, digest: str, num_bytes: int, reason: UpdateResult
) -> None:
    spool = blobs.spool("upload-1")
    spool.append(DATA)
    with pytest.raises(UpdateRejected) as caught:
        spool.seal(digest, num_bytes)
    assert caught.value.reason is reason
    assert list(blobs.digests()) == []
    assert blobs.spools() == {}
    assert blobs.spool("upload-1").num_bytes == 0


def test_a_spool_that_is_over_takes_no_more(blobs: Blobs) -> None:
    spool = blobs.spool("upload-1")
    spool.append(DATA)
    spool.discard()
    spool.discard()
    with pytest.raises(NotFound, match="upload-1"):
        spool.append(DATA)
    with pytest.raises(NotFound, match="upload-1"):
        spool.seal(DIGEST, len(DATA))
    again = blobs.spool("upload-1")
    again.append(b"x")
    spool.discard()
    assert blobs.spools() == {"upload-1": 1}


def test_only_the_spools_to_keep_are_kept(blobs: Blobs) -> None:
    for key in ("a", "b", "c"):
        blobs.spool(key).append(b"x")
    blobs.discard_spools({"b", "unknown"})
    assert blobs.spools() == {"b": 1}


def test_a_spool_key_is_a_name(blobs: Blobs) -> None:
    for key in ("", "../x", ".hidden", "a/b", "x" * 65):
        with pytest.raises(InvalidInput, match="spool key"):
            blobs.spool(key)


@given(pieces=st.lists(st.binary(max_size=300), max_size=8), reopened=st.sets(st.integers(0, 7)))
def test_pieces_and_restarts_do_not_change_what_is_sealed(pieces: list[bytes], reopened: set[int]) -> None:
    whole = b"".join(pieces)
    with tempfile.TemporaryDirectory() as folder:
        blobs = FolderBlobs(Path(folder))
        for number, piece in enumerate(pieces):
            if number in reopened:
                blobs = FolderBlobs(Path(folder))
            spool = blobs.spool("u")
            assert spool.num_bytes == sum(map(len, pieces[:number]))
            spool.append(piece)
        assert blobs.spool("u").seal(hashlib.sha256(whole).hexdigest(), len(whole)) in blobs

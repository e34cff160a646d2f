"""Small bytes become records, large ones blobs, and both are read alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import StateUnusable
from fedserver.state.blobs import FolderBlobs
from fedserver.state.memory import MemoryBlobs, MemoryStore
from fedserver.state.vault import RELEASE_BYTES, SMALL_BYTES, Vault, passing

SIZES = (0, 1, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, 3 * SMALL_BYTES)


def data_of(num_bytes: int) -> bytes:
    return (b"0123456789abcdef!" * (num_bytes // 17 + 1))[:num_bytes]


@pytest.mark.parametrize("num_bytes", SIZES)
def test_what_is_put_is_read_back_once_its_record_is_written(num_bytes: int) -> None:
    store, blobs = MemoryStore(), MemoryBlobs()
    vault, data = Vault(store, blobs), data_of(num_bytes)
    digest = hashlib.sha256(data).hexdigest()
    kept = vault.put(data, digest)
    assert kept.digest == digest
    assert (kept.record is None) == (num_bytes > SMALL_BYTES) == (digest in blobs)
    assert vault.open(kept) == data
    if kept.record is not None:
        with pytest.raises(StateUnusable):
            vault.open(digest)
        store.write([kept.record])
    assert vault.open(digest) == vault.open(digest, num_bytes) == data
    with pytest.raises(StateUnusable, match=f"{digest} is damaged: {num_bytes} bytes are there, {num_bytes + 4} were"):
        vault.open(digest, num_bytes + 4)
    assert vault.size(digest) == num_bytes
    assert vault.read(digest, 7, 1000) == data[7:1007]


@pytest.mark.parametrize("num_bytes", SIZES)
@pytest.mark.parametrize("step", [1000, SMALL_BYTES, 4 * SMALL_BYTES])
def test_what_is_written_piece_by_piece_is_kept_as_if_it_were_put(num_bytes: int, step: int) -> None:
    store, blobs = MemoryStore(), MemoryBlobs()
    vault, data = Vault(store, blobs), data_of(num_bytes)
    with vault.writer() as writer:
        for start in range(0, num_bytes, step):
            writer.write(data[start : start + step])
        kept = writer.commit()
    assert kept == vault.put(data, hashlib.sha256(data).hexdigest())
    assert vault.open(kept) == data


def test_a_writer_that_is_left_without_commit_keeps_nothing() -> None:
    blobs = MemoryBlobs()
    with Vault(MemoryStore(), blobs).writer() as writer:
        writer.write(data_of(3 * SMALL_BYTES))
    assert list(blobs.digests()) == []


def test_what_is_gone_is_damage_and_named() -> None:
    vault, digest = Vault(MemoryStore(), MemoryBlobs()), "ab" * 32
    missing = pytest.raises(StateUnusable, match=f"^blob {digest} is missing")
    with missing:
        vault.open(digest)
    with missing:
        vault.size(digest)
    with missing:
        vault.read(digest, 0, 1)
    with pytest.raises(StateUnusable, match=f"^blob {digest} is missing: the update of 'ann'$"):
        vault.check(digest, "the update of 'ann'")


def test_blocks_pass_through_whole_while_the_memory_of_their_file_is_given_back(tmp_path: Path) -> None:
    values_D = np.arange(RELEASE_BYTES, dtype=np.float32)  # four times as many bytes
    blobs = FolderBlobs(tmp_path)
    view = blobs.open(blobs.put(values_D.data))
    mapped_D = np.frombuffer(view, dtype=np.float32)
    blocks = (mapped_D[start : start + 100_000] for start in range(0, mapped_D.size, 100_000))
    start, most = 0, 0
    before = resident_file_bytes()
    for block in passing(blocks, view):
        assert np.array_equal(block, values_D[start : start + 100_000])
        start += block.size
        most = max(most, resident_file_bytes() - before)
    assert start == values_D.size
    assert most < 2 * RELEASE_BYTES < view.nbytes
    assert np.array_equal(mapped_D, values_D)


def resident_file_bytes() -> int:
    """Return how much of the files that this process has mapped is in memory (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))

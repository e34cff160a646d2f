"""What only blobs in a folder can do wrong: crashes and file modes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedserver.state.blobs import FolderBlobs


def test_what_a_crash_left_half_written_is_removed_at_the_start(tmp_path: Path) -> None:
    digest = FolderBlobs(tmp_path).put(b"whole")
    (tmp_path / "temporary" / "0123").write_bytes(b"ha")
    blobs = FolderBlobs(tmp_path)
    assert list(blobs.digests()) == [digest]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_blob_lies_under_the_first_two_digits_of_its_digest(tmp_path: Path) -> None:
    digest = FolderBlobs(tmp_path).put(b"whole")
    assert (tmp_path / "blobs" / digest[:2] / digest).read_bytes() == b"whole"


def test_putting_a_damaged_blob_again_mends_it(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    digest = blobs.put(b"whole")
    (tmp_path / "blobs" / digest[:2] / digest).write_bytes(b"hole")
    blobs.put(b"whole")
    assert bytes(blobs.open(digest)) == b"whole"


def test_asking_how_far_an_upload_is_makes_no_file(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    assert blobs.spool("upload-1").num_bytes == 0
    assert blobs.spools() == {}


def test_bytes_of_a_failed_append_are_cut_off_when_sealing(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    spool = blobs.spool("upload-1")
    spool.append(b"whole")
    with (tmp_path / "spool" / "upload-1").open("ab") as file:
        file.write(b"half an app")  # what a full disk leaves behind
    digest = hashlib.sha256(b"whole").hexdigest()
    assert spool.seal(digest, 5) == digest
    assert bytes(blobs.open(digest)) == b"whole"


def test_nobody_else_may_look_into_the_folders(tmp_path: Path) -> None:
    FolderBlobs(tmp_path)
    for name in ("blobs", "spool", "temporary"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0

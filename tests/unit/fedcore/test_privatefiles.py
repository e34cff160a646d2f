from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.errors import NotFound, StateUnusable, StorageFailed
from fedcore.privatefiles import make_private_folder, read_private, remove_private, write_private


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_only_the_owner_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_private_folder(folder)
    write_private(folder / "key", b"secret")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private_folder(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old and longer")
    path.chmod(0o644)
    write_private(path, b"new")
    assert read_private(path) == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    remove_private(path)
    remove_private(path)
    assert not path.exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.mkdir()  # a file cannot replace a folder
    with pytest.raises(StorageFailed, match="cannot write"):
        write_private(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageFailed, match="cannot remove"):
        remove_private(path)
    with pytest.raises(StorageFailed, match="cannot write"):
        write_private(tmp_path / "missing" / "f", b"new")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"theirs")
    link.symlink_to(target)
    write_private(link, b"ours")
    assert target.read_bytes() == b"theirs"
    assert not link.is_symlink()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="f is missing"):
        read_private(tmp_path / "f")
    with pytest.raises(StateUnusable, match="cannot read"):
        read_private(tmp_path)
    (tmp_path / "g").write_bytes(bytes(64 * 1024 + 1))
    with pytest.raises(StateUnusable, match="longer than 65536"):
        read_private(tmp_path / "g")
    with pytest.raises(StorageFailed, match="cannot prepare"):
        make_private_folder(tmp_path / "g")

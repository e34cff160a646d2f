"""An export appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.errors import InvalidInput, StorageFailed
from fedserver.export.folder import publish

FILES = {"README.md": [b"new ", b"card"], "model.safetensors": [b"weights"]}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def disk_full() -> Iterator[bytes]:
    yield b"half"
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted() -> Iterator[bytes]:
    yield b"half"
    raise KeyboardInterrupt


def test_missing_folders_above_are_made(tmp_path: Path) -> None:
    folder = publish(FILES, tmp_path / "a" / "b" / "out", force=False)
    assert tree(tmp_path) == {"a/b/out/README.md": b"new card", "a/b/out/model.safetensors": b"weights"}
    assert folder == tmp_path / "a" / "b" / "out"


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    publish(FILES, out, force=False)
    assert set(tree(tmp_path)) == {"out/README.md", "out/model.safetensors"}


@pytest.mark.parametrize("force", [True, False])
def test_full_disk_leaves_nothing_and_one_clear_line(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with pytest.raises(StorageFailed) as caught:
        publish({"README.md": [b"x"], "model.safetensors": disk_full()}, out, force=force)
    assert str(caught.value) == f"cannot write {out}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        publish({"README.md": interrupted()}, tmp_path / "out", force=False)
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_one_clear_line() -> None:
    with pytest.raises(StorageFailed, match=r"^cannot write /proc/1/nowhere/out: "):
        publish(FILES, Path("/proc/1/nowhere/out"), force=False)


def test_used_folder_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish({"README.md": [b"old"]}, out, force=False)
    with pytest.raises(InvalidInput, match=r"out is not empty \(it holds README\.md\).*--force"):
        publish(FILES, out, force=False)
    assert tree(tmp_path) == {"out/README.md": b"old"}


def test_force_replaces_an_earlier_export_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish({"README.md": [b"old"], "rounds.png": [b"old"]}, out, force=False)
    publish(FILES, out, force=True)
    assert tree(tmp_path) == {"out/README.md": b"new card", "out/model.safetensors": b"weights"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_replacement_keeps_the_earlier_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish({"README.md": [b"old"]}, out, force=False)
    with pytest.raises(StorageFailed):
        publish({"README.md": disk_full()}, out, force=True)
    assert tree(tmp_path) == {"out/README.md": b"old"}


def test_force_never_removes_what_no_export_wrote(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(InvalidInput, match=r"holds thesis\.tex, which no export wrote"):
        publish(FILES, tmp_path, force=True)
    assert tree(tmp_path) == {"thesis.tex": b"three years"}


def test_folder_of_an_exports_name_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "README.md" / "notes").mkdir(parents=True)
    with pytest.raises(InvalidInput, match=r"README\.md, which no export wrote"):
        publish(FILES, tmp_path, force=True)


def test_file_and_mount_point_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InvalidInput, match="is not a folder"):
        publish(FILES, tmp_path / "out", force=True)
    with pytest.raises(InvalidInput, match="is a mount point"):
        publish(FILES, Path("/"), force=True)


def test_link_is_followed_and_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert publish(FILES, tmp_path / "link", force=False) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "README.md").read_bytes() == b"new card"

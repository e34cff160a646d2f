"""Makes a folder of files appear whole, or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from fedcore.errors import InvalidInput
from fedserver.export.base import FILES, MERGED_FILE
from fedserver.state.blobs import flush_folder
from fedserver.state.failures import storage_errors

Content: TypeAlias = Iterable[bytes | memoryview]


def publish(files: Mapping[str, Content], out: Path, *, force: bool) -> Path:
    """Write `files` into a hidden folder beside `out`, make them durable, and rename it to `out`.

    A crash leaves at most that hidden folder, `.NAME.*.partial`. With `force`, an earlier export is moved aside
    before and removed after.

    Returns:
        The folder, as an absolute path without symbolic links.

    Raises:
        InvalidInput: `out` is no folder or a mount point, or holds something and `force` is not set, or holds what
            no export wrote.
        StorageFailed: the operating system refused; nothing is left behind, an earlier export is still there.
    """
    with storage_errors(f"write {out}"):
        target = Path(os.path.realpath(out))
        replaces = _check_target(target, out, force=force)
        made = [folder for folder in target.parents if not folder.exists()]
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            for name, content in files.items():
                _write(temporary / name, content)
            flush_folder(temporary)
            if replaces:
                _swap(temporary, target)
            else:
                temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # the first that cannot be removed keeps those above it
                    folder.rmdir()
            raise
        for folder in (target, *made):
            with suppress(PermissionError):  # a parent that we may enter but not list
                flush_folder(folder.parent)
    return target


def _check_target(target: Path, shown: Path, *, force: bool) -> bool:
    """Return whether there is an earlier export to replace."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise InvalidInput(f"{shown} is not a folder: name a new one")
    if target.is_mount():
        raise InvalidInput(f"{shown} is a mount point, which cannot be replaced: name a folder inside it")
    names = sorted(path.name for path in target.iterdir())
    if names and not force:
        raise InvalidInput(f"folder {shown} is not empty (it holds {names[0]}): name another one, or use --force")
    written = FILES | _merged_files(target)
    foreign = [name for name in names if name not in written or not (target / name).is_file()]
    if foreign:
        raise InvalidInput(f"folder {shown} holds {foreign[0]}, which no export wrote: name another one")
    return bool(names)


def _merged_files(folder: Path) -> set[str]:
    """Return which files of a folder came with a merged model."""
    try:
        names = json.loads((folder / MERGED_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _write(path: Path, content: Content) -> None:
    with path.open("xb") as file:
        for chunk in content:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _swap(temporary: Path, target: Path) -> None:
    earlier = temporary.with_suffix(".replaced")
    target.rename(earlier)
    try:
        temporary.rename(target)
    except BaseException:
        earlier.rename(target)
        raise
    shutil.rmtree(earlier)

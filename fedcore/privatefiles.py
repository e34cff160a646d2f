"""Files that only their owner may read: keys, certificates, what names them, what a client remembers.

A file is replaced as a whole or not at all: written beside its target, flushed, renamed.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedcore.errors import NotFound, StateUnusable, StorageFailed

MAX_FILE_BYTES = 64 * 1024


def make_private_folder(folder: Path) -> None:
    """Make `folder` and its parents where they are missing, and close `folder` to everybody but its owner.

    Raises:
        StorageFailed: the operating system refused.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise StorageFailed(f"cannot prepare the folder {folder}: {error.strerror}") from error


def write_private(path: Path, *data: bytes | memoryview) -> None:
    """Write `data`, piece by piece, to `path`, mode 0600.

    After the return it is on disk, after a crash it is the old or the new file.

    Raises:
        StorageFailed: the operating system refused; an earlier file is still there, unharmed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            # The mode counts from the first byte on: no moment at which others could open the file.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise StorageFailed(f"cannot write {path}: {error.strerror}") from error


def remove_private(path: Path) -> None:
    """Remove `path`, durably; nothing happens if it is not there.

    Raises:
        StorageFailed: the operating system refused.
    """
    try:
        path.unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise StorageFailed(f"cannot remove {path}: {error.strerror}") from error


def read_private(path: Path) -> bytes:
    """Return what is in `path`.

    Raises:
        NotFound: there is no such file.
        StateUnusable: it cannot be read, or is longer than 64 KiB.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFound(f"{path} is missing") from error
    except OSError as error:
        raise StateUnusable(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise StateUnusable(f"{path} is damaged: longer than {MAX_FILE_BYTES} bytes")
    return data


def flush_folder(folder: Path) -> None:
    """Make it durable that files of `folder` have come, gone or changed names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The state folder: one place on disk that holds everything a server must not lose.

```
format          what this is: {"federation": ..., "format": 1}; written last, so a half-made folder has none
lock            flock'ed by the server that works here; holds its process id
keys/           the authority, the server's and the operators' keys and certificates
store.sqlite    records
blobs/ spool/ temporary/
```
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fedcore.errors import StateLocked, StateUnusable
from fedcore.names import check_name
from fedcore.privatefiles import write_private
from fedserver.state.blobs import FolderBlobs, flush_folder
from fedserver.state.failures import storage_errors
from fedserver.state.sqlite import SqliteStore

FORMAT: Final = 1
_FORMAT_FILE: Final = "format"
_MAX_FORMAT_BYTES: Final = 4096
_OURS: Final = frozenset(
    {
        "lock",
        "keys",
        "server.toml",
        "blobs",
        "spool",
        "temporary",
        "store.sqlite",
        "store.sqlite-wal",
        "store.sqlite-shm",
    }
)


class StateFolder:
    """A state folder that this process has locked. Made by `create` and `open`; as a context manager it closes itself.

    Attributes:
        path: the folder.
        federation: the federation's id.
        keys: the folder for keys and certificates, closed to everybody but the owner.
        store: the records.
        blobs: the blobs.
    """

    def __init__(self, path: Path, federation: str, lock: int) -> None:
        """Only for `create` and `open`: `lock` is the descriptor of the locked file, closed with the folder."""
        self.path = path
        self.federation = federation
        self.keys = path / "keys"
        self._lock: int | None = lock
        self.blobs = FolderBlobs(path)
        self.store = SqliteStore(path / "store.sqlite")

    @classmethod
    @contextmanager
    def create(cls, path: Path, federation: str) -> Iterator[Self]:
        """Make a state folder; within the block its keys are put in place. It exists when the block ends well.

        When the block raises, or the process dies, there is no state folder yet, and `create` can be called again.

        Raises:
            StateUnusable: there is a state folder already, or a folder with something else in it.
            StateLocked: another process is making it.
            StorageFailed: the operating system refused.
        """
        check_name(federation, "federation id")
        with storage_errors(f"create {path}"):
            if path.exists():
                _check_unfinished(path)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            lock = _lock(path)
        try:
            with storage_errors(f"create {path}"):
                _check_unfinished(path)  # again: another process may have been faster
                (path / "keys").mkdir(mode=0o700, exist_ok=True)
                with suppress(PermissionError):  # a parent that we may enter but not list
                    flush_folder(path.parent)
            folder = cls(path, federation, lock)
        except BaseException:
            os.close(lock)
            raise
        with folder:
            yield folder
            text = json.dumps({"federation": federation, "format": FORMAT}, sort_keys=True) + "\n"
            write_private(path / _FORMAT_FILE, text.encode("ascii"))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Lock and open a state folder.

        Raises:
            StateUnusable: missing, never finished, of another format, or damaged.
            StateLocked: another process works on it; the text names it.
            StorageFailed: read-only, full, forbidden, input/output error.
        """
        federation = read_format(path)
        with storage_errors(f"lock {path}"):
            lock = _lock(path)
        try:
            return cls(path, federation, lock)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Close the store and let the next process in; closing twice is harmless."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            self.store.close()
        finally:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_format(path: Path) -> str:
    """Return the federation id of the state folder at `path`, without locking it.

    Raises:
        StateUnusable: missing, never finished, of another format, or damaged.
        StorageFailed: it cannot be read.
    """
    file = path / _FORMAT_FILE
    with storage_errors(f"read {file}"):
        try:
            with file.open("rb") as opened:
                text = opened.read(_MAX_FORMAT_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StateUnusable(f"{path} is not a state folder: make one with `fedserver init`") from error
    try:
        content = json.loads(text)
        found, federation = content["format"], content["federation"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateUnusable(f"{file} is damaged: {text[:80]!r}") from error
    if type(found) is not int or not isinstance(federation, str):
        raise StateUnusable(f"{file} is damaged: {text[:80]!r}")
    if found != FORMAT:
        age = "newer" if found > FORMAT else "older"
        raise StateUnusable(f"{path} has format {found}, {age} than format {FORMAT}, which this fedserver reads")
    return federation


def _check_unfinished(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if _FORMAT_FILE in names:
        raise StateUnusable(f"{path} is a state folder already, of federation {read_format(path)!r}")
    if others := {name for name in names - _OURS if not name.startswith(f".{_FORMAT_FILE}.")}:
        raise StateUnusable(f"{path} has something else in it: {min(others)!r}; name a new or an empty folder")


def _lock(path: Path) -> int:
    """Return the descriptor of the locked file; the lock goes with it, however the process ends."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise StateLocked(f"{path} is in use by process {holder}") from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor

"""The demo's folder: made anew each time, and never anything else deleted."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedcore.errors import InvalidInput, StateLocked

MARKER: Final = ".roundtable-demo"


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Empty `folder` of an earlier demo, or make it, and hold it for the time of the context.

    Yields:
        Its absolute path.

    Raises:
        InvalidInput: it is there and no demo made it.
        StateLocked: another demo runs in it.
    """
    path = folder.absolute()
    marker = path / MARKER
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InvalidInput(f"{folder} is not a folder: name another one with --folder")
    path.mkdir(parents=True, exist_ok=True)
    if not marker.is_file() and (found := sorted(entry.name for entry in path.iterdir())):
        raise InvalidInput(f"{folder} holds {found[0]} and was not made by the demo: name another one with --folder")
    with marker.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateLocked(f"another demo runs in {folder}: name another one with --folder") from error
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != marker:  # goes last, so to speak never: an interrupted demo's folder stays known as one
                entry.unlink()
        yield path

"""The one place where errors of the operating system and of SQLite become errors of the state."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from fedcore.errors import StateUnusable, StorageFailed

# SQLITE_ERROR is said of wrong SQL. Ours is constant, so what does not fit it is a schema that is no longer ours.
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
# A wrong value: a bug of ours, as is an error without a code (a closed connection).
_BUGS = {None, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` or an SQLite error within the block into a `StateError`; `doing` names action and path.

    Raises:
        StateUnusable: the database is damaged.
        StorageFailed: everything else that the storage can do to us: full, read-only, forbidden, input/output error.
    """
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"cannot {doing}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:  # SQLite's message names what it has found in a damaged schema
        raise StateUnusable(f"cannot {doing}: the database is damaged ({error})") from error
    except sqlite3.Error as error:
        extended: int | None = getattr(error, "sqlite_errorcode", None)
        code = None if extended is None else extended & 0xFF
        if code is None and isinstance(error, sqlite3.OperationalError):  # Python's own: text that is not UTF-8
            raise StateUnusable(f"cannot {doing}: the database is damaged ({str(error)[:200]})") from error
        if code in _BUGS:
            raise
        if code in _DAMAGED:
            raise StateUnusable(f"cannot {doing}: the database is damaged ({error})") from error
        raise StorageFailed(f"cannot {doing}: {error} ({error.sqlite_errorname})") from error

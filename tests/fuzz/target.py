"""What a fuzz target is, and what the targets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

from fedcore.errors import FedError, UpdateRejected, UpdateResult


@dataclass(frozen=True)
class Target:
    """Something that reads hostile or damaged bytes.

    Attributes:
        name: what the command line calls it.
        read: hands the bytes over and checks what came of them. It returns when they were taken or refused as
            documented, and raises only when the code under test is wrong.
        seeds: makes valid and nearly valid inputs, from which mutation starts.
        max_bytes: of an input.
        runs: inputs that the tests try, some five seconds' worth; the same ones every time.
    """

    name: str
    read: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    max_bytes: int = 4096
    runs: int = 10_000


BOMBS: Final = (b"[" * 3000, b'{"a":' * 3000, b"9" * 5000)
"""Nested deeper, and with more digits, than Python reads: for parsers of JSON and TOML."""


def check_refusal(error: FedError) -> None:
    """A refusal goes to logs, terminals and peers: it can be written there, and says something."""
    assert str(error).encode(), f"{type(error).__name__} without a text"


def check_rejection(error: UpdateRejected, reason: UpdateResult) -> None:
    """An update was refused for the right reason."""
    assert error.reason is reason
    check_refusal(error)


def scratch_folder() -> Path:
    """Return a new folder for files to damage; it lies where the fuzzing process was told, and goes with that."""
    return Path(mkdtemp(prefix="fuzz-"))


class Reader:
    """Takes an input apart; after its end everything is zero or empty."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def is_empty(self) -> bool:
        return self._at >= len(self._data)

    def take(self, num_bytes: int) -> bytes:
        taken = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return taken

    def number(self, num_bytes: int = 1) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def rest(self) -> bytes:
        return self.take(len(self._data))

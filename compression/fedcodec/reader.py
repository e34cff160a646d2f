"""Hostile bytes, read from their start to their end."""

from __future__ import annotations

from fedcore.errors import FrameError

MAX_VARINT_BYTES = 6
"""42 bits: more than any count or position here."""


class Reader:
    """A place in some bytes."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes were not read yet."""
        return len(self._data) - self._at

    def take(self, num_bytes: int, what: str) -> memoryview:
        """Return the next bytes without copying them; `what` they are goes into the error.

        Raises:
            FrameError: there are fewer.
        """
        if num_bytes > self.left:
            raise FrameError(f"{what}: {num_bytes} bytes, {self.left} are left")
        start, self._at = self._at, self._at + num_bytes
        return self._data[start : self._at]

    def ahead(self, num_bytes: int) -> memoryview:
        """Return the next bytes, or as many as are left, without passing them: for what tells its own end."""
        return self._data[self._at : self._at + num_bytes]

    def varint(self, limit: int, what: str) -> int:
        """Return the next number, in base 128, low digits first, each but the last with 128 added.

        Raises:
            FrameError: it is cut short, above `limit`, or longer than it need be.
        """
        value = 0
        for place in range(MAX_VARINT_BYTES):
            digit = self.take(1, what)[0]
            value |= (digit & 0x7F) << (7 * place)
            if digit < 0x80:
                if digit == 0 and place:
                    raise FrameError(f"{what}: a number with a leading zero")
                break
        else:
            raise FrameError(f"{what}: a number of more than {MAX_VARINT_BYTES} bytes")
        if value > limit:
            raise FrameError(f"{what}: {value}, at most {limit}")
        return value

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            FrameError: something is.
        """
        if self.left:
            raise FrameError(f"{self.left} bytes after the end")


def varint(value: int) -> bytes:
    """Return a number from 0 on as `Reader.varint` reads it."""
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)

"""Zstandard over shuffled bytes. Format: Collet, Kucherawy: RFC 8878, 2021."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
import zstandard
from pydantic import Field

from fedcodec.base import LOSSLESS, Kind, Traits
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.plugin import Plugin

MAX_WINDOW_BYTES: Final = 1 << 23
"""What levels up to 19 look back at most."""

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SINGLE_SEGMENT: Final = 0x20
_OTHER_FLAGS: Final = 0x1F
"""Unused, reserved, checksum, dictionary id."""
_EMPTY: Final = _MAGIC + b"\x20\x00\x01\x00\x00"
_SIZE_FIELD: Final = ((0, 0), (2, 256), (4, 0), (8, 0))
"""By the two upper bits of the descriptor: length of the content size, and what is added to it."""
_CHUNK_WORDS: Final = 1 << 14
"""Words shuffled at once: they stay in a core's cache."""


class Zstd(Plugin):
    """Puts the first bytes of all words together, then the second ones and so on, and compresses the lot.

    The bytes of a float32 that hold sign and exponent are alike, those of the mantissa are not, so they
    compress better apart. At level 1 this is about as fast as the network of a data centre.

    The same library version writes the same bytes; another may write others, which decode to the same.
    """

    name: ClassVar[str] = "zstd"
    wire_id: ClassVar[int] = 60
    kind: ClassVar[Kind] = "compress"
    traits: ClassVar[Traits] = LOSSLESS

    level: Annotated[int, Field(ge=1, le=19, description="1 is fast, 19 is small.")] = 1
    width: Annotated[Literal[1, 2, 4], Field(description="Bytes of a word; 1 shuffles nothing.")] = 4

    def compress(self, data: bytes | memoryview) -> bytes:
        """See `Compressor.compress`."""
        return zstandard.ZstdCompressor(level=self.level).compress(_shuffle(data, self.width))

    def max_bytes(self, num_bytes: int) -> int:
        """See `Compressor.max_bytes`: ZSTD_compressBound."""
        return num_bytes + (num_bytes >> 8) + (max(0, (1 << 17) - num_bytes) >> 11)

    def decompress(self, data: memoryview, max_bytes: int) -> bytes | memoryview:
        """See `Compressor.decompress`; while words are put together again their bytes are held twice.

        What is refused is so by the frame's header, before the library sees it, or by the library, which
        holds no more than the declared size and two windows.
        """
        num_bytes = _declared_bytes(data)
        if num_bytes > max_bytes:
            raise FrameError(f"compressed: {num_bytes} bytes, at most {max_bytes}")
        if num_bytes == 0:
            if data != _EMPTY:  # which the library does not look at
                raise FrameError("compressed: more than nothing in a frame of 0 bytes")
            return b""
        try:
            shuffled = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompress(
                data, read_across_frames=False, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise FrameError(f"compressed: {error}") from error
        return _unshuffle(shuffled, self.width)


def _declared_bytes(data: memoryview) -> int:
    """Return the content size by the frame's header (RFC 8878, section 3.1.1.1), which is as `compress` writes it."""
    reader = Reader(data)
    magic = bytes(reader.take(len(_MAGIC), "compressed"))
    if magic != _MAGIC:
        raise FrameError(f"compressed: starts with {magic.hex()}, a zstd frame with {_MAGIC.hex()}")
    descriptor = reader.take(1, "compressed")[0]
    is_single = bool(descriptor & _SINGLE_SEGMENT)
    if descriptor & _OTHER_FLAGS:
        raise FrameError(f"compressed: descriptor {descriptor:#04x} with a checksum, a dictionary or a reserved bit")
    window_bytes = 0
    if not is_single:
        window = reader.take(1, "compressed")[0]
        window_bytes = (8 + (window & 7)) << (7 + (window >> 3))
    length, added = _SIZE_FIELD[descriptor >> 6]
    if length == 0 and is_single:
        length = 1
    if length == 0:
        raise FrameError("compressed: content size is missing")
    num_bytes = int.from_bytes(reader.take(length, "compressed"), "little") + added
    if length != _size_field_bytes(num_bytes, is_single):
        raise FrameError(f"compressed: content size {num_bytes} in {length} bytes, which is more than it takes")
    if is_single:
        window_bytes = num_bytes
    if window_bytes > MAX_WINDOW_BYTES:
        raise FrameError(f"compressed: window of {window_bytes} bytes, at most {MAX_WINDOW_BYTES}")
    return num_bytes


def _size_field_bytes(num_bytes: int, is_single: bool) -> int:
    """Return how many bytes the content size takes; there is no field of one byte beside a window."""
    if num_bytes < 1 << 8 and is_single:
        return 1
    return 2 if num_bytes < (1 << 16) + (1 << 8) else 4 if num_bytes < (1 << 32) - 1 else 8


def _shuffle(data: bytes | memoryview, width: int) -> bytes | memoryview:
    """Return byte 0 of each word, then byte 1 of each, …, then what is left behind the last word."""
    if width == 1:
        return data
    source = np.frombuffer(data, dtype=np.uint8)
    num_words = source.size // width
    words = source[: num_words * width].view(f"<u{width}")
    found = np.empty(source.size, dtype=np.uint8)
    found[num_words * width :] = source[num_words * width :]
    lanes = found[: num_words * width].reshape(width, num_words)
    for start in range(0, num_words, _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        for place in range(width):
            lanes[place, start : start + _CHUNK_WORDS] = (chunk >> (8 * place)).astype(np.uint8)
    return found.data


def _unshuffle(data: bytes, width: int) -> bytes | memoryview:
    if width == 1:
        return data
    source = np.frombuffer(data, dtype=np.uint8)
    num_words = source.size // width
    found = np.empty(source.size, dtype=np.uint8)
    found[num_words * width :] = source[num_words * width :]
    words: npt.NDArray[np.unsignedinteger] = found[: num_words * width].view(f"<u{width}")
    lanes = source[: num_words * width].reshape(width, num_words)
    for start in range(0, num_words, _CHUNK_WORDS):
        chunk = lanes[0, start : start + _CHUNK_WORDS].astype(words.dtype)
        for place in range(1, width):
            chunk |= lanes[place, start : start + _CHUNK_WORDS].astype(words.dtype) << (8 * place)
        words[start : start + _CHUNK_WORDS] = chunk
    return found.data

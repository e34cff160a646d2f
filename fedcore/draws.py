"""Draws that nobody else can repeat: what a client hides, it hides by them.

`fedcore.rng` is for everything that others may know, because it follows from the job's seed.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32


class PrivateDraws:
    """Random numbers from a secret: the methods of numpy's `Generator` that codecs use, on a ChaCha20 key stream.

    Floats have all bits that numpy gives them. Not thread-safe.

    Args:
        secret: known to nobody else.
        keys: what the draws are for; other keys give independent draws, the same keys the same.
    """

    def __init__(self, secret: bytes, *keys: bytes) -> None:
        info = b"roundtable draws" + b"".join(len(key).to_bytes(4, "little") + key for key in keys)
        key = HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def bytes(self, length: int) -> bytes:
        """Return so many bytes of the key stream."""
        return self._stream.update(bytes(length))

    def random(self, size: int, dtype: Any = np.float64) -> npt.NDArray[Any]:
        """Return numbers uniform in [0, 1): multiples of 2^-53, or 2^-24 for float32."""
        if dtype == np.float32:
            words = np.frombuffer(self.bytes(4 * size), dtype="<u4")
            return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        return (np.frombuffer(self.bytes(8 * size), dtype="<u8") >> np.uint64(11)) * 2.0**-53

    def standard_exponential(self, size: int) -> npt.NDArray[np.float64]:
        """Return numbers of mean 1, by inversion: at most 53 ln 2."""
        found: npt.NDArray[np.float64] = -np.log(1.0 - self.random(size))
        return found

    def standard_normal(self, size: int) -> npt.NDArray[np.float64]:
        """Return numbers of mean 0 and variance 1, by Box and Muller's transform: at most 8.6 in magnitude."""
        half = -(-size // 2)
        radius = np.sqrt(2 * self.standard_exponential(half))
        angle = 2 * np.pi * self.random(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


Draws = np.random.Generator | PrivateDraws
"""Where a codec draws from."""

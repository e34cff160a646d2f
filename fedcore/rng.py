"""One seed per job; independent streams by key.

Every random choice in Roundtable comes from a stream named by what it is for, so that retry, replay, simulator and
daemon draw the same numbers, and adding one draw somewhere moves no other stream.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed for the stream named by `keys`.

    The seed is the head of SHA-256 over an unambiguous encoding of `seed` and `keys` (each with its type and length),
    so different key lists never share a stream by accident: ``("a", "b")`` is not ``("ab",)``, ``1`` is not ``"1"``.
    """
    digest = hashlib.sha256()
    for part in (seed, *keys):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def stream(seed: int, *keys: str | int) -> np.random.Generator:
    """Return numpy's default generator for the stream named by `keys`."""
    return np.random.default_rng(derive_seed(seed, *keys))

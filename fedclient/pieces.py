"""A frame in pieces, as a codec made it: not put together, for that would take memory for all of it once more."""

from __future__ import annotations

import hashlib


class Pieces:
    """Bytes that lie in several places. `len` and slices (step 1, copied) are those of the whole."""

    def __init__(self, *pieces: bytes | memoryview) -> None:
        self._pieces = tuple(memoryview(piece).cast("B") for piece in pieces)
        self._num_bytes = sum(map(len, self._pieces))

    def __len__(self) -> int:
        return self._num_bytes

    def __getitem__(self, part: slice) -> bytes:
        start, stop, step = part.indices(self._num_bytes)
        if step != 1:
            raise ValueError(f"step {step}: only 1")
        found = []
        for piece in self._pieces:
            found.append(piece[max(0, start) : max(0, stop)])
            start, stop = start - len(piece), stop - len(piece)
        return b"".join(found)

    def sha256(self) -> str:
        """Return the digest of the whole in hex."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(piece)
        return digest.hexdigest()

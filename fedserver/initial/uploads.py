"""The weights of adapters on their way from the operator: into a spool, and whole into a blob named by its SHA-256.

A job names the blob only after that. One that no job names stays on the disk, as other blobs do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from fedcore.errors import InvalidInput, NotFound, UpdateRejected
from fedserver.initial.adapter import MAX_ADAPTER_BYTES
from fedserver.state.base import Blobs, Bytes
from fedserver.state.checks import check_digest

T = TypeVar("T")


class InWorker(Protocol):
    """Calls a function, which may use the disk, in a worker thread; a disk that fails stops the server."""

    async def __call__(self, call: Callable[[], T]) -> T: ...  # noqa: D102


class AdapterUploads:
    """Takes weights in chunks, resumably. Used on the event loop's thread; one chunk at a time is written.

    What is unfinished when the server ends is begun anew after it.
    """

    def __init__(self, blobs: Blobs, in_worker: InWorker) -> None:
        self._blobs, self._in_worker = blobs, in_worker
        self._turn = asyncio.Lock()

    async def held(self, digest: str, num_bytes: int) -> int:
        """Return how many of the announced bytes are here: where to go on; all of them: they are durable.

        Raises:
            InvalidInput: not a digest, or a size out of bounds, or not that of the bytes with this digest.
        """
        check_digest(digest)
        if not 0 < num_bytes <= MAX_ADAPTER_BYTES:
            raise InvalidInput(f"an adapter of {num_bytes} bytes, expected 1 to {MAX_ADAPTER_BYTES}")
        async with self._turn:
            return await self._in_worker(partial(self._held, digest, num_bytes))

    async def append(self, digest: str, num_bytes: int, offset: int, data: Bytes) -> None:
        """Take the next chunk, after `held`; with the last one the weights are made durable.

        A caller whose connection breaks meanwhile changes nothing about that.

        Raises:
            InvalidInput: the chunk does not start where the last one ended or goes on after the announced end; or the
                whole has another digest, and is forgotten.
        """
        await asyncio.shield(asyncio.create_task(self._append(digest, num_bytes, offset, data)))

    async def _append(self, digest: str, num_bytes: int, offset: int, data: Bytes) -> None:
        async with self._turn:
            await self._in_worker(partial(self._write, digest, num_bytes, offset, data))

    def _held(self, digest: str, num_bytes: int) -> int:
        if digest not in self._blobs:
            return self._blobs.spool(_key(digest)).num_bytes
        if (size := self._blobs.size(digest)) != num_bytes:
            raise InvalidInput(f"adapter {digest} has {size} bytes, announced are {num_bytes}")
        return size

    def _write(self, digest: str, num_bytes: int, offset: int, data: Bytes) -> None:
        spool, end = self._blobs.spool(_key(digest)), offset + len(data)
        if offset != spool.num_bytes or end > num_bytes:
            raise InvalidInput(
                f"chunk of bytes {offset} to {end}, expected one from {spool.num_bytes} to at most {num_bytes}"
            )
        try:
            spool.append(data)
            if end == num_bytes:
                spool.seal(digest, num_bytes)
        except (UpdateRejected, NotFound) as error:
            raise InvalidInput(f"adapter {digest}: {error}") from error


def _key(digest: str) -> str:
    return f"adapter-{digest[:56]}"

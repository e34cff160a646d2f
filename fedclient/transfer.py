"""Frames down and updates up, resumed where a broken connection left them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator

from fedclient.backoff import Retry
from fedclient.declining import Declined
from fedclient.plans import MAX_JOBS
from fedclient.transport.base import Transport
from fedclient.updates import Update
from fedcore.errors import Unreachable, UpdateRejected
from fedcore.messages import CHUNK_BYTES, MESSAGE_BYTES, Assignment, Piece, UploadState


class Frames:
    """The versions' frames: small ones came with their assignment, large ones are downloaded.

    The newest downloaded one of each job is kept: what was trained from may be evaluated next.

    Args:
        transport: the way to the server.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._kept: OrderedDict[str, tuple[str, memoryview]] = OrderedDict()

    def at_hand(self, assignment: Assignment) -> memoryview | None:
        """Return the assignment's frame if it need not be downloaded. Nobody may write to it.

        Raises:
            Declined: what came with the assignment is not what it announces.
        """
        if assignment.frame:
            _check_digest(hashlib.sha256(assignment.frame).hexdigest(), assignment)
            return memoryview(assignment.frame)
        digest, kept = self._kept.get(assignment.job_id, ("", memoryview(b"")))
        return kept if digest == assignment.frame_digest and len(kept) == assignment.frame_bytes else None

    async def download(self, assignment: Assignment, max_bytes: int, retry: Retry) -> memoryview:
        """Return the assignment's frame, whole and with the right digest. Nobody may write to it.

        It is gone when the next version of the job is downloaded.

        Args:
            assignment: says which frame, of what length and digest.
            max_bytes: what a frame of this job can have at most; checked before anything is allocated.
            retry: spaces the tries.

        Raises:
            Declined: the announced length is impossible, or what came is not what was announced.
            NotFound: the server no longer has this version.
            Unreachable: the deadline passed.
        """
        if not 0 < assignment.frame_bytes <= max_bytes:
            raise Declined(
                f"a frame of {assignment.frame_bytes} bytes was announced; for this job it has 1 to {max_bytes}"
            )
        # In the memory of the last one: a client needs room for one version of a job only, and fresh memory is slow.
        _, frame = self._kept.pop(assignment.job_id, ("", memoryview(b"")))
        if len(frame) != assignment.frame_bytes:
            margin = -assignment.frame_bytes % 4  # the values of a raw frame, at its end, lie aligned
            frame = memoryview(bytearray(margin + assignment.frame_bytes))[margin:]
        await self._fetch(frame, assignment, retry)
        self._kept[assignment.job_id] = (assignment.frame_digest, frame)
        while len(self._kept) > MAX_JOBS:
            self._kept.popitem(last=False)
        return frame

    async def basis(self, assignment: Assignment, num_bytes: int, retry: Retry) -> memoryview:
        """Return the basis of the assignment's version, of which the digest is still to be checked; not kept.

        Raises:
            Declined, NotFound, Unreachable: as for `download`.
        """
        basis = memoryview(bytearray(num_bytes))
        await self._fill(basis, assignment, retry, Piece.BASIS)
        return basis

    async def change(self, assignment: Assignment, version: int, max_bytes: int, retry: Retry) -> memoryview:
        """Return what `version` changes of the frozen matrices, of which the digest is still to be checked; not kept.

        Raises:
            Declined: it is longer than `max_bytes`.
            NotFound, Unreachable: as for `download`.
        """
        change = bytearray()
        while True:
            try:
                async for chunk in self._transport.download(assignment.job_id, version, len(change), Piece.CHANGE):
                    if len(change) + len(chunk) > max_bytes:
                        raise Declined(f"the change of version {version} has more than {max_bytes} bytes")
                    change += chunk
                    retry.progressed()
                return memoryview(change)
            except Unreachable as error:
                await retry.wait(error)

    async def _fetch(self, frame: memoryview, assignment: Assignment, retry: Retry) -> None:
        found = await self._fill(frame, assignment, retry)
        if found != assignment.frame_digest:
            # Once more from the start: a server that was restarted may have encoded the version anew in between.
            found = await self._fill(frame, assignment, retry)
        _check_digest(found, assignment)

    async def _fill(self, frame: memoryview, assignment: Assignment, retry: Retry, piece: Piece = Piece.FRAME) -> str:
        """Download into `frame` and return the digest of what came."""
        digest = hashlib.sha256()
        offset = 0
        while offset < len(frame):
            chunks = self._transport.download(assignment.job_id, assignment.version, offset, piece)
            try:
                async for chunk in chunks:
                    if offset + len(chunk) > len(frame):
                        raise Declined(f"the {piece} goes on after the {len(frame)} bytes that it should have")
                    frame[offset : offset + len(chunk)] = chunk
                    digest.update(chunk)
                    offset += len(chunk)
                    retry.progressed()
                if offset < len(frame):
                    raise Unreachable(f"the download ended at {offset} of {len(frame)} bytes")
            except Unreachable as error:
                await retry.wait(error)
            finally:
                if isinstance(chunks, AsyncGenerator):
                    await chunks.aclose()
        return digest.hexdigest()


def _check_digest(found: str, assignment: Assignment) -> None:
    if found != assignment.frame_digest:
        raise Declined(f"the frame has digest {found}, {assignment.frame_digest} was announced")


async def deliver(transport: Transport, update: Update, retry: Retry) -> UploadState:
    """Send an update until the server says what became of it; the returned state has a result.

    Raises:
        Refused: the server does not take it at all.
        Unreachable: the deadline passed.
    """
    small = len(update.header) + len(update.frame) <= MESSAGE_BYTES
    while True:
        try:
            if small:
                state = await transport.send_update(update.header, update.signature, update.frame[:])
            else:
                state = await _resume(transport, update, retry)
            if state.result is not None:
                return state
            raise Unreachable(
                f"the server holds {state.received_bytes} of {len(update.frame)} bytes and gave no result"
            )
        except UpdateRejected as error:
            return UploadState(0, error.reason, str(error))
        except Unreachable as error:
            # A line that was too slow for the whole of it takes it in chunks, and goes on where it broke.
            small = small and len(update.frame) <= CHUNK_BYTES
            await retry.wait(error)


async def _resume(transport: Transport, update: Update, retry: Retry) -> UploadState:
    state = await transport.upload_state(update.update_id)
    if state.result is not None:
        return state
    offset = state.received_bytes if state.received_bytes <= len(update.frame) else 0
    if offset:
        retry.progressed()
    return await transport.upload(update.header, update.signature, update.frame, offset)

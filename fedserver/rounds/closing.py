"""How a version is made: from the mean of the updates, through the server's optimiser, to bytes on disk.

Runs in a worker thread, block by block. Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedagg.base import Fold
from fedagg.optimizers.base import ServerOptimizer
from fedcore.layout import Layout, Vector
from fedcore.messages import WorkKind
from fedcore.rng import stream
from fedserver.rounds.admission import layout_of
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.plan import INITIAL, Plan
from fedserver.state.base import Blobs, VersionRecord

BLOCK_VALUES = 1 << 18


@dataclass(frozen=True)
class WrittenVersion:
    """A version on disk.

    Attributes:
        number: the version.
        layout: of its vector.
        state_blob: the global state, raw little-endian float32.
        frame_blob: what clients download.
        optimizer_blob: the server optimiser's state; None if it keeps none, or before its first step.
    """

    number: int
    layout: Layout
    state_blob: str
    frame_blob: str
    optimizer_blob: str | None

    def record(self, attempt: Attempt, uplink_bytes: int, downlink_bytes: int, wall_s: float) -> VersionRecord:
        """Return what is journaled of it."""
        return VersionRecord(
            job_id=attempt.record.job_id,
            version=self.number,
            state_blob=self.state_blob,
            frame_blob=self.frame_blob,
            optimizer_blob=self.optimizer_blob,
            num_updates=len(attempt.headers),
            num_examples=sum(header.num_examples for header in attempt.headers.values()),
            uplink_bytes=uplink_bytes,
            downlink_bytes=downlink_bytes,
            created_at=wall_s,
        )


def write_version(
    blobs: Blobs, plan: Plan, attempt: Attempt, layout: Layout | None, latest: VersionRecord | None
) -> WrittenVersion:
    """Compute and write the version that a sealed attempt leads to.

    Args:
        blobs: where to read from and write to.
        plan: of the job.
        attempt: holds at least one accepted update.
        layout: of the job; None as long as there is no version.
        latest: the version that the updates were computed from; None as long as there is none.
    """
    if attempt.kind is WorkKind.INITIALISE:
        return _first_version(blobs, plan, attempt)
    assert layout is not None
    assert latest is not None
    assert attempt.fold is not None
    return _next_version(blobs, plan, attempt.fold, layout, latest)


def _first_version(blobs: Blobs, plan: Plan, attempt: Attempt) -> WrittenVersion:
    ((client, header),) = attempt.headers.items()
    layout = layout_of(header)
    with blobs.writer() as state:
        for block in INITIAL.blocks(blobs.open(attempt.frames[client]), layout.num_values):
            state.write(np.ascontiguousarray(block, dtype="<f4").data.cast("B"))
        state_blob = state.commit()
    return WrittenVersion(0, layout, state_blob, _write_frame(blobs, plan, state_blob, 0), None)


def _next_version(blobs: Blobs, plan: Plan, fold: Fold, layout: Layout, latest: VersionRecord) -> WrittenVersion:
    """Write base + optimiser(mean of the updates).

    The optimiser's state is kept block by block, each block's slots one after the other, so that it is read and written
    in one pass.
    """
    number, optimizer = latest.version + 1, plan.optimizer
    base_D = np.frombuffer(blobs.open(latest.state_blob), dtype="<f4")
    slots = _slot_blocks(blobs, latest.optimizer_blob, optimizer, base_D.size)
    with blobs.writer() as state, blobs.writer() as kept:
        start = 0
        for mean in fold.mean_blocks(BLOCK_VALUES):
            slot_block = next(slots)
            step = optimizer.step(mean, slot_block, number)
            state.write((base_D[start : start + mean.size] + step).data.cast("B"))
            for name in optimizer.slots:
                kept.write(slot_block[name].data.cast("B"))
            start += mean.size
        state_blob = state.commit()
        optimizer_blob = kept.commit() if optimizer.slots else None
    del base_D, slots  # the frame is read from the new state: one version at a time is in memory
    return WrittenVersion(number, layout, state_blob, _write_frame(blobs, plan, state_blob, number), optimizer_blob)


def _slot_blocks(
    blobs: Blobs, digest: str | None, optimizer: ServerOptimizer, num_values: int
) -> Iterator[dict[str, Vector]]:
    stored = None if digest is None else np.frombuffer(blobs.open(digest), dtype="<f4")
    position = 0
    for start in range(0, num_values, BLOCK_VALUES):
        size = min(BLOCK_VALUES, num_values - start)
        block: dict[str, Vector] = {}
        for name in optimizer.slots:
            if stored is None:
                block[name] = np.full(size, optimizer.initial(name), dtype=np.float32)
            else:
                block[name] = stored[position : position + size].copy()
            position += size
        yield block


def _write_frame(blobs: Blobs, plan: Plan, state_blob: str, version: int) -> str:
    """Encode a version once for all clients."""
    state_D = np.frombuffer(blobs.open(state_blob), dtype="<f4")
    with blobs.writer() as frame:
        for part in plan.downlink.parts(state_D, stream(plan.job.job.seed, "downlink", version)):
            frame.write(part)
        return frame.commit()

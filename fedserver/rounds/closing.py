"""How a version is made: from the mean of the updates, through the server's optimiser, to bytes on disk.

Runs in a worker thread, block by block. Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedagg.base import Fold
from fedagg.optimizers.base import ServerOptimizer
from fedcodec import Pipeline
from fedcore.layout import Vector
from fedcore.rng import stream
from fedserver.state.base import Blobs

BLOCK_VALUES = 1 << 18


@dataclass(frozen=True)
class WrittenVersion:
    """Blobs of a version: the global state, the frame that clients download, and the optimiser's state."""

    state_blob: str
    frame_blob: str
    frame_bytes: int
    optimizer_blob: str | None


def first_version(blobs: Blobs, state_D: Vector, downlink: Pipeline, seed: int) -> WrittenVersion:
    """Write version 0 from the initial vector. No optimiser state exists before the first step."""
    state_blob = blobs.put(np.ascontiguousarray(state_D, dtype="<f4").data.cast("B"))
    frame_blob, frame_bytes = _write_frame(blobs, state_blob, downlink, seed, version=0)
    return WrittenVersion(state_blob, frame_blob, frame_bytes, None)


def next_version(
    blobs: Blobs,
    base: str,
    optimizer_blob: str | None,
    fold: Fold,
    optimizer: ServerOptimizer,
    downlink: Pipeline,
    *,
    version: int,
    seed: int,
) -> WrittenVersion:
    """Write version `version` = base + optimiser(mean of the updates).

    The optimiser's state is kept block by block, each block's slots one after the other, so that it is read and written
    in one pass.

    Args:
        blobs: where to read from and write to.
        base: the digest of the state that the updates were computed from.
        optimizer_blob: of the version before; None before the first step.
        fold: holds at least one update.
        optimizer: as in the job.
        downlink: as in the job.
        version: the number of the new version, at least 1.
        seed: the job's.
    """
    base_D = np.frombuffer(blobs.open(base), dtype="<f4")
    slots = _slot_blocks(blobs, optimizer_blob, optimizer, base_D.size)
    with blobs.writer() as state, blobs.writer() as kept:
        start = 0
        for mean in fold.mean_blocks(BLOCK_VALUES):
            slot_block = next(slots)
            step = optimizer.step(mean, slot_block, version)
            state.write((base_D[start : start + mean.size] + step).data.cast("B"))
            for name in optimizer.slots:
                kept.write(slot_block[name].data.cast("B"))
            start += mean.size
        state_blob = state.commit()
        new_optimizer_blob = kept.commit() if optimizer.slots else None
    frame_blob, frame_bytes = _write_frame(blobs, state_blob, downlink, seed, version)
    return WrittenVersion(state_blob, frame_blob, frame_bytes, new_optimizer_blob)


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


def _write_frame(blobs: Blobs, state_blob: str, downlink: Pipeline, seed: int, version: int) -> tuple[str, int]:
    """Encode a version once for all clients."""
    state_D = np.frombuffer(blobs.open(state_blob), dtype="<f4")
    frame = downlink.encode(state_D, stream(seed, "downlink", version))
    return blobs.put(frame), len(frame)

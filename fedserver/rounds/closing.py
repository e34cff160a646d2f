"""How a version is made: from the mean of the updates, through the server's optimiser, to bytes on disk.

Runs in a worker thread, block by block. Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fedagg import FactorRule
from fedagg.optimizers.base import ServerOptimizer
from fedagg.weighted_mean import WeightedMean
from fedcore.changes import compact_above, next_revision
from fedcore.errors import InvalidInput, JobFailed
from fedcore.layout import Layout, Vector
from fedcore.messages import WorkKind
from fedcore.rng import stream
from fedserver.initial.adapter import GivenValues
from fedserver.initial.tensors import TensorFile
from fedserver.rounds.admission import layout_of
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.contributors import over_contributors
from fedserver.rounds.factors import Merger, compact
from fedserver.rounds.figures import mean_encoding_error
from fedserver.rounds.noise import next_clip, noise_of
from fedserver.rounds.plan import INITIAL, Plan
from fedserver.rounds.traffic import VALUE_BYTES, Volume
from fedserver.state.records import BlobRecord, JobRecord, VersionRecord
from fedserver.state.vault import RELEASE_BYTES, Kept, Vault, passing, release

BLOCK_VALUES = 1 << 18


class Frame(NamedTuple):
    """A version as clients download it: `digest` is of head and body together."""

    digest: str
    head: bytes
    body: Kept


class Base(NamedTuple):
    """The frozen matrices of a version; `VersionRecord` says what each field is."""

    change_blob: str | None = None
    revision: str = ""
    since: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class WrittenVersion:
    """A version on disk.

    Attributes:
        number: the version.
        layout: of its vector.
        state_blob: the global state, raw little-endian float32.
        frame: what clients download.
        optimizer_blob: the server optimiser's state; None if it keeps none, or before its first step.
        basis_blob: what the start of the job has set for good; None for a job without, and before its start.
        base: the frozen matrices.
        clip: of the updates that are computed from it; None: what the job says.
        base_digest: of the base model that version 0 was made with; None: nothing of that is frozen, or not version 0.
        small: those of these bytes that are to be journaled with the version's record.
    """

    number: int
    layout: Layout
    state_blob: str
    frame: Frame
    optimizer_blob: str | None
    basis_blob: str | None
    small: tuple[BlobRecord, ...]
    base: Base = field(default_factory=Base)
    base_digest: str | None = None
    clip: float | None = None

    def job(self, record: JobRecord) -> JobRecord:
        """Return what is journaled of the job beside it."""
        if self.number:
            return record
        return replace(record, layout=self.layout.to_json(), base_digest=self.base_digest)

    def record(self, attempt: Attempt, volume: Volume, wall_s: float, epsilon: float | None) -> VersionRecord:
        """Return what is journaled of it; `epsilon` is what a private job has spent by it."""
        return VersionRecord(
            job_id=attempt.record.job_id,
            version=self.number,
            state_blob=self.state_blob,
            frame_digest=self.frame.digest,
            frame_head=self.frame.head,
            frame_body=self.frame.body.digest,
            optimizer_blob=self.optimizer_blob,
            num_updates=len(attempt.headers),
            num_examples=sum(header.num_examples for header in attempt.headers.values()),
            **asdict(volume),
            created_at=wall_s,
            encoding_error=mean_encoding_error(attempt.headers.values()),
            basis_blob=self.basis_blob,
            change_blob=self.base.change_blob,
            revision=self.base.revision,
            changed_since=self.base.since,
            changed_bytes=self.base.num_bytes,
            epsilon=epsilon,
            clip=self.clip,
        )


def write_version(
    vault: Vault,
    plan: Plan,
    attempt: Attempt,
    layout: Layout | None,
    latest: VersionRecord | None,
    adapter: str | None,
) -> WrittenVersion:
    """Compute and write the version that a sealed attempt leads to.

    Args:
        vault: where to read from and write to.
        plan: of the job.
        attempt: holds at least one accepted update.
        layout: of the job; None as long as there is no version.
        latest: the version that the updates were computed from; None as long as there is none.
        adapter: digest of the PEFT weights that version 0 takes its values from; None: from the client.

    Raises:
        JobFailed: those weights are not the ones that the job trains; or, of a start from gradients, see there.
        StateUnusable: a blob that it is computed from is missing, or has lost or gained bytes. Digests are
            compared only when a job is recovered: that would cost each round most of a second for a GiB.
    """
    if attempt.kind is WorkKind.INITIALISE:
        return _first_version(vault, plan, attempt, adapter)
    assert layout is not None
    assert latest is not None
    if attempt.kind is WorkKind.GRADIENT:
        return _start(vault, plan, attempt, layout, latest)
    if isinstance(plan.rule, FactorRule):
        return _merged_version(vault, plan, attempt, layout, latest)
    return _next_version(vault, plan, attempt, layout, latest)


def _first_version(vault: Vault, plan: Plan, attempt: Attempt, adapter: str | None) -> WrittenVersion:
    ((client, header),) = attempt.headers.items()
    layout = layout_of(header)
    try:
        given = None if adapter is None else GivenValues(TensorFile(vault.open(adapter)), layout)
    except InvalidInput as error:
        raise JobFailed(f"the adapter that the job was to start from does not fit: {error}") from error
    sent = vault.open(attempt.frames[client], header.frame_bytes)
    with vault.writer() as state, vault.writer() as basis:
        moving, first = layout.moving.num_values, layout if plan.start is None else layout.moving
        for part in passing(INITIAL.open(sent, first.sizes), sent):
            values = np.ascontiguousarray(part.dense(), dtype="<f4")
            if given is not None:
                values = values.copy()  # it may be a view of the frame
                given.fill(values, part.start)
            trained = max(0, min(values.size, moving - part.start))
            state.write(values[:trained].data.cast("B"))
            basis.write(values[trained:].data.cast("B"))
        written = state.commit()
        written_basis = basis.commit() if first.num_basis_values else None
    version = _written(0, layout, written, _write_frame(vault, plan, layout, written, 0), None, written_basis)
    return replace(version, base_digest=header.base_digest)


def _start(vault: Vault, plan: Plan, attempt: Attempt, layout: Layout, latest: VersionRecord) -> WrittenVersion:
    """Write version 1 of a job that starts from its clients' gradients, and its basis."""
    assert plan.start is not None
    number = latest.version + 1
    base_D = np.frombuffer(vault.open(latest.state_blob, VALUE_BYTES * layout.moving.num_values), dtype="<f4")

    def frames() -> Iterator[memoryview]:
        for client, kept in sorted(attempt.frames.items()):
            yield vault.open(kept, attempt.headers[client].frame_bytes)

    noise = noise_of(plan.accounting, attempt, latest, start=True)
    values_D, basis = plan.start.factors(layout, base_D, frames, None if noise is None else noise.on_sum)
    with vault.writer() as state, vault.writer() as kept:
        state.write(np.ascontiguousarray(values_D, dtype="<f4").data.cast("B"))
        kept.write(np.ascontiguousarray(basis, dtype="<f4").data.cast("B"))
        written, written_basis = state.commit(), kept.commit()
    return _written(number, layout, written, _write_frame(vault, plan, layout, written, number), None, written_basis)


def _next_version(vault: Vault, plan: Plan, attempt: Attempt, layout: Layout, latest: VersionRecord) -> WrittenVersion:
    """Write base + optimiser(mean of the updates).

    The optimiser's state is kept block by block, each block's slots one after the other, so that it is read and written
    in one pass.
    """
    number, optimizer, fold = latest.version + 1, plan.optimizer, attempt.fold
    assert fold is not None
    means = fold.mean_blocks(BLOCK_VALUES)
    if isinstance(plan.rule, WeightedMean) and plan.rule.over == "contributors":
        weights = {client: plan.weight_of(header) for client, header in attempt.headers.items()}
        means = over_contributors(means, layout.moving, plan.sending, weights)
    base = vault.open(latest.state_blob, VALUE_BYTES * layout.moving.num_values)
    base_D = np.frombuffer(base, dtype="<f4")
    if (noise := noise_of(plan.accounting, attempt, latest, start=False)) is not None:
        means = noise.on_mean(means)
    slots = _slot_blocks(vault, latest.optimizer_blob, optimizer, base_D.size)
    with vault.writer() as state, vault.writer() as kept:
        start = 0
        for mean in passing(means, base):
            slot_block = next(slots)
            step = optimizer.step(mean, slot_block, number)
            state.write((base_D[start : start + mean.size] + step).data.cast("B"))
            for name in optimizer.slots:
                kept.write(slot_block[name].data.cast("B"))
            start += mean.size
        written = state.commit()
        written_slots = kept.commit() if optimizer.slots else None
    # Fresh memory is slow at first: the next version is summed in the same. It is used on the event loop's thread again
    # only after this function has ended.
    fold.clear()
    del base_D, slots  # the frame is read from the new state: one version at a time is in memory
    frame = _write_frame(vault, plan, layout, written, number)
    version = _written(number, layout, written, frame, written_slots, None)
    return replace(version, basis_blob=latest.basis_blob, clip=next_clip(plan.accounting, attempt, latest))


def _merged_version(
    vault: Vault, plan: Plan, attempt: Attempt, layout: Layout, latest: VersionRecord
) -> WrittenVersion:
    """Write what a rule over factors makes of the updates, and what it changes of the frozen matrices."""
    number = latest.version + 1
    base_D = np.frombuffer(vault.open(latest.state_blob, VALUE_BYTES * layout.moving.num_values), dtype="<f4")
    with vault.writer() as state, vault.writer() as change:
        Merger(vault, plan, attempt, layout, base_D).write(state, change)
        written, written_change = state.commit(), change.commit()
    frame = _write_frame(vault, plan, layout, written, number)
    version = _written(number, layout, written, frame, None, None)
    if not plan.changes_base:
        return version
    base, small = _changed(vault, layout, latest, written_change)
    return replace(version, base=base, small=(*version.small, *small))


def _changed(vault: Vault, layout: Layout, latest: VersionRecord, change: Kept) -> tuple[Base, list[BlobRecord]]:
    """Return the frozen matrices after one more change.

    When all changes together have grown to twice what one can have at most, one takes their place, and clients begin
    again with that: nobody has to download more, however late he joins.
    """
    number = latest.version + 1
    base = Base(
        change.digest,
        next_revision(latest.revision, change.digest),
        latest.changed_since or number,
        latest.changed_bytes + len(vault.open(change)),
    )
    if base.num_bytes > compact_above(layout):
        with vault.writer() as writer:
            compact(vault, layout, [*vault.changes(latest), change], writer)
            change = writer.commit()
        base = Base(change.digest, next_revision("", change.digest), number, len(vault.open(change)))
    return base, [] if change.record is None else [change.record]


def _written(
    number: int, layout: Layout, state: Kept, frame: Frame, slots: Kept | None, basis: Kept | None
) -> WrittenVersion:
    parts = (state, frame.body, slots, basis)
    small = tuple(kept.record for kept in parts if kept is not None and kept.record is not None)
    slots_blob, basis_blob = (None if kept is None else kept.digest for kept in (slots, basis))
    return WrittenVersion(number, layout, state.digest, frame, slots_blob, basis_blob, small)


def _slot_blocks(
    vault: Vault, digest: str | None, optimizer: ServerOptimizer, num_values: int
) -> Iterator[dict[str, Vector]]:
    num_bytes = VALUE_BYTES * num_values * len(optimizer.slots)
    stored = None if digest is None else np.frombuffer(vault.open(digest, num_bytes), dtype="<f4")
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


def _write_frame(vault: Vault, plan: Plan, layout: Layout, state: Kept, version: int) -> Frame:
    """Encode a version once for all clients. What equals the state is not written a second time."""
    values = vault.open(state)
    state_D = np.frombuffer(values, dtype="<f4")
    head, *pieces = plan.downlink.parts(state_D, stream(plan.job.job.seed, "downlink", version), layout.moving.sizes)
    digest = hashlib.sha256(head)
    payload = [piece for piece in pieces if len(piece)]
    is_state = len(payload) == 1 and np.may_share_memory(np.frombuffer(payload[0], dtype=np.uint8), state_D)
    with vault.writer() as body:
        for piece in payload:
            for start in range(0, len(piece), RELEASE_BYTES):
                part = piece[start : start + RELEASE_BYTES]
                digest.update(part)
                if not is_state:
                    body.write(part)
                release(values)
        return Frame(digest.hexdigest(), bytes(head), state if is_state else body.commit())

"""Whether an update may count: by its header, before any of its bytes are taken, and by every value of its frame."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from fedagg import FactorRule
from fedcore.adapters import gradient_layout
from fedcore.changes import changed_modules
from fedcore.errors import FrameError, LayoutError, Unauthenticated, UpdateRejected, UpdateResult
from fedcore.identity import verify
from fedcore.layout import Layout
from fedcore.messages import SIGNATURE_CONTEXT, UpdateHeader, WorkKind
from fedcore.part import Part
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.noise import follows_norms, largest_norm, within
from fedserver.rounds.start import MAX_GRADIENT
from fedserver.state.base import Store
from fedserver.state.vault import passing

if TYPE_CHECKING:
    from fedserver.rounds.engine import JobEngine

CHUNK_VALUES: Final = 1 << 16
"""Values looked at at once: what is computed on the way stays in a core's cache."""


def check_signature(client: str, key: bytes | None, header_bytes: bytes, signature: bytes) -> None:
    """Check that a client has signed these bytes.

    Raises:
        UpdateRejected: BAD_SIGNATURE.
    """
    if key is None:
        raise UpdateRejected(UpdateResult.BAD_SIGNATURE, f"client {client!r} has no signing key")
    try:
        verify(key, SIGNATURE_CONTEXT, header_bytes, signature)
    except Unauthenticated as error:
        raise UpdateRejected(UpdateResult.BAD_SIGNATURE, str(error)) from error


def find_attempt(client: str, header: UpdateHeader, engine: JobEngine, store: Store) -> Attempt:
    """Return the attempt that an announced update belongs to.

    Raises:
        UpdateRejected: NOT_ASSIGNED or TOO_LATE, the job does not wait for this from this client.
    """
    attempt = engine.attempt
    expected = None if attempt is None else attempt.assignments.get(header.assignment_id)
    if attempt is None or expected is None or expected.client != client:
        known = store.assignment(header.assignment_id)
        if known is None or known.client != client or known.job_id != engine.job_id:
            raise UpdateRejected(UpdateResult.NOT_ASSIGNED, f"no assignment {header.assignment_id} for {client!r}")
        raise UpdateRejected(UpdateResult.TOO_LATE, f"assignment {header.assignment_id} is over")
    if attempt.is_sealed:
        raise UpdateRejected(UpdateResult.TOO_LATE, f"version {attempt.version} has closed")
    return attempt


def check_header(client: str, header: UpdateHeader, attempt: Attempt, engine: JobEngine) -> None:
    """Check that an update is what its assignment asked for, and no larger than it can be.

    Raises:
        UpdateRejected: WRONG_VERSION, WRONG_LAYOUT, WRONG_BASE, WRONG_SIZE or OUT_OF_BOUNDS.
    """
    if header.kind is not attempt.kind or header.version != attempt.version:
        raise UpdateRejected(
            UpdateResult.WRONG_VERSION,
            f"{header.kind} of version {header.version}, assigned was {attempt.kind} of {attempt.version}",
        )
    layout = layout_for(client, header, attempt, engine)
    whole = engine.layout
    if attempt.kind is WorkKind.INITIALISE:
        whole = layout_of(header)
        _check_layout(whole, engine)
    assert whole is not None
    if header.layout_digest != whole.digest:
        raise UpdateRejected(
            UpdateResult.WRONG_LAYOUT, f"layout {header.layout_digest[:12]}, the job's is {whole.digest[:12]}"
        )
    pinned = engine.record.base_digest
    if attempt.kind is WorkKind.INITIALISE and pinned is not None and header.base_digest != pinned:
        raise UpdateRejected(
            UpdateResult.WRONG_BASE, f"made with base model {header.base_digest or 'none'}, the job pins {pinned}"
        )
    limit = engine.plan.max_frame_bytes(attempt.kind, layout)
    if header.frame_bytes > limit:
        raise UpdateRejected(UpdateResult.WRONG_SIZE, f"frame of {header.frame_bytes} bytes, at most {limit}")
    basis = None if engine.latest is None else engine.latest.basis_blob
    if header.basis_digest != basis:
        raise UpdateRejected(
            UpdateResult.WRONG_LAYOUT,
            f"computed with basis {(header.basis_digest or 'none')[:12]}, the job's is {(basis or 'none')[:12]}",
        )
    revision = None if engine.latest is None else engine.latest.revision or None
    if header.base_revision != revision:
        raise UpdateRejected(
            UpdateResult.WRONG_LAYOUT,
            f"computed with frozen matrices of revision {(header.base_revision or 'none')[:12]},"
            f" the job's is {(revision or 'none')[:12]}",
        )
    if attempt.kind in (WorkKind.GRADIENT, WorkKind.TRAIN) and header.num_examples < 1:
        raise UpdateRejected(UpdateResult.OUT_OF_BOUNDS, "num_examples 0, an update needs at least 1")
    votes = attempt.kind is WorkKind.TRAIN and follows_norms(engine.plan.accounting)
    if votes is not (header.within_clip is not None):
        raise UpdateRejected(
            UpdateResult.MALFORMED,
            f"within_clip is {header.within_clip}: {'0 or 1' if votes else 'none'} is due",
        )


def _check_layout(layout: Layout, engine: JobEngine) -> None:
    """Check once that the job can work with the layout that it is to have from then on."""
    try:
        if engine.plan.start is not None:
            gradient_layout(layout)
        if isinstance(engine.plan.rule, FactorRule):
            changed_modules(layout)
    except LayoutError as error:
        raise UpdateRejected(UpdateResult.WRONG_LAYOUT, str(error)) from error


def check_frame(client: str, header: UpdateHeader, attempt: Attempt, engine: JobEngine, frame: memoryview) -> None:
    """Decode a whole frame once and look at every value, before it can touch the sum. Runs in a worker thread.

    Raises:
        UpdateRejected: MALFORMED, NOT_FINITE or OUT_OF_BOUNDS.
    """
    pipeline = engine.plan.pipeline_of(attempt.kind)
    if pipeline is None:
        return
    try:
        parts = pipeline.open(frame, layout_for(client, header, attempt, engine).sizes)
        limit = MAX_GRADIENT if attempt.kind is WorkKind.GRADIENT else engine.job.aggregator.max_abs
        clip = largest_norm(engine.plan.accounting, attempt.kind, engine.latest)
        check_values(passing(parts if clip is None else within(parts, clip), frame), limit)
    except FrameError as error:
        raise UpdateRejected(UpdateResult.MALFORMED, str(error)) from error


def check_values(parts: Iterable[Part], max_abs: float) -> None:
    """Look at every value; an entry of a book that no value has, and a `rest` that none is left to, do no harm.

    Raises:
        UpdateRejected: NOT_FINITE or OUT_OF_BOUNDS; the text names the first such value, its place and the bound.
    """
    for part in parts:
        book = part.book
        # A comparison is false for NaN too.
        if book is None or book.size > part.given_n.size or not (np.abs(book) <= max_abs).all():
            _check_each(part, max_abs)
        if part.given_n.size < part.size and not abs(part.rest) <= max_abs:
            _refuse_value(part.rest, f"what is not sent of the values from {part.start} on", max_abs)


def _check_each(part: Part, max_abs: float) -> None:
    for start in range(0, part.given_n.size, CHUNK_VALUES):
        values = part._replace(given_n=part.given_n[start : start + CHUNK_VALUES]).values_n
        is_fine = np.abs(values) <= max_abs
        if not is_fine.all():
            index = int(np.argmin(is_fine))
            place = start + index if part.positions_n is None else int(part.positions_n[start + index])
            _refuse_value(float(values[index]), f"value {part.start + place}", max_abs)


def _refuse_value(value: float, what: str, max_abs: float) -> NoReturn:
    if not math.isfinite(value):
        raise UpdateRejected(UpdateResult.NOT_FINITE, f"{what} is {value}")
    raise UpdateRejected(UpdateResult.OUT_OF_BOUNDS, f"{what} is {value:g}, at most {max_abs:g} is allowed")


def layout_for(client: str, header: UpdateHeader, attempt: Attempt, engine: JobEngine) -> Layout:
    """Return the layout of the update's frame: in its own header for INITIALISE, from then on what the client trains.

    Raises:
        UpdateRejected: see `layout_of`.
    """
    if attempt.kind is WorkKind.INITIALISE:
        # What a job starts from gradients has its basis later.
        return layout_of(header) if engine.plan.start is None else layout_of(header).moving
    assert engine.layout is not None
    if attempt.kind is WorkKind.GRADIENT:
        return gradient_layout(engine.layout)
    return engine.plan.sending.layout(engine.layout, client, attempt.version)


def layout_of(header: UpdateHeader) -> Layout:
    """Return the layout in an INITIALISE header.

    Raises:
        UpdateRejected: WRONG_LAYOUT, there is none or it is not one.
    """
    try:
        return Layout.from_json(json.dumps(header.layout).encode())
    except LayoutError as error:
        raise UpdateRejected(UpdateResult.WRONG_LAYOUT, str(error)) from error

"""Error feedback: what encoding left out of an update is kept, and added to the next one.

A client computes from version w, sends C(c) for c = difference + e, and keeps e' = c − C(c) under w before it sends.
With its next assignment the server says which version holds its newest update, and so which e' is the true one: that
of the version this update was computed from. What came too late, was refused, or died with its round took nothing
away, and an update that is made twice is the same twice.

Source: Stich, Cordonnier, Jaggi: Sparsified SGD with Memory, 2018, algorithm 1; Karimireddy, Rebjock, Stich, Jaggi:
Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019, algorithm 2.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from fedcore.jobfile import ErrorFeedbackSection
from fedcore.layout import Vector
from fedcore.messages import MAX_METRIC, Assignment
from fedcore.part import Part, dense_blocks
from fedcore.privatefiles import make_private_folder, remove_private, write_private

MAX_JOBS: Final = 16
"""Jobs whose residuals are kept. Nobody tells a client that a job is over."""
BLOCK_VALUES: Final = 1 << 18

_FILE: Final = re.compile(r"([0-9a-f]{32})\.(\d{1,15})")
_log: Final = logging.getLogger(__name__)


class Residuals(Protocol):
    """Keeps what was left out, by job and the version that was worked on. Used on one thread."""

    def load(self, job_id: str, version: int, num_values: int) -> Vector | None:
        """Return a residual, the caller's own; None if there is none of this length."""
        ...

    def save(self, job_id: str, version: int, residual_D: Vector) -> None:
        """Keep a residual, in place of an earlier one; durable when it returns.

        Raises:
            StorageFailed: it cannot be kept; the earlier one is still there.
        """
        ...

    def retain(self, job_id: str, versions: Collection[int]) -> None:
        """Drop every other residual of the job.

        Raises:
            StorageFailed: it cannot be removed.
        """
        ...


class MemoryResiduals:
    """See `Residuals`. Nothing survives it: for the simulator."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Vector] = {}

    def load(self, job_id: str, version: int, num_values: int) -> Vector | None:
        """See `Residuals.load`."""
        found = self._kept.get((job_id, version))
        return None if found is None or found.size != num_values else found.copy()

    def save(self, job_id: str, version: int, residual_D: Vector) -> None:
        """See `Residuals.save`."""
        self._kept[job_id, version] = residual_D.copy()

    def retain(self, job_id: str, versions: Collection[int]) -> None:
        """See `Residuals.retain`."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] != job_id or key[1] in versions}


class FileResiduals:
    """See `Residuals`. One file for each, ``JOB.VERSION``: a SHA-256, then the values as little-endian float32.

    The digest is over names, numbers and values, so a damaged file and one that came from elsewhere look alike: the
    log says so, and it counts as none. Jobs beyond the newest `MAX_JOBS` are forgotten.

    Args:
        folder: of the client; ``residuals`` in it is made when it is needed.
        federation: that the client belongs to.
        client: its name.
    """

    def __init__(self, folder: Path, federation: str, client: str) -> None:
        self._folder = folder / "residuals"
        self._whose = [federation, client]

    def load(self, job_id: str, version: int, num_values: int) -> Vector | None:
        """See `Residuals.load`."""
        path = self._path(job_id, version)
        residual_D = np.empty(num_values, dtype="<f4")
        try:
            with path.open("rb") as file:
                digest = file.read(hashlib.sha256().digest_size)
                is_whole = file.readinto(residual_D.data.cast("B")) == residual_D.nbytes and not file.read(1)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("residual is lost", extra={"file": str(path), "reason": error.strerror})
            return None
        if not is_whole or digest != self._digest(job_id, version, residual_D):
            reason = "damaged, or of another client, job or layout"
            _log.warning("residual is lost", extra={"file": str(path), "reason": reason})
            return None
        return residual_D

    def save(self, job_id: str, version: int, residual_D: Vector) -> None:
        """See `Residuals.save`."""
        stored_D = np.ascontiguousarray(residual_D, dtype="<f4")
        make_private_folder(self._folder)
        write_private(self._path(job_id, version), self._digest(job_id, version, stored_D), stored_D.data.cast("B"))
        _log.debug("residual kept", extra={"job": job_id, "version": version})
        self._forget_old_jobs(job_id)

    def retain(self, job_id: str, versions: Collection[int]) -> None:
        """See `Residuals.retain`."""
        for path, job, version in self._files():
            if job == job_id and version not in versions:
                remove_private(path)
        for path in self._folder.glob(".*"):  # what a kill has cut short: nobody else writes here
            remove_private(path)

    def _forget_old_jobs(self, newest: str) -> None:
        written: dict[str, int] = {}
        for path, job, _ in self._files():
            written[job] = max(written.get(job, 0), path.stat().st_mtime_ns)
        # The clock may have been put back: the job in hand is the newest, whatever its files say.
        by_age = sorted(written, key=lambda job: (job == newest, written[job]))
        for job in by_age[:-MAX_JOBS]:
            self.retain(job, ())

    def _files(self) -> Iterator[tuple[Path, str, int]]:
        for path in self._folder.glob("*.*"):
            if name := _FILE.fullmatch(path.name):
                yield path, name[1], int(name[2])

    def _path(self, job_id: str, version: int) -> Path:
        return self._folder / f"{job_id}.{version}"

    def _digest(self, job_id: str, version: int, stored_D: Vector) -> bytes:
        digest = hashlib.sha256(json.dumps([*self._whose, job_id, version]).encode())
        digest.update(stored_D.data.cast("B"))
        return digest.digest()


def corrected(residuals: Residuals, feedback: ErrorFeedbackSection, assignment: Assignment, delta_D: Vector) -> Vector:
    """Return `delta_D` plus what was left out of this client's newest update that counts, as a vector of the caller's.

    What is kept of other versions than that one and the assignment's own can never count again, and is dropped.

    Raises:
        StorageFailed: see `Residuals.retain`.
    """
    base = assignment.counted_in - 1  # what that update was computed from
    age = assignment.version - base
    is_good = base >= 0 and 1 <= age <= feedback.max_age
    residuals.retain(assignment.job_id, {assignment.version, *([base] if is_good else [])})
    residual_D = residuals.load(assignment.job_id, base, delta_D.size) if is_good else None
    if residual_D is None:
        return delta_D.copy()
    residual_D *= np.float32(feedback.decay ** (age - 1))
    residual_D += delta_D
    return residual_D


def encoding_error(values_D: Vector, parts: Iterable[Part], *, subtract: bool = False) -> float | None:
    """Return ‖x − C(x)‖ / ‖x‖, in L2 norms; None if that is no number that could be sent.

    Args:
        values_D: x.
        parts: C(x), decoded.
        subtract: leave x − C(x) in `values_D`.
    """
    start, before, after = 0, 0.0, 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # training may have gone astray
        for block in dense_blocks(parts, BLOCK_VALUES):
            values = values_D[start : start + block.size]
            before += _energy(values)
            after += _energy(np.subtract(values, block, out=values if subtract else None))
            start += block.size
    if not before:
        return None if after else 0.0
    error = math.sqrt(after / before)
    return error if error <= MAX_METRIC else None


def _energy(values: Vector) -> float:
    wide = values.astype(np.float64)
    return float(wide @ wide)

"""What has crossed the wire for a job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from fedcore.layout import Layout
from fedcore.messages import WorkKind
from fedserver.metrics import Metrics
from fedserver.rounds.attempt import Attempt

VALUE_BYTES: Final = 4  # float32


class Counts(Protocol):
    """What has byte counts."""

    @property
    def uplink_bytes(self) -> int: ...  # noqa: D102
    @property
    def raw_uplink_bytes(self) -> int: ...  # noqa: D102
    @property
    def downlink_bytes(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Volume:
    """Byte counts; `fedserver.state.records.VersionRecord` says of what."""

    uplink_bytes: int = 0
    raw_uplink_bytes: int = 0
    downlink_bytes: int = 0

    @staticmethod
    def of(rows: Iterable[Counts]) -> Volume:
        """Return the sum."""
        total = Volume()
        for row in rows:
            total += row
        return total

    def __add__(self, other: Counts) -> Volume:
        return Volume(
            self.uplink_bytes + other.uplink_bytes,
            self.raw_uplink_bytes + other.raw_uplink_bytes,
            self.downlink_bytes + other.downlink_bytes,
        )


class Traffic:
    """Counts a job's bytes, here and for Prometheus. Used on the event loop's thread.

    Attributes:
        recent: since the last version.
        before: up to the last version.
    """

    def __init__(self, job_id: str, metrics: Metrics) -> None:
        self._job_id, self._metrics = job_id, metrics
        self.recent = self.before = Volume()

    def received(self, attempt: Attempt, assignment_id: str, num_bytes: int, sent: Layout | None) -> None:
        """Count bytes of an update, whatever becomes of it; with the first ones, what its values had been raw.

        `sent` is the layout of an update from training, else None.
        """
        raw_bytes = 0
        if sent is not None and assignment_id not in attempt.heard_of:
            raw_bytes = VALUE_BYTES * sent.num_values
            self._metrics.raw_received(self._job_id, raw_bytes)
        attempt.heard_of.add(assignment_id)
        self.recent += Volume(uplink_bytes=num_bytes, raw_uplink_bytes=raw_bytes)
        self._metrics.transferred(self._job_id, "uplink", attempt.kind.value, num_bytes)

    def sent(self, kind: WorkKind, num_bytes: int) -> None:
        """Count bytes of a download."""
        self.recent += Volume(downlink_bytes=num_bytes)
        self._metrics.transferred(self._job_id, "downlink", kind.value, num_bytes)

    def close(self) -> None:
        """Begin to count for the next version."""
        self.before, self.recent = self.before + self.recent, Volume()

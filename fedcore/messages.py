"""What client and server say to each other, free of any transport.

The gRPC services and the in-process transport of the simulator both carry exactly these values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.names import NAME_PATTERN

CHUNK_BYTES: Final = 1 << 20
MESSAGE_BYTES: Final = 2 << 20
"""A frame of at most so many bytes travels whole within the session, a larger one in chunks in a stream of its own."""
MAX_HEADER_BYTES: Final = 1 << 20
MAX_METRICS: Final = 32
MAX_METRIC: Final = 1e30
"""Largest magnitude of a metric: sums over any number of clients and examples stay finite."""
SIGNATURE_CONTEXT: Final = b"roundtable-update-v1"
ERROR_CODE_KEY: Final = "rt-error-code"
"""Trailing metadata of a failed call: the permanent `code` of one of our errors."""
ERROR_REASON_KEY: Final = "rt-reason"
"""Likewise, for a rejected update: its `UpdateResult`."""


class WorkKind(StrEnum):
    """What an assignment asks for."""

    INITIALISE = "initialise"
    GRADIENT = "gradient"
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class Hello:
    """How a client introduces itself. Its name is not among this: that is in its certificate."""

    software: str
    device: str
    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    codecs: tuple[str, ...]
    assignment_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """The client is there; `progress` (0 to 1) of the work it has in hand."""

    assignment_id: str = ""
    progress: float = 0.0


@dataclass(frozen=True)
class Decline:
    """The client will not or cannot do the work, and why; `transient`: not now, but perhaps another time."""

    assignment_id: str
    reason: str
    transient: bool = False


@dataclass(frozen=True)
class SmallUpdate:
    """A whole update; header and frame have at most `MESSAGE_BYTES` together.

    Attributes:
        number: chosen by the client; the answer bears it too.
        header: `UpdateHeader` as the very bytes that were signed.
        signature: over `header`.
        frame: empty for an evaluation.
    """

    number: int
    header: bytes
    signature: bytes
    frame: bytes


class Piece(StrEnum):
    """Which bytes of a version a client downloads."""

    FRAME = "frame"
    BASIS = "basis"
    CHANGE = "change"


@dataclass(frozen=True)
class Assignment:
    """Work for one client.

    Attributes:
        job: the job as canonical JSON (`fedcore.jobfile.Job.from_json`).
        version: the global state to start from.
        seed: of the client's random stream for this work.
        layout_digest: empty for `WorkKind.INITIALISE`, as are `frame_digest` and `frame_bytes`.
        frame_digest: SHA-256 (hex) of the version's frame.
        deadline_s: seconds from now.
        frame: all of it if it has at most `MESSAGE_BYTES`; else empty, and the frame is to be downloaded.
        basis_digest: SHA-256 (hex) of what the start of the job has set for good (`fedcore.layout.BASIS_GROUP`), raw
            float32; empty if there is nothing of that kind, or not yet. A client downloads it once.
        counted_in: the newest version that holds an update of this client, which was computed from the one before; 0:
            none, or the job has no error feedback or forgets one of that age.
        base_revision: of the frozen matrices that the work is to be done with (`fedcore.changes`); empty: as they were
            in the beginning.
        changed_since: the version whose change of them is the first that a client needs which has none; 0: there is
            none. Each version from then on has one.
        base_digest: of the base model that the job is for (`UpdateHeader.base_digest`); empty: not known, or none.
        clip: largest L2 norm of the update, where that follows the updates' norms; 0: what the job says.
    """

    assignment_id: str
    job_id: str
    job: bytes
    version: int
    kind: WorkKind
    seed: int
    layout_digest: str
    frame_digest: str
    frame_bytes: int
    deadline_s: float
    frame: bytes = b""
    counted_in: int = 0
    basis_digest: str = ""
    base_revision: str = ""
    changed_since: int = 0
    base_digest: str = ""
    clip: float = 0.0


@dataclass(frozen=True)
class Cancel:
    """The work is no longer wanted, and why."""

    assignment_id: str
    reason: str


@dataclass(frozen=True)
class UploadState:
    """How far an upload is. `result` is None while it is incomplete; once set it is durable and final."""

    received_bytes: int
    result: UpdateResult | None = None
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """What became of the `SmallUpdate` of that number."""

    number: int
    state: UploadState


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
MetricName = Annotated[str, Field(pattern=NAME_PATTERN)]
MetricValue = Annotated[float, Field(ge=-MAX_METRIC, le=MAX_METRIC)]
Metrics = Annotated[dict[MetricName, MetricValue], Field(max_length=MAX_METRICS)]
Count = Annotated[int, Field(ge=0, lt=2**48)]


class UpdateHeader(BaseModel):
    """What an update says about itself. These bytes are signed, sent and journaled, never serialised a second time.

    Attributes:
        update_id: 32 hex digits chosen by the client; the same id counts once.
        federation: the server it is meant for, so that it proves nothing elsewhere.
        version: the global state that the update was computed from.
        frame_digest: SHA-256 (hex) of the frame; an evaluation has none (no bytes, digest of nothing).
        num_examples: the update's weight before the job's cap.
        metrics: of the training.
        evaluation: of `version` on the client's held-out data, over `evaluated_examples` examples.
        encoding_error: ‖x − C(x)‖ / ‖x‖, what the codecs leave out of what they were given; None where that is nothing
            or nobody's business. The canonical form then lacks the key.
        basis_digest: of the basis that this was computed with; None for a job without. The canonical form then lacks
            the key.
        base_revision: of the frozen matrices that this was computed with; None: as they were in the beginning. The
            canonical form then lacks the key.
        base_digest: only for `WorkKind.INITIALISE`: of the weights of the sender's base model that are not trained,
            as `fedclient.basedigest` defines it; None where there are none. The canonical form then lacks the key.
        within_clip: 1 if the update was no longer than the clip before it was clipped, 0 if it was (of one length, for
            lengths are published); where no clip follows that None, and the canonical form lacks the key.
        layout: rows of the layout, only for `WorkKind.INITIALISE`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    federation: Annotated[str, Field(pattern=NAME_PATTERN)]
    update_id: ShortId
    assignment_id: ShortId
    job_id: ShortId
    version: Count
    kind: WorkKind
    layout_digest: Digest
    frame_bytes: Count
    frame_digest: Digest
    num_examples: Count
    metrics: Metrics = Field(default_factory=dict)
    evaluated_examples: Annotated[int, Field(ge=0, le=2**31)] = 0
    evaluation: Metrics = Field(default_factory=dict)
    encoding_error: Annotated[float, Field(ge=0, le=MAX_METRIC)] | None = None
    basis_digest: Digest | None = None
    base_revision: Digest | None = None
    base_digest: Digest | None = None
    within_clip: Annotated[int, Field(ge=0, le=1)] | None = None
    layout: list[Any] | None = None  # of Any, for checking each value as `JsonValue` takes seconds for a long header

    @field_validator("kind", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return WorkKind(value) if isinstance(value, str) else value

    @field_validator("layout")
    @classmethod
    def _can_be_written(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None:
            json.dumps(value, allow_nan=False)  # NaN, which pydantic reads within Any, is not JSON
        return value

    def to_bytes(self) -> bytes:
        """Return the canonical form: JSON with sorted keys, no spaces, ASCII."""
        optional = ("base_digest", "base_revision", "basis_digest", "encoding_error", "within_clip")
        absent = {name for name in optional if getattr(self, name) is None}
        tree = self.model_dump(mode="json", exclude=absent)
        return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii")

    @staticmethod
    def from_bytes(data: bytes) -> UpdateHeader:
        """Read a header; the input is hostile.

        Raises:
            UpdateRejected: MALFORMED, naming the first offending field.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise UpdateRejected(UpdateResult.MALFORMED, f"header of {len(data)} bytes, at most {MAX_HEADER_BYTES}")
        try:
            # In two steps, because pydantic's own reading would copy the whole input for each error in it.
            return UpdateHeader.model_validate(from_json(data), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            path = ".".join(["header", *map(str, first["loc"])])[:80]
            value = "" if isinstance(first["input"], list | dict) else f", got {str(first['input'])[:80]!r}"
            raise UpdateRejected(UpdateResult.MALFORMED, f"{path}: {first['msg']}{value}") from error
        except ValueError as error:
            raise UpdateRejected(UpdateResult.MALFORMED, f"header: Invalid JSON: {error}") from error

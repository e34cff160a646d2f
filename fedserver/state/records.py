"""What is recorded: small facts, one class of record for each kind.

`KEY` names the fields that identify a record. Times are seconds since 1970 (UTC).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypeAlias

from fedcore.errors import UpdateResult
from fedcore.messages import WorkKind


class JobStatus(StrEnum):
    """What became of a job."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """An enrolled client. Enrolling again replaces the record, and with it the serial that is accepted.

    Attributes:
        serial: of the certificate in force, hexadecimal.
        signing_key: the public key that its updates are signed with.
    """

    KEY: ClassVar[tuple[str, ...]] = ("name",)

    name: str
    serial: str
    signing_key: bytes
    enrolled_at: float
    expires_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """An enrolment token, known by the SHA-256 (hex) of its secret. Once used it cannot be written again."""

    KEY: ClassVar[tuple[str, ...]] = ("secret_sha256",)

    secret_sha256: str
    client: str
    created_at: float
    expires_at: float
    used_at: float | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job.

    Attributes:
        spec: canonical JSON (`fedcore.jobfile.Job`).
        failure: why it failed or was stopped; else empty.
        layout: the layout's bytes; None until version 0 exists.
        base_digest: of the base model that it is for (`fedcore.messages.UpdateHeader`): what the job file pins, else
            what version 0 was made with; None: not known yet, or nothing is frozen.
        adapter_blob: the PEFT weights (safetensors) whose values version 0 has; None: it has what the adapter draws.
        privacy: what a private job had spent when this was written (`fedserver.rounds.privacy.Spending`), JSON; None:
            it is not private, or has no version yet.
    """

    KEY: ClassVar[tuple[str, ...]] = ("job_id",)

    job_id: str
    name: str
    spec: bytes
    status: JobStatus
    submitted_at: float
    finished_at: float | None = None
    failure: str = ""
    layout: bytes | None = None
    base_digest: str | None = None
    adapter_blob: str | None = None
    privacy: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One try at computing a version, or at an evaluation.

    Attributes:
        outcome: empty while it is open, then "closed" or "abandoned".
        reason: why it was abandoned.
        available: how many clients there were to choose from; 0 after an abandoned attempt.
    """

    KEY: ClassVar[tuple[str, ...]] = ("job_id", "version", "attempt", "kind")

    job_id: str
    version: int
    attempt: int
    kind: WorkKind
    opened_at: float
    deadline_at: float
    closed_at: float | None = None
    outcome: str = ""
    reason: str = ""
    available: int = 0


@dataclass(frozen=True, slots=True)
class AssignmentRecord:
    """Work given to one client within an attempt.

    Attributes:
        ended: empty while the work is wanted, then "done", "declined", "lost" or "expired".
        text: the client's reason for declining, or what else is worth reading.
    """

    KEY: ClassVar[tuple[str, ...]] = ("assignment_id",)

    assignment_id: str
    job_id: str
    version: int
    attempt: int
    kind: WorkKind
    client: str
    assigned_at: float
    ended: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """An update that was looked at, accepted or not. Written once, never changed.

    Attributes:
        update_id: 32 hex digits chosen by the client.
        text: why it was rejected; else empty.
        header: the signed bytes (`fedcore.messages.UpdateHeader`).
        blob: SHA-256 (hex) of the frame; None where no frame is kept.
        metrics: JSON.
    """

    KEY: ClassVar[tuple[str, ...]] = ("update_id",)

    update_id: str
    assignment_id: str
    job_id: str
    version: int
    attempt: int
    kind: WorkKind
    client: str
    result: UpdateResult
    text: str
    header: bytes
    signature: bytes
    blob: str | None
    frame_bytes: int
    num_examples: int
    metrics: str
    received_at: float


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version of a job's global state.

    Attributes:
        state_blob: the vector, raw little-endian float32.
        frame_digest: SHA-256 (hex) of what clients download: `frame_head`, then the bytes of `frame_body`.
        frame_head: the frame's own header.
        frame_body: the blob of its payload, which is `state_blob` where values travel as they are.
        optimizer_blob: the server optimiser's state; None for one without.
        uplink_bytes: of the updates received for it: frames, headers and signatures.
        raw_uplink_bytes: 4 for each value of each training update of which a byte is in `uplink_bytes`.
        downlink_bytes: sum of the frames sent out to compute it.
        metrics: JSON; the evaluation of *this* version, known only later.
        encoding_error: mean of what its updates say of themselves; None if none does.
        basis_blob: what the start of the job has set for good, raw little-endian float32; None for a job without, and
            before its start.
        change_blob: what this version changes of the frozen matrices (`fedcore.changes`); None: nothing.
        revision: of the frozen matrices; empty as long as they are as they were.
        changed_since: the version whose change is the first that is needed by who has none; 0: there is none.
        changed_bytes: of the changes from then on.
        epsilon: what the job has spent by it, of the client that has released most; None: it is not private.
        clip: of the updates that are computed from it; None: what the job says.
    """

    KEY: ClassVar[tuple[str, ...]] = ("job_id", "version")

    job_id: str
    version: int
    state_blob: str
    frame_digest: str
    frame_head: bytes
    frame_body: str
    optimizer_blob: str | None
    num_updates: int
    num_examples: int
    uplink_bytes: int
    downlink_bytes: int
    created_at: float
    metrics: str = "{}"
    raw_uplink_bytes: int = 0
    encoding_error: float | None = None
    basis_blob: str | None = None
    change_blob: str | None = None
    revision: str = ""
    changed_since: int = 0
    changed_bytes: int = 0
    epsilon: float | None = None
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """What clients of a private job have let out with one attempt. Written before anything is computed from it.

    Attributes:
        clients: their names, as a JSON list; or `fedprivacy.jobs.EVERYBODY`.
        released: what each of them has (`fedprivacy.events.Release`), JSON.
    """

    KEY: ClassVar[tuple[str, ...]] = ("job_id", "version", "attempt", "kind")

    job_id: str
    version: int
    attempt: int
    kind: WorkKind
    clients: str
    released: str
    released_at: float


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """Bytes that are too few for a blob of their own. Writing the same again changes nothing.

    Attributes:
        digest: SHA-256 (hex) of `data`.
    """

    KEY: ClassVar[tuple[str, ...]] = ("digest",)

    digest: str
    data: bytes


Record: TypeAlias = (
    ClientRecord
    | TokenRecord
    | JobRecord
    | AttemptRecord
    | AssignmentRecord
    | UpdateRecord
    | VersionRecord
    | ReleaseRecord
    | BlobRecord
)

"""What a job's clients are told to do."""

from __future__ import annotations

from fedcore.layout import Layout
from fedcore.messages import MESSAGE_BYTES, Assignment, WorkKind
from fedcore.rng import derive_seed
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.counted import Counted
from fedserver.state.records import VersionRecord
from fedserver.state.vault import Vault


class Orders:
    """Writes a job's assignments. A small frame goes with each of them and is read once for all.

    Args:
        job_id: of the job.
        spec: the job as canonical JSON.
        seed: of the job.
        vault: where frames are.
        counted: which version holds a client's newest update.

    Attributes:
        counted: as given, and replaced when a job is recovered.
        digest: of the frame that clients were last told to download; "" before version 0.
        num_bytes: of that frame.
    """

    def __init__(self, job_id: str, spec: bytes, seed: int, vault: Vault, counted: Counted) -> None:
        self._job_id, self._spec, self._seed = job_id, spec, seed
        self._vault, self.counted = vault, counted
        self.digest, self.num_bytes, self._frame = "", 0, b""

    def assignment(
        self,
        attempt: Attempt,
        assignment_id: str,
        client: str,
        *,
        layout: Layout | None,
        latest: VersionRecord | None,
        base_digest: str | None,
        deadline_s: float,
    ) -> Assignment:
        """Return one client's assignment; `layout` and `latest` are None before version 0, `base_digest` may be."""
        if latest is not None and latest.frame_digest != self.digest:
            self.digest = latest.frame_digest
            self.num_bytes = len(latest.frame_head) + self._vault.size(latest.frame_body)
            is_small = self.num_bytes <= MESSAGE_BYTES
            self._frame = latest.frame_head + bytes(self._vault.open(latest.frame_body)) if is_small else b""
        return Assignment(
            assignment_id=assignment_id,
            job_id=self._job_id,
            job=self._spec,
            version=attempt.version,
            kind=attempt.kind,
            seed=derive_seed(self._seed, attempt.kind.value, client, attempt.version),
            layout_digest=layout.digest if layout else "",
            frame_digest=self.digest,
            frame_bytes=self.num_bytes,
            deadline_s=max(0.0, deadline_s),
            frame=self._frame,
            basis_digest="" if latest is None else latest.basis_blob or "",
            base_revision="" if latest is None else latest.revision,
            changed_since=0 if latest is None else latest.changed_since,
            base_digest=base_digest or "",
            clip=0.0 if latest is None or attempt.kind is not WorkKind.TRAIN else latest.clip or 0.0,
            counted_in=self.counted.of(client, attempt.version) if attempt.kind is WorkKind.TRAIN else 0,
        )

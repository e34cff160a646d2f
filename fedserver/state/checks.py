"""What every implementation of the state refuses in the same words."""

from __future__ import annotations

import re

from fedcore.errors import InvalidInput, Unauthenticated, UpdateRejected, UpdateResult
from fedserver.state.records import Record, TokenRecord, UpdateRecord

_DIGEST = re.compile(r"[0-9a-f]{64}")


def record_key(record: Record) -> tuple[object, ...]:
    """Return the values that identify `record` among its kind."""
    return tuple(getattr(record, name) for name in record.KEY)


def check_replaceable(existing: Record) -> None:
    """Let a record that is stored already be written again, if it may.

    Raises:
        UpdateRejected: DUPLICATE; updates are written once.
        Unauthenticated: a used token stays used.
    """
    if isinstance(existing, UpdateRecord):
        raise UpdateRejected(UpdateResult.DUPLICATE, f"update {existing.update_id} is already recorded")
    if isinstance(existing, TokenRecord) and existing.used_at is not None:
        raise Unauthenticated(f"the enrolment token for {existing.client!r} was already used; ask for a new one")


def check_digest(digest: str) -> str:
    """Return `digest` if it is one: it becomes part of a path.

    Raises:
        InvalidInput: it is not 64 lower-case hex digits.
    """
    if _DIGEST.fullmatch(digest) is None:
        raise InvalidInput(f"{digest[:80]!r} is not a SHA-256: 64 of 0-9 a-f")
    return digest


def check_sealed(digest: str, num_bytes: int, expected_sha256: str, expected_bytes: int) -> None:
    """Compare what arrived with what was announced.

    Raises:
        UpdateRejected: WRONG_SIZE or WRONG_DIGEST.
    """
    if num_bytes != expected_bytes:
        raise UpdateRejected(UpdateResult.WRONG_SIZE, f"{num_bytes} bytes arrived, {expected_bytes} were announced")
    if digest != expected_sha256:
        raise UpdateRejected(
            UpdateResult.WRONG_DIGEST, f"what arrived has SHA-256 {digest}, announced was {expected_sha256[:80]}"
        )

"""The check of every call: whose certificate is this, and is its holder welcome now?

TLS has already proved that the federation's authority signed the certificate and that the caller holds its key. What
TLS does not know is checked here, on each call: a connection outlives its certificate, and gRPC knows no revocation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from fedcore.errors import InvalidInput, Unauthenticated, Unreachable
from fedcore.identity import Identity, Role, identity_of, load_certificate, serial_of, utc

# About 2 KB each: every client of a large federation fits, so that heartbeats do not evict one another.
_CACHED_CERTIFICATES = 16384


class EnrolledClient(Protocol):
    """What the state keeps of a client."""

    @property
    def serial(self) -> str:
        """Serial of the certificate in force, as `fedcore.identity.serial_of` writes it."""
        ...

    @property
    def revoked_at(self) -> float | None:
        """Seconds since 1970 (UTC); None while the client is welcome."""
        ...


@dataclass(frozen=True)
class Caller:
    """Who makes a call, proved.

    Attributes:
        identity: from the certificate, never from a message.
        serial: of the certificate, hexadecimal.
    """

    identity: Identity
    serial: str


@dataclass(frozen=True)
class _Parsed:
    caller: Caller
    valid_from_s: float
    valid_until_s: float


def admit(
    certificate_pem: bytes,
    *,
    federation: str,
    now_s: float,
    client: Callable[[str], EnrolledClient | None],
) -> Caller:
    """Return who calls, if they may call now. Called for every RPC, from any thread.

    Args:
        certificate_pem: the peer's certificate, *already verified by TLS* against the federation's authority.
        federation: this server's.
        now_s: the wall clock, seconds since 1970 (UTC).
        client: looks up a client by name, as it is at this moment; never a cached answer, or revocation comes late.

    Raises:
        Unauthenticated: the text says which check failed.
        Unreachable: everything is in order but the time: by our clock the certificate is not valid yet. Since we have
            issued it ourselves, the clock is wrong; the caller may try again when it is right.
    """
    parsed = _parse(certificate_pem)
    caller, identity = parsed.caller, parsed.caller.identity
    if identity.federation != federation:
        raise Unauthenticated(f"the certificate is of federation {identity.federation!r}, not of {federation!r}")
    match identity.role:
        case Role.CLIENT:
            _check_enrolled(caller, client(identity.name))
        case Role.SERVER:
            raise Unauthenticated("the server's own certificate does not entitle anybody to call it")
        case Role.OPERATOR:
            pass
    if now_s >= parsed.valid_until_s:
        raise Unauthenticated(f"the certificate of {identity.name!r} expired at {utc(parsed.valid_until_s)}")
    if now_s < parsed.valid_from_s:
        raise Unreachable(
            f"the certificate of {identity.name!r} is not valid before {utc(parsed.valid_from_s)}, and here it is"
            f" {utc(now_s)}: is the server's clock right?"
        )
    return caller


def _check_enrolled(caller: Caller, record: EnrolledClient | None) -> None:
    name = caller.identity.name
    if record is None:
        raise Unauthenticated(f"client {name!r} is not enrolled here")
    if record.revoked_at is not None:
        raise Unauthenticated(f"client {name!r} was revoked at {utc(record.revoked_at)}")
    if record.serial != caller.serial:
        raise Unauthenticated(f"client {name!r} was enrolled again: this certificate is no longer in force")


@lru_cache(maxsize=_CACHED_CERTIFICATES)
def _parse(certificate_pem: bytes) -> _Parsed:
    # Only what the bytes themselves say is cached: time and enrolment are judged anew on each call.
    try:
        certificate = load_certificate(certificate_pem)
    except InvalidInput as error:
        raise Unauthenticated(f"the caller's certificate cannot be read: {error}") from error
    valid_from_s = certificate.not_valid_before_utc.timestamp()
    valid_until_s = certificate.not_valid_after_utc.timestamp()
    return _Parsed(Caller(identity_of(certificate), serial_of(certificate)), valid_from_s, valid_until_s)

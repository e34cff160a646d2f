"""One-time enrolment tokens. The server stores a hash: whoever reads its state learns no token."""

from __future__ import annotations

import hashlib
import math
import secrets
from typing import Protocol

from fedcore.errors import InvalidInput, Unauthenticated
from fedcore.identity import EnrolmentToken, utc

MAX_LIFETIME_S = 30 * 86400.0


class IssuedToken(Protocol):
    """What the state keeps of a token."""

    @property
    def client(self) -> str:
        """The name that the token was issued for."""
        ...

    @property
    def expires_at(self) -> float:
        """Seconds since 1970 (UTC)."""
        ...

    @property
    def used_at(self) -> float | None:
        """When it was redeemed; None if it was not."""
        ...


def issue(
    client: str, lifetime_s: float, now: float, *, server: str, enrol: str, federation: str, ca_pem: str
) -> tuple[EnrolmentToken, str]:
    """Return a new token for `client`, valid from `now` (wall clock, seconds) for `lifetime_s`, and its hash to store.

    Raises:
        InvalidInput: the lifetime is not in (0, 30 days], or a name or address is not valid.
    """
    if not (math.isfinite(lifetime_s) and 0 < lifetime_s <= MAX_LIFETIME_S):
        raise InvalidInput(f"a token's lifetime of {lifetime_s} s is not in (0, {MAX_LIFETIME_S:.0f}] s")
    token = EnrolmentToken(
        server=server,
        enrol=enrol,
        federation=federation,
        client=client,
        ca_pem=ca_pem,
        secret=secrets.token_urlsafe(32),
        expires_at=now + lifetime_s,
    )
    return token, secret_sha256(token.secret)


def secret_sha256(secret: str) -> str:
    """Return the key under which the state finds a token: SHA-256 of its secret, hexadecimal.

    Finding it by an ordinary index lookup is safe: timing could at most tell something about the hash of a guess, and
    256 random bits leave nothing to guess towards. So no salt, no slow hash, no constant-time comparison.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def redeem(record: IssuedToken | None, now: float) -> str:
    """Return the client name of the token found, if it can be redeemed at `now` (wall clock, seconds).

    Marking it used is the store's, in one transaction with the enrolment: of two callers at once one must fail there.

    Raises:
        Unauthenticated: no such token, or it was used, or it has expired.
    """
    if record is None:
        raise Unauthenticated("this server has not issued that enrolment token")
    if record.used_at is not None:
        raise Unauthenticated(
            f"the enrolment token for {record.client!r} was already used at {utc(record.used_at)}; ask for a new one"
        )
    if now >= record.expires_at:
        raise Unauthenticated(
            f"the enrolment token for {record.client!r} expired at {utc(record.expires_at)}; ask for a new one"
        )
    return record.client

"""Who belongs to the federation: tokens, enrolment, revocation, and the check of every call.

Runs on the event loop's thread. The table of clients is kept in memory too, because it is read on each call; it changes
only after the journal has made the change durable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from fedcore.clock import Clock
from fedcore.errors import NotFound, Unauthenticated
from fedcore.identity import ENROLMENT_CONTEXT, serial_of, verify
from fedcore.names import check_name
from fedserver.metrics import Metrics
from fedserver.security import access, tokens
from fedserver.security.authority import Authority
from fedserver.security.certificates import pem
from fedserver.state.base import Store
from fedserver.state.journal import Journal
from fedserver.state.records import ClientRecord, TokenRecord

log = logging.getLogger(__name__)


class Membership:
    """See the module's text.

    Args:
        authority: signs certificates.
        federation: this federation's id.
        addresses: says where clients dial, host:port for work and for enrolment; asked for each token.
        cut: called with the name of a client that has just lost its welcome.
    """

    def __init__(
        self,
        authority: Authority,
        federation: str,
        addresses: Callable[[], tuple[str, str]],
        store: Store,
        journal: Journal,
        clock: Clock,
        metrics: Metrics,
        cut: Callable[[str, Unauthenticated], None],
    ) -> None:
        self.federation = federation
        self._authority = authority
        self._addresses = addresses
        self._store = store
        self._journal = journal
        self._clock = clock
        self._metrics = metrics
        self._cut = cut
        self._clients = {record.name: record for record in store.clients()}
        self._enrolling = asyncio.Lock()
        self._count()

    def admit(self, certificate_pem: bytes) -> access.Caller:
        """Return who calls, from its certificate.

        Raises:
            Unauthenticated: it may not call (any more).
            Unreachable: not yet, because the clock is behind; see `access.admit`.
        """
        return access.admit(
            certificate_pem, federation=self.federation, now_s=self._clock.wall_s(), client=self._clients.get
        )

    def clients(self) -> list[ClientRecord]:
        """Return every client by name, revoked ones too."""
        return sorted(self._clients.values(), key=lambda record: record.name)

    def signing_key(self, client: str) -> bytes | None:
        """Return the public key that a client signs its updates with."""
        record = self._clients.get(client)
        return None if record is None else record.signing_key

    async def issue_token(self, client: str, lifetime_s: float) -> str:
        """Return a new one-time token for `client`, as one line.

        Raises:
            InvalidInput: not a name, or a lifetime out of bounds.
        """
        check_name(client, "client")
        now = self._clock.wall_s()
        server, enrol = self._addresses()
        token, digest = tokens.issue(
            client,
            lifetime_s,
            now,
            server=server,
            enrol=enrol,
            federation=self.federation,
            ca_pem=self._authority.ca_pem.decode(),
        )
        await self._journal.write(TokenRecord(digest, client, created_at=now, expires_at=token.expires_at))
        log.info("token issued", extra={"client": client})
        return token.encode()

    async def enrol(self, secret: str, request_pem: bytes, signing_key: bytes, proof: bytes) -> bytes:
        """Turn a token's secret and a signing request into a certificate (PEM). The client's name is the token's.

        A client of that name that is enrolled already is replaced: its old certificate is refused from then on.

        Raises:
            Unauthenticated: the token is unknown, used or expired, or the proof does not fit the signing key.
            InvalidInput: the signing request is not one for an ECDSA P-256 key.
        """
        async with self._enrolling:  # of two callers with the same token, the second finds it used
            now = self._clock.wall_s()
            token = self._store.token(tokens.secret_sha256(secret))
            client = tokens.redeem(token, now)
            assert token is not None
            verify(signing_key, ENROLMENT_CONTEXT, request_pem, proof)
            certificate = self._authority.sign_client(request_pem, client)
            expires_at = certificate.not_valid_after_utc.timestamp()
            record = ClientRecord(client, serial_of(certificate), signing_key, now, expires_at)
            await self._journal.write(replace(token, used_at=now), record)
            self._clients[client] = record
        self._cut(client, Unauthenticated(f"client {client!r} enrolled anew"))
        self._count()
        log.info("enrolled", extra={"client": client, "serial": record.serial})
        return pem(certificate)

    async def revoke(self, client: str) -> None:
        """Refuse a client from now on, void the tokens that would let it back in, and cut its open streams.

        Raises:
            NotFound: no such client.
        """
        record = self._clients.get(client)
        if record is None:
            raise NotFound(f"no client {client!r}")
        now = self._clock.wall_s()
        open_tokens = [row for row in self._store.tokens() if row.client == client and row.used_at is None]
        record = record if record.revoked_at is not None else replace(record, revoked_at=now)
        await self._journal.write(record, *(replace(row, used_at=now) for row in open_tokens))
        self._clients[client] = record
        self._cut(client, Unauthenticated(f"the certificate of {client!r} is revoked"))
        self._count()
        log.warning("revoked", extra={"client": client})

    @property
    def num_enrolled(self) -> int:
        """How many clients are enrolled and not revoked."""
        return sum(record.revoked_at is None for record in self._clients.values())

    def _count(self) -> None:
        self._metrics.clients_enrolled.set(self.num_enrolled)

"""A client's identity on disk: its keys, its certificate, whom it trusts and where its server is.

``key.pem certificate.pem ca.pem signing.key identity.json``, all mode 0600. ``identity.json`` is written last and
removed first: where it is, the other files are complete and belong together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcore.addresses import check_address
from fedcore.errors import InvalidInput, NotFound, Refused, StateUnusable, Unauthenticated
from fedcore.identity import (
    ENROLMENT_CONTEXT,
    Identity,
    Role,
    certificate_request,
    identity_of,
    is_issued_by,
    load_certificate,
    new_signing_key,
    sign,
    utc,
)
from fedcore.privatefiles import make_private_folder, read_private, remove_private, write_private

_MARKER = "identity.json"


@dataclass(frozen=True)
class ClientIdentity:
    """What a client needs to dial its server and to sign its updates.

    Attributes:
        server: HOST:PORT of the server's main port.
        federation: the federation's name.
        client: this client's name.
        ca_pem: the only root that this client trusts.
        certificate_pem: shown to the server.
        key_pem: the TLS key of the certificate.
        signing_key: signs updates.
    """

    server: str
    federation: str
    client: str
    ca_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    signing_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> ClientIdentity:
        """Return the identity in `folder`. Whether it is valid now, `check` says.

        Raises:
            NotFound: there is none.
            StateUnusable: a file is missing, unreadable or damaged.
        """
        try:
            marker = read_private(folder / _MARKER)
        except NotFound as error:
            raise NotFound(f"no client identity in {folder}: run `fedclient enroll` first") from error
        try:
            server, federation, client = _parse_marker(marker)
            return cls(
                server=server,
                federation=federation,
                client=client,
                ca_pem=read_private(folder / "ca.pem"),
                certificate_pem=read_private(folder / "certificate.pem"),
                key_pem=read_private(folder / "key.pem"),
                signing_key=_parse_signing_key(read_private(folder / "signing.key")),
            )
        except (NotFound, InvalidInput) as error:
            raise StateUnusable(
                f"the client identity in {folder} is damaged ({error}): run `fedclient enroll --force` with a new token"
            ) from error

    def save(self, folder: Path, *, force: bool = False) -> None:
        """Write the identity to `folder`, all of it or, after a crash, none.

        Raises:
            Refused: there is an identity already, and not `force`.
            StorageFailed: the files cannot be written.
        """
        prepare_folder(folder, force=force)
        remove_private(folder / _MARKER)
        signing_pem = self.signing_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fields = {"server": self.server, "federation": self.federation, "client": self.client}
        for name, data in (
            ("key.pem", self.key_pem),
            ("certificate.pem", self.certificate_pem),
            ("ca.pem", self.ca_pem),
            ("signing.key", signing_pem),
            (_MARKER, json.dumps(fields, indent=2).encode("ascii") + b"\n"),
        ):
            write_private(folder / name, data)

    def check(self, now_s: float) -> None:
        """Return if the server would accept this identity at `now_s`, as far as one can see from here.

        Call it before dialling: gRPC would only say that the server is unavailable.

        Args:
            now_s: the wall clock, seconds since 1970 (UTC).

        Raises:
            StateUnusable: a certificate or the key cannot be read.
            Unauthenticated: expired, not valid yet, not signed by the authority, of somebody else, or not of our key.
        """
        certificate, ca = _certificate(self.certificate_pem, "certificate"), _certificate(self.ca_pem, "ca")
        for what, checked in (("this client's certificate", certificate), ("the authority's certificate", ca)):
            valid_from_s, valid_until_s = (
                checked.not_valid_before_utc.timestamp(),
                checked.not_valid_after_utc.timestamp(),
            )
            if now_s < valid_from_s:
                raise Unauthenticated(
                    f"{what} is not valid before {utc(valid_from_s)}, and here it is {utc(now_s)}: "
                    "is this machine's clock right?"
                )
            if now_s >= valid_until_s:
                raise Unauthenticated(
                    f"{what} expired at {utc(valid_until_s)}: ask the operator for a new token and enroll again"
                )
        if not is_issued_by(certificate, ca):
            raise Unauthenticated("this client's certificate is not signed by the authority in ca.pem")
        expected = Identity(self.federation, Role.CLIENT, self.client)
        if identity_of(certificate) != expected:
            raise Unauthenticated(
                f"the certificate is of {identity_of(certificate).uri}, the identity file says {expected.uri}"
            )
        if _tls_key(self.key_pem).public_key() != certificate.public_key():
            raise Unauthenticated("key.pem is not the key of certificate.pem")

    @property
    def expires_at(self) -> float:
        """When the certificate expires, seconds since 1970 (UTC).

        Raises:
            StateUnusable: the certificate cannot be read.
        """
        return _certificate(self.certificate_pem, "certificate").not_valid_after_utc.timestamp()


@dataclass(frozen=True)
class IdentityRequest:
    """New keys, and what the server must see to certify them.

    Attributes:
        identity: who asks.
        key: the new TLS key.
        signing_key: the new key for updates.
        csr_pem: the signing request for `key`.
        signing_key_proof: signature over `csr_pem` by `signing_key`, context `ENROLMENT_CONTEXT`.
    """

    identity: Identity
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    signing_key: Ed25519PrivateKey = field(repr=False)
    csr_pem: bytes = field(repr=False)
    signing_key_proof: bytes = field(repr=False)

    @property
    def signing_public_key(self) -> bytes:
        """The public half of `signing_key`, 32 bytes."""
        return self.signing_key.public_key().public_bytes_raw()

    def complete(
        self, certificate_pem: bytes, *, server: str, ca_pem: bytes, now_s: float | None = None
    ) -> ClientIdentity:
        """Return the identity, with the certificate that the server sent.

        Without `now_s` everything but the time is checked: a clock that is wrong now can be put right later.

        Raises:
            Unauthenticated: the certificate is not the one asked for; see `ClientIdentity.check`.
            StateUnusable: the certificate cannot be read.
        """
        identity = ClientIdentity(
            server=server,
            federation=self.identity.federation,
            client=self.identity.name,
            ca_pem=ca_pem,
            certificate_pem=certificate_pem,
            key_pem=self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            signing_key=self.signing_key,
        )
        identity.check(identity.expires_at - 1 if now_s is None else now_s)
        return identity


def new_request(name: str, federation: str) -> IdentityRequest:
    """Return fresh keys for the client `name` and a request to certify them.

    Raises:
        InvalidInput: `name` or `federation` is not a valid name.
    """
    identity = Identity(federation, Role.CLIENT, name)
    key, signing_key = ec.generate_private_key(ec.SECP256R1()), new_signing_key()
    csr_pem = certificate_request(key, identity)
    return IdentityRequest(identity, key, signing_key, csr_pem, sign(signing_key, ENROLMENT_CONTEXT, csr_pem))


def prepare_folder(folder: Path, *, force: bool = False) -> None:
    """Make `folder`, so that a token is not spent on an identity that cannot be kept.

    Raises:
        Refused: it holds an identity already, and not `force`.
        StorageFailed: it cannot be made.
    """
    if (folder / _MARKER).exists() and not force:
        raise Refused(f"{folder} already holds a client identity; `--force` replaces it")
    make_private_folder(folder)


def _parse_marker(data: bytes) -> tuple[str, str, str]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{_MARKER} is not JSON") from error
    match fields:
        case {"server": str(server), "federation": str(federation), "client": str(client)}:
            identity = Identity(federation, Role.CLIENT, client)
            return check_address(server, "server"), identity.federation, identity.name
        case _:
            raise InvalidInput(f"{_MARKER} lacks server, federation or client")


def _parse_signing_key(data: bytes) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput("signing.key is not an unencrypted key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInput("signing.key is not an Ed25519 key")
    return key


def _tls_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StateUnusable("key.pem is damaged: not an unencrypted key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateUnusable("key.pem is not an ECDSA key")
    return key


def _certificate(data: bytes, name: str) -> x509.Certificate:
    try:
        return load_certificate(data)
    except InvalidInput as error:
        raise StateUnusable(f"{name}.pem is damaged: {error}") from error

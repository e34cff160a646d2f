"""Who is who: names inside certificates, enrolment tokens, and signatures on what clients send.

TLS keys are ECDSA P-256 (gRPC refuses Ed25519 certificates); signatures on updates are Ed25519.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from fedcore.addresses import check_address
from fedcore.errors import InvalidInput, Unauthenticated
from fedcore.names import check_name

# What a client signs at enrolment, to prove that it holds the key that will sign its updates.
ENROLMENT_CONTEXT: Final = b"roundtable-enrolment-v1"

_MAX_TOKEN_CHARS = 8192
_MAX_CERTIFICATE_BYTES = 16 * 1024
_YEAR_10000_S = 253402300800.0
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_URI = re.compile(rf"roundtable://({_NAME})/(?:(server)|(client|operator)/({_NAME}))")
_DAMAGED = "the token is damaged"
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")

_P25519 = 2**255 - 19
# The y coordinates of the eight points of small order: for such a public key one signature fits many messages.
_ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_SMALL_ORDER = frozenset({0, 1, _P25519 - 1, _ORDER_8, _P25519 - _ORDER_8})


class Role(StrEnum):
    """What a certificate entitles its holder to."""

    SERVER = "server"
    CLIENT = "client"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Identity:
    """Somebody in a federation. A federation has one server; its name is always ``server``.

    Raises:
        InvalidInput: `federation` or `name` is not a valid name.
    """

    federation: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_name(self.federation, "federation")
        check_name(self.name, f"{self.role} name")
        if self.role is Role.SERVER and self.name != "server":
            raise InvalidInput(f"server name {self.name!r} is not valid: it must be 'server'")

    @property
    def uri(self) -> str:
        """The identity as certificates carry it: ``roundtable://FEDERATION/ROLE/NAME``, without NAME for the server."""
        base = f"roundtable://{self.federation}/{self.role.value}"
        return base if self.role is Role.SERVER else f"{base}/{self.name}"


def load_certificate(pem: bytes) -> x509.Certificate:
    """Return the one certificate in `pem`, whose key is of a known kind.

    Raises:
        InvalidInput: it is longer than 16 KiB, not PEM, not exactly one certificate, or malformed.
    """
    if len(pem) > _MAX_CERTIFICATE_BYTES:
        raise InvalidInput(f"the certificate has {len(pem)} bytes; the bound is {_MAX_CERTIFICATE_BYTES}")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:
            certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise InvalidInput("not a certificate in PEM") from error
    if len(certificates) != 1:
        raise InvalidInput(f"{len(certificates)} certificates where there must be one")
    return certificates[0]


def is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Say whether `ca` signed `certificate` (issuer name and signature; not time, not constraints)."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def identity_of(certificate: x509.Certificate) -> Identity:
    """Return the identity in the certificate's only URI subject alternative name. The subject is never looked at.

    Raises:
        Unauthenticated: there is no such URI, more than one, or one of another form.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise Unauthenticated("the certificate names nobody: it has no subject alternative name") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise Unauthenticated("the certificate's extensions are malformed") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise Unauthenticated(f"the certificate holds {len(uris)} URIs; it must hold exactly one")
    match = _URI.fullmatch(uris[0])
    if match is None:
        raise Unauthenticated(f"the certificate's URI {uris[0][:200]!r} is not a Roundtable identity")
    federation, server, role, name = match.groups()
    return Identity(federation, Role(server or role), name or "server")


def utc(seconds: float) -> str:
    """Return a wall-clock time (seconds since 1970) as people read it, always in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def serial_of(certificate: x509.Certificate) -> str:
    """Return the serial number as it is stored and shown: lower-case hexadecimal without leading zeros."""
    return f"{certificate.serial_number:x}"


def certificate_request(key: EllipticCurvePrivateKey, identity: Identity) -> bytes:
    """Return a PKCS #10 request (PEM) for `key`. The names in it are for people; the authority ignores them."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class EnrolmentToken:
    """What an operator hands to a new client: where the server is, how to recognise it, and a one-time secret.

    Attributes:
        server: HOST:PORT of the main port.
        enrol: HOST:PORT of the enrolment port.
        federation: whose clients it is for.
        client: the name that the client will have.
        ca_pem: the federation's CA certificate; the client trusts no other.
        secret: 256 random bits, URL-safe base64; the server keeps only a hash of it.
        expires_at: seconds since 1970 (UTC).

    Raises:
        InvalidInput: a field is not what it should be.
    """

    server: str
    enrol: str
    federation: str
    client: str
    ca_pem: str
    secret: str = field(repr=False)
    expires_at: float

    def __post_init__(self) -> None:
        check_address(self.server, "the token's server")
        check_address(self.enrol, "the token's enrolment address")
        check_name(self.federation, "the token's federation")
        check_name(self.client, "the token's client")
        if _SECRET.fullmatch(self.secret) is None:
            raise InvalidInput("the token's secret is not 43 characters of URL-safe base64")
        if not 0 < self.expires_at < _YEAR_10000_S:
            raise InvalidInput(f"the token's expires_at {self.expires_at} is not a time")
        try:
            load_certificate(self.ca_pem.encode("ascii"))
        except ValueError:  # InvalidInput is one too
            raise InvalidInput("the token's ca_pem is not a certificate") from None

    def encode(self) -> str:
        """Return the token as one line of base64url JSON (no padding), with a checksum against typing errors."""
        fields = {"v": 1, **asdict(self), "expires_at": float(self.expires_at)}
        fields["check"] = _checksum(fields)
        return base64.urlsafe_b64encode(_canonical(fields)).rstrip(b"=").decode("ascii")

    @staticmethod
    def decode(text: str) -> EnrolmentToken:
        """Return the token in `text`; white space around and inside is ignored, because terminals wrap long lines.

        Raises:
            InvalidInput: it is too long, not a token, damaged, or of a newer format. The text never shows the token.
        """
        if len(text) > _MAX_TOKEN_CHARS:
            raise InvalidInput(f"the token is {len(text)} characters long; the bound is {_MAX_TOKEN_CHARS}")
        line = "".join(text.split())
        fields = _decode_fields(line)
        version = fields.get("v")
        if isinstance(version, int) and version > 1:
            raise InvalidInput(f"the token has format {str(version)[:20]}; this version of Roundtable reads format 1")
        match fields:
            case {
                "v": 1,
                "check": str(check),
                "server": str(server),
                "enrol": str(enrol),
                "federation": str(federation),
                "client": str(client),
                "ca_pem": str(ca_pem),
                "secret": str(secret),
                "expires_at": float(expires_at),
                **others,
            } if not others:
                del fields["check"]
            case _:
                raise InvalidInput(f"{_DAMAGED} (it lacks the fields of an enrolment token): copy it again, whole")
        if check != _checksum(fields):
            raise InvalidInput(f"{_DAMAGED} (its checksum is wrong): copy it again, whole")
        token = EnrolmentToken(server, enrol, federation, client, ca_pem, secret, expires_at)
        # Base64 and JSON can write one thing in several ways; only one of them is a token.
        if token.encode() != line:
            raise InvalidInput(f"{_DAMAGED} (not in canonical form): copy it again, whole")
        return token


def _decode_fields(line: str) -> dict[str, object]:
    try:
        data = base64.b64decode(line.encode("ascii") + b"=" * (-len(line) % 4), altchars=b"-_", validate=True)
        fields = json.loads(data)
    except (binascii.Error, ValueError, RecursionError):
        # `from None`: the foreign exceptions carry the token.
        raise InvalidInput("this is not an enrolment token: copy it again, whole") from None
    if not isinstance(fields, dict):
        raise InvalidInput("this is not an enrolment token: copy it again, whole")
    return fields


def _canonical(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def _checksum(fields: dict[str, object]) -> str:
    return hashlib.sha256(_canonical(fields)).hexdigest()[:8]


def new_signing_key() -> Ed25519PrivateKey:
    """Return a fresh key to sign updates with."""
    return Ed25519PrivateKey.generate()


def sign(key: Ed25519PrivateKey, context: bytes, data: bytes) -> bytes:
    """Return the Ed25519 signature (64 bytes) over `data` for the purpose `context`.

    The signed message is len(context) as u32 LE, context, len(data) as u64 LE, data: a signature for one purpose is
    never one for another. The message is copied once, so sign a header with a digest rather than a large payload.
    """
    return key.sign(_signed_message(context, data))


def verify(public_key: bytes, context: bytes, data: bytes, signature: bytes) -> None:
    """Return if `signature` is one over `data` for `context` by the holder of `public_key` (32 bytes, raw).

    Raises:
        Unauthenticated: it is not, or the public key is malformed or of small order.
    """
    try:
        _public_key(public_key).verify(signature, _signed_message(context, data))
    except (InvalidSignature, ValueError) as error:
        raise Unauthenticated("the signature does not fit the data and the key") from error


@lru_cache(maxsize=16384)
def _public_key(data: bytes) -> Ed25519PublicKey:
    if len(data) != 32:
        raise Unauthenticated(f"the signing key has {len(data)} bytes; Ed25519 has 32")
    y = int.from_bytes(data, "little") % 2**255
    if y % _P25519 in _SMALL_ORDER:
        raise Unauthenticated("the signing key is a point of small order: its signatures prove nothing")
    return Ed25519PublicKey.from_public_bytes(data)


def _signed_message(context: bytes, data: bytes) -> bytes:
    return b"".join((len(context).to_bytes(4, "little"), context, len(data).to_bytes(8, "little"), data))

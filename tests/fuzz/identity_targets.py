"""Enrolment tokens, identity folders, certificates, signing requests and signatures."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from fedclient.identity import ClientIdentity, new_request
from fedcore import identity
from fedcore.errors import InvalidInput, NotFound, StateUnusable, Unauthenticated, Unreachable
from fedcore.identity import EnrolmentToken, Role, identity_of, is_issued_by, load_certificate, serial_of, sign, verify
from fedserver.security.access import admit
from fedserver.security.authority import Authority
from fedserver.security.certificates import pem
from tests.fuzz.target import BOMBS, Reader, Target, check_refusal, scratch_folder

FEDERATION: Final = "north"
SERVER: Final = "server.example:8470"
NOW_S: Final = 1_800_000_000.0
SECRET: Final = "S" * 43
FILES: Final = ("identity.json", "ca.pem", "certificate.pem", "key.pem", "signing.key")


@cache
def authority() -> Authority:
    return Authority.create(scratch_folder() / "keys", FEDERATION, ["localhost"], wall_s=lambda: NOW_S)


@cache
def alice() -> ClientIdentity:
    request = new_request("alice", FEDERATION)
    certificate = pem(authority().sign_client(request.csr_pem, "alice"))
    return request.complete(certificate, server=SERVER, ca_pem=authority().ca_pem, now_s=NOW_S)


# -- tokens ----------------------------------------------------------------------------------------------------------


def read_token(data: bytes) -> None:
    """The line itself, or the JSON in it: mutation does not find checksums."""
    reader = Reader(data)
    is_json, data = reader.number() % 2, reader.rest()
    text = with_checksum(data) if is_json else data.decode("utf-8", "surrogateescape")
    try:
        token = EnrolmentToken.decode(text)
    except InvalidInput as error:
        check_refusal(error)
        check_silence(data, str(error))
        return
    assert token.encode() == "".join(text.split())
    assert EnrolmentToken.decode(token.encode()) == token
    assert token.secret not in repr(token)


def check_silence(data: bytes, text: str) -> None:
    """A refusal does not show the secret, unless that stands in another field too."""
    field = f'"secret":"{SECRET}"'.encode()
    assert SECRET not in text or field not in data or SECRET.encode() in data.replace(field, b"")


def with_checksum(data: bytes) -> str:
    """Encode JSON as a token, with the checksum that its fields should have and otherwise as it is written."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict) and "check" in fields:
        written = json.dumps(fields.pop("check")).encode()
        data = data.replace(written, json.dumps(identity._checksum(fields)).encode())
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def tokens() -> Iterator[bytes]:
    for server in (SERVER, "[::1]:1", "[fe80::1%eth0]:65535", "10.0.0.1:80"):
        ca_pem = authority().ca_pem.decode()
        line = EnrolmentToken(server, "localhost:8471", FEDERATION, "alice", ca_pem, SECRET, NOW_S).encode()
        yield b"\0" + line.encode()
        yield b"\0" + f" {line[:40]}\n  {line[40:]}\n".encode()
        text = base64.urlsafe_b64decode(line + "=" * (-len(line) % 4))
        yield b"\1" + text
        yield b"\1" + text.replace(b",", b", ")
    yield b'\1{"v":2,"server":[NaN,"\\ud800"],"expires_at":1e999}'
    yield from (b"\1" + bomb for bomb in BOMBS)


# -- an identity folder ----------------------------------------------------------------------------------------------


def read_identity(data: bytes) -> None:
    """One file of a sound identity, replaced."""
    reader = Reader(data)
    folder, name = identity_folder(), FILES[reader.number() % len(FILES)]
    sound = (folder / name).read_bytes()
    (folder / name).write_bytes(reader.rest())
    try:
        loaded = ClientIdentity.load(folder)
        loaded.check(NOW_S)
    except (NotFound, StateUnusable, Unauthenticated) as error:
        check_refusal(error)
        return
    finally:
        (folder / name).write_bytes(sound)
    assert loaded.expires_at > NOW_S
    assert (loaded.federation, loaded.client) == (FEDERATION, "alice")


@cache
def identity_folder() -> Any:
    folder = scratch_folder() / "alice"
    alice().save(folder)
    return folder


def identity_files() -> Iterator[bytes]:
    for index, name in enumerate(FILES):
        sound = (identity_folder() / name).read_bytes()
        yield bytes([index]) + sound
        yield bytes([index]) + sound[: len(sound) // 2]
        yield bytes([index]) + sound + sound
    yield bytes([0]) + b'{"server":"[fe80::1%a]:1","federation":"\\ud800","client":[]}'
    yield from (b"\0" + bomb for bomb in BOMBS)


# -- certificates ----------------------------------------------------------------------------------------------------


def read_certificate(data: bytes) -> None:
    reader = Reader(data)
    CERTIFICATE_READERS[reader.number() % len(CERTIFICATE_READERS)](reader.rest())


def armour(label: str, der: bytes) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n".encode()


def certificate(der: bytes) -> None:
    certificate_pem(armour("CERTIFICATE", der))


def certificate_pem(text: bytes) -> None:
    try:
        parsed = load_certificate(text)
    except InvalidInput as error:
        check_refusal(error)
        return
    assert load_certificate(pem(parsed)) == parsed
    ca = load_certificate(authority().ca_pem)
    if is_issued_by(parsed, ca):  # the fuzzer has no key of ours
        assert parsed.tbs_certificate_bytes in KNOWN
    try:
        named = identity_of(parsed)
        caller = admit(text, federation=FEDERATION, now_s=NOW_S, client=lambda _: None)
    except (Unauthenticated, Unreachable) as error:  # the latter of one that is not valid yet: a clock may be wrong
        check_refusal(error)
        return
    assert caller.identity == named
    assert named.role is Role.OPERATOR
    assert caller.serial == serial_of(parsed)


def request(der: bytes) -> None:
    request_pem(armour("CERTIFICATE REQUEST", der))


def request_pem(text: bytes) -> None:
    try:
        signed = authority().sign_client(text, "alice")
    except (InvalidInput, Unauthenticated) as error:
        check_refusal(error)
        return
    assert identity_of(signed) == identity.Identity(FEDERATION, Role.CLIENT, "alice")
    assert signed.subject == x509.load_pem_x509_certificate(alice().certificate_pem).subject


def signature(data: bytes) -> None:
    """Key, signature and what was signed."""
    reader = Reader(data)
    key, proof, signed = reader.take(32), reader.take(64), reader.rest()
    try:
        verify(key, b"context", signed, proof)
    except Unauthenticated as error:
        check_refusal(error)
        return
    assert key == SIGNING_KEY.public_key().public_bytes_raw()
    assert signed == b"data"


CERTIFICATE_READERS: Final = (certificate, certificate_pem, request, request_pem, signature)
SIGNING_KEY: Final = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
KNOWN: Final[set[bytes]] = set()


def certificates() -> Iterator[bytes]:
    known = [authority().ca_pem, authority().server_chain_pem, authority().operator_chain_pem, alice().certificate_pem]
    for text in known:
        parsed = x509.load_pem_x509_certificate(text)
        KNOWN.add(parsed.tbs_certificate_bytes)
        yield b"\0" + parsed.public_bytes(Encoding.DER)
        yield b"\1" + text
    csr = x509.load_pem_x509_csr(new_request("bob", FEDERATION).csr_pem)
    yield b"\2" + csr.public_bytes(Encoding.DER)
    yield b"\3" + csr.public_bytes(Encoding.PEM)
    yield b"\4" + SIGNING_KEY.public_key().public_bytes_raw() + sign(SIGNING_KEY, b"context", b"data") + b"data"


TARGETS: Final = (
    Target("token", read_token, tokens, max_bytes=16_000, runs=20_000),
    Target("identity", read_identity, identity_files, max_bytes=16_000),
    Target("certificate", read_certificate, certificates, runs=30_000),
)

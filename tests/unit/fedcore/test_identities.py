from __future__ import annotations

import base64
import hashlib
import json
import string
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput, Unauthenticated
from fedcore.identity import (
    EnrolmentToken,
    Identity,
    Role,
    certificate_request,
    identity_of,
    is_issued_by,
    load_certificate,
    new_signing_key,
    serial_of,
    sign,
    verify,
)

KEY = ec.generate_private_key(ec.SECP256R1())
URL_SAFE = string.ascii_letters + string.digits + "-_"
P25519 = 2**255 - 19


def certificate(*names: x509.GeneralName, common_name: str = "alice", serial: int = 7) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    builder = x509.CertificateBuilder(subject, subject, KEY.public_key(), serial)
    builder = builder.not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
    builder = builder.not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256())


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


CERTIFICATE = certificate(uri("roundtable://f/server"))
CA_PEM = CERTIFICATE.public_bytes(serialization.Encoding.PEM).decode()


def token(**changes: object) -> EnrolmentToken:
    fields: dict[str, object] = {
        "server": "fl.example.org:7400",
        "enrol": "fl.example.org:7401",
        "federation": "hospitals",
        "client": "site-1",
        "ca_pem": CA_PEM,
        "secret": "A" * 42 + "Q",
        "expires_at": 1_800_000_000.5,
    }
    return EnrolmentToken(**(fields | changes))  # type: ignore[arg-type]


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


# --- certificates ---------------------------------------------------------------------------------------------------


@given(federation=names, name=names, role=st.sampled_from([Role.CLIENT, Role.OPERATOR]))
def test_every_identity_comes_back_from_its_certificate(federation: str, name: str, role: Role) -> None:
    identity = Identity(federation, role, name)
    assert identity.uri == f"roundtable://{federation}/{role}/{name}"
    assert identity_of(certificate(uri(identity.uri), common_name="somebody else")) == identity


def test_the_server_identity_has_no_name_in_its_uri() -> None:
    server = Identity("f", Role.SERVER, "server")
    assert server.uri == "roundtable://f/server"
    assert identity_of(CERTIFICATE) == server
    with pytest.raises(InvalidInput, match="must be 'server'"):
        Identity("f", Role.SERVER, "other")


@pytest.mark.parametrize(
    "forged",
    [
        "roundtable://f/client/",
        "roundtable://f/client",
        "roundtable://f/server/x",
        "roundtable://f/admin/alice",
        "roundtable://f/CLIENT/alice",
        "Roundtable://f/client/alice",
        "roundtable://f/client/alice/..",
        "roundtable://f/client/../operator/alice",
        "roundtable://f/client/alice?x",
        "roundtable://f/client/alice#x",
        "roundtable://f/client/al%69ce",
        "roundtable://f/client/alice\n",
        "roundtable://f/client/alice\x00",
        " roundtable://f/client/alice",
        "roundtable://f@g/client/alice",
        "roundtable://f:1/client/alice",
        "roundtable:///client/alice",
        "roundtable://.f/client/alice",
        "roundtable://f/client/-alice",
        "roundtable://f/client/" + "a" * 65,
        "https://f/client/alice",
        "",
    ],
)
def test_a_uri_of_another_form_names_nobody(forged: str) -> None:
    with pytest.raises(Unauthenticated, match="is not a Roundtable identity"):
        identity_of(certificate(uri(forged)))


def test_two_uris_name_nobody() -> None:
    one, two = uri("roundtable://f/client/alice"), uri("roundtable://f/client/bob")
    for pair in ((one, two), (one, one), (one, uri("https://example.org"))):
        with pytest.raises(Unauthenticated, match="holds 2 URIs"):
            identity_of(certificate(*pair))


def test_the_subject_names_nobody() -> None:
    with pytest.raises(Unauthenticated, match="no subject alternative name"):
        identity_of(certificate(common_name="roundtable://f/client/a"))
    with pytest.raises(Unauthenticated, match="holds 0 URIs"):
        identity_of(certificate(x509.DNSName("roundtable")))


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.filterwarnings("ignore:Attribute's length")
@given(position=st.integers(0), value=st.integers(0, 255))
def test_a_damaged_certificate_is_refused_in_our_words_or_read(position: int, value: int) -> None:
    der = bytearray(CERTIFICATE.public_bytes(serialization.Encoding.DER))
    der[position % len(der)] = value
    body = base64.encodebytes(bytes(der))
    pem = b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
    try:
        damaged = load_certificate(pem)
        identity_of(damaged)
    except (InvalidInput, Unauthenticated):
        return
    assert bytes(der) == CERTIFICATE.public_bytes(serialization.Encoding.DER) or not is_issued_by(damaged, CERTIFICATE)


def test_only_one_certificate_of_bounded_size_is_read() -> None:
    with pytest.raises(InvalidInput, match="2 certificates"):
        load_certificate(CA_PEM.encode() * 2)
    with pytest.raises(InvalidInput, match="bound is 16384"):
        load_certificate(CA_PEM.encode() + b" " * 16384)
    with pytest.raises(InvalidInput, match="not a certificate"):
        load_certificate(b"")


def test_a_serial_is_plain_hexadecimal() -> None:
    assert serial_of(certificate(serial=0xAB0)) == "ab0"


def test_a_request_is_signed_by_its_key_and_names_the_identity() -> None:
    request = x509.load_pem_x509_csr(certificate_request(KEY, Identity("f", Role.CLIENT, "alice")))
    assert request.is_signature_valid
    assert request.public_key() == KEY.public_key()
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [uri("roundtable://f/client/alice")]


# --- tokens ---------------------------------------------------------------------------------------------------------


@given(
    client=names,
    federation=names,
    secret=st.text(URL_SAFE, min_size=43, max_size=43),
    expires_at=st.floats(1, 1e11),
    server=st.sampled_from(["a:1", "10.0.0.1:65535", "[::1]:80", "x.y-z.example:443"]),
)
def test_every_token_comes_back_from_its_line(
    client: str, federation: str, secret: str, expires_at: float, server: str
) -> None:
    issued = token(client=client, federation=federation, secret=secret, expires_at=expires_at, server=server)
    line = issued.encode()
    assert set(line) <= set(URL_SAFE)
    assert EnrolmentToken.decode(line) == issued
    assert EnrolmentToken.decode(f"  {line[:70]}\n{line[70:]}\r\n") == issued


@given(position=st.integers(0), character=st.sampled_from([*URL_SAFE, *"=+/ .\n\x00é٣"]))
@example(position=-1, character="-")
def test_changing_any_character_leaves_no_token(position: int, character: str) -> None:
    line = token().encode()
    position %= len(line)
    assume(line[position] != character)
    with pytest.raises(InvalidInput):
        EnrolmentToken.decode(line[:position] + character + line[position + 1 :])


def test_changing_each_character_in_turn_leaves_no_token() -> None:
    line = token().encode()
    for position, old in enumerate(line):
        new = URL_SAFE[(URL_SAFE.index(old) + 1) % 64]
        with pytest.raises(InvalidInput):
            EnrolmentToken.decode(line[:position] + new + line[position + 1 :])


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_the_unused_bits_of_the_last_character_make_no_second_token(padding: int) -> None:
    line = token(client="a" * (padding + 1)).encode()
    for character in URL_SAFE.replace(line[-1], ""):
        with pytest.raises(InvalidInput):
            EnrolmentToken.decode(line[:-1] + character)


@given(start=st.integers(0, 2000), stop=st.integers(0, 2000))
def test_a_part_of_a_token_is_no_token(start: int, stop: int) -> None:
    line = token().encode()
    assume(line[start:stop] != line)
    with pytest.raises(InvalidInput):
        EnrolmentToken.decode(line[start:stop])


@given(st.text())
def test_arbitrary_text_is_no_token(text: str) -> None:
    with pytest.raises(InvalidInput):
        EnrolmentToken.decode(text)


def encoded(fields: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).rstrip(b"=").decode()


def fields_with_checksum(**changes: object) -> str:
    """Encode as `EnrolmentToken.encode` does, whatever the values: a forger knows the format."""
    line = token().encode()
    fields = json.loads(base64.urlsafe_b64decode(line + "=" * (-len(line) % 4)))
    del fields["check"]
    fields |= changes
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    fields["check"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return base64.urlsafe_b64encode(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).decode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_arbitrary_json_is_no_token(value: object) -> None:
    with pytest.raises(InvalidInput):
        EnrolmentToken.decode(encoded(value))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"v": 2}, "format 2"),
        ({"v": 10**400}, "format"),
        ({"v": True}, "damaged"),
        ({"v": 1.0}, "damaged"),
        ({"v": "1"}, "fields"),
        ({"client": "../x"}, "client '../x' is not valid"),
        ({"client": 5}, "fields"),
        ({"federation": ""}, "federation"),
        ({"server": "example.org"}, "HOST:PORT"),
        ({"server": "http://example.org:80"}, "HOST:PORT"),
        ({"enrol": "example.org:0"}, "1 to 65535"),
        ({"enrol": "example.org:٣"}, "1 to 65535"),
        ({"ca_pem": "no"}, "not a certificate"),
        ({"ca_pem": "\ud800"}, "not a certificate"),
        ({"ca_pem": CA_PEM * 2}, "not a certificate"),
        ({"secret": "short"}, "43 characters"),
        ({"secret": "é" * 43}, "43 characters"),
        ({"expires_at": float("nan")}, "not a time"),
        ({"expires_at": float("inf")}, "not a time"),
        ({"expires_at": -1.0}, "not a time"),
        ({"expires_at": 5}, "fields"),
        ({"more": 1}, "fields"),
    ],
)
def test_a_well_formed_token_with_a_bad_field_is_refused_by_name(change: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        EnrolmentToken.decode(fields_with_checksum(**change).rstrip("="))


@pytest.mark.parametrize(
    "line",
    [
        base64.urlsafe_b64encode(b"[" * 6000).decode(),
        base64.urlsafe_b64encode(b'{"v":' * 1100).decode(),
        base64.urlsafe_b64encode(b"9" * 6000).decode(),
        base64.urlsafe_b64encode(b"\xff\xfe\x00").decode(),
    ],
)
def test_json_bombs_are_no_token(line: str) -> None:
    with pytest.raises(InvalidInput):
        EnrolmentToken.decode(line)


def test_an_oversized_token_is_refused_unread() -> None:
    with pytest.raises(InvalidInput, match="100000 characters long; the bound is 8192"):
        EnrolmentToken.decode("A" * 100_000)


def test_a_mistyped_value_is_told_apart_from_a_bad_one() -> None:
    line = token(client="site-1").encode()
    text = base64.urlsafe_b64decode(line + "=" * (-len(line) % 4)).replace(b"site-1", b"site-2")
    with pytest.raises(InvalidInput, match="its checksum is wrong"):
        EnrolmentToken.decode(base64.urlsafe_b64encode(text).decode().rstrip("="))


def test_a_second_encoding_of_the_same_fields_is_no_token() -> None:
    line = token().encode()
    fields = json.loads(base64.urlsafe_b64decode(line + "=" * (-len(line) % 4)))
    for other in (encoded(fields), line + "="):
        with pytest.raises(InvalidInput):
            EnrolmentToken.decode(other)


def test_the_secret_is_never_shown() -> None:
    issued = token(secret="x" * 43)
    for shown in (repr(issued), str(issued), f"{issued}"):
        assert "x" * 43 not in shown
    line = issued.encode()
    for text in (line[:-2], line[:50] + "A" + line[50:], fields_with_checksum(secret="x" * 44)):
        with pytest.raises(InvalidInput) as caught:
            EnrolmentToken.decode(text)
        assert "x" * 43 not in str(caught.value)
        assert line[:40] not in str(caught.value)
        assert caught.value.__cause__ is None


# --- signatures -----------------------------------------------------------------------------------------------------


@given(context=st.binary(max_size=8), data=st.binary(max_size=64))
def test_a_signature_fits_its_own_context_data_and_key_only(context: bytes, data: bytes) -> None:
    key, other = new_signing_key(), new_signing_key()
    public, signature = key.public_key().public_bytes_raw(), sign(key, context, data)
    verify(public, context, data, signature)
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    wrong: list[tuple[bytes, bytes, bytes, bytes]] = [
        (other.public_key().public_bytes_raw(), context, data, signature),
        (public, context + b"x", data, signature),
        (public, context, data + b"x", signature),
        (public, context, data, flipped),
        (public, context, data, signature[:-1]),
        (public, context, data, b""),
        (public, context, data, key.sign(data)),
    ]
    for arguments in wrong:
        with pytest.raises(Unauthenticated):
            verify(*arguments)


@given(head=st.binary(min_size=1, max_size=8), tail=st.binary(max_size=64))
def test_bytes_cannot_move_between_context_and_data(head: bytes, tail: bytes) -> None:
    key = new_signing_key()
    signature = sign(key, b"", head + tail)
    with pytest.raises(Unauthenticated):
        verify(key.public_key().public_bytes_raw(), head, tail, signature)


def _small_order_keys() -> list[bytes]:
    """The eight torsion points, by square roots from the curve's equation, each with both signs and unreduced."""
    d = -121665 * pow(121666, -1, P25519) % P25519
    ys = {0, 1, P25519 - 1}
    # The curve is -x^2 + y^2 = 1 + d x^2 y^2. Doubling a point of order 8 gives y = 0, that is y^2 = -x^2,
    # so d y^4 + 2 y^2 - 1 = 0.
    root = _sqrt((1 + d) % P25519)
    for sign_ in (1, -1):
        square = (-1 + sign_ * root) * pow(d, -1, P25519) % P25519
        if pow(square, (P25519 - 1) // 2, P25519) == 1:
            y = _sqrt(square)
            ys |= {y, P25519 - y}
    assert len(ys) == 5
    every = {value for y in ys for value in (y, y + P25519) if value < 2**255}
    return [(value | top << 255).to_bytes(32, "little") for value in every for top in (0, 1)]


def _sqrt(a: int) -> int:
    root = pow(a, (P25519 + 3) // 8, P25519)
    if root * root % P25519 != a % P25519:
        root = root * pow(2, (P25519 - 1) // 4, P25519) % P25519
    assert root * root % P25519 == a % P25519
    return root


@pytest.mark.parametrize("public_key", _small_order_keys(), ids=bytes.hex)
def test_keys_whose_signatures_prove_nothing_are_refused(public_key: bytes) -> None:
    with pytest.raises(Unauthenticated, match="small order"):
        verify(public_key, b"c", b"data", public_key + bytes(32))


@pytest.mark.parametrize("make", [lambda: b"", lambda: bytes(31), lambda: b"\x02" * 33])
def test_a_key_of_another_length_is_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(Unauthenticated, match="Ed25519 has 32"):
        verify(make(), b"c", b"data", bytes(64))

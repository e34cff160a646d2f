from __future__ import annotations

from dataclasses import dataclass

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import Unauthenticated, Unreachable
from fedcore.identity import Identity, Role, certificate_request, serial_of, utc
from fedserver.security.access import Caller, admit
from fedserver.security.authority import Authority

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0


@dataclass(frozen=True)
class Record:
    serial: str
    revoked_at: float | None = None


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("a") / "ca", "f", ["localhost"], wall_s=lambda: NOW_S)


def certify(authority: Authority, name: str = "alice") -> tuple[bytes, str]:
    csr = certificate_request(ec.generate_private_key(ec.SECP256R1()), Identity("f", Role.CLIENT, name))
    certificate = authority.sign_client(csr, name, 1000.0)
    return certificate.public_bytes(serialization.Encoding.PEM), serial_of(certificate)


def call(pem: bytes, clients: dict[str, Record], *, now_s: float = NOW_S, federation: str = "f") -> Caller:
    return admit(pem, federation=federation, now_s=now_s, client=clients.get)


def test_an_enrolled_client_is_who_its_certificate_says(authority: Authority) -> None:
    pem, serial = certify(authority)
    assert call(pem, {"alice": Record(serial)}) == Caller(Identity("f", Role.CLIENT, "alice"), serial)


def test_an_operator_needs_no_enrolment(authority: Authority) -> None:
    caller = call(authority.operator_chain_pem, {})
    assert caller.identity == Identity("f", Role.OPERATOR, "operator")


def test_a_connection_does_not_outlive_the_certificate(authority: Authority) -> None:
    pem, serial = certify(authority)
    clients = {"alice": Record(serial)}
    call(pem, clients, now_s=NOW_S + 999)
    with pytest.raises(Unauthenticated, match="'alice' expired at"):
        call(pem, clients, now_s=NOW_S + 1000)
    with pytest.raises(Unauthenticated, match="'operator' expired at"):
        call(authority.operator_chain_pem, {}, now_s=NOW_S + 366 * 86400)


def test_a_certificate_from_the_future_may_be_tried_again_when_the_clock_is_right(authority: Authority) -> None:
    pem, serial = certify(authority)
    call(pem, {"alice": Record(serial)}, now_s=NOW_S - 300)
    call(pem, {"alice": Record(serial)}, now_s=NOW_S - 300)
    with pytest.raises(Unreachable, match="'alice' is not valid before"):
        call(pem, {"alice": Record(serial)}, now_s=NOW_S - 301)
    for certificate in (pem, authority.operator_chain_pem):
        with pytest.raises(Unreachable, match=f"not valid before .*, and here it is {utc(NOW_S - DAY_S)}"):
            call(certificate, {"alice": Record(serial)}, now_s=NOW_S - DAY_S)


def test_no_clock_hides_that_a_client_is_not_welcome(authority: Authority) -> None:
    pem, serial = certify(authority)
    for clients in ({"alice": Record(serial, revoked_at=0.0)}, {"alice": Record("other")}, {}):
        with pytest.raises(Unauthenticated):
            call(pem, clients, now_s=NOW_S - DAY_S)


def test_revocation_works_on_the_next_call(authority: Authority) -> None:
    pem, serial = certify(authority)
    clients = {"alice": Record(serial)}
    call(pem, clients)
    clients["alice"] = Record(serial, revoked_at=0.0)
    with pytest.raises(Unauthenticated, match="'alice' was revoked at 1970-01-01 00:00:00 UTC"):
        call(pem, clients)


def test_enrolling_again_ends_the_old_certificate(authority: Authority) -> None:
    (old_pem, _), (new_pem, new_serial) = certify(authority), certify(authority)
    clients = {"alice": Record(new_serial)}
    call(new_pem, clients)
    with pytest.raises(Unauthenticated, match="'alice' was enrolled again"):
        call(old_pem, clients)


def test_a_valid_certificate_of_an_unknown_client_is_refused(authority: Authority) -> None:
    pem, serial = certify(authority)
    with pytest.raises(Unauthenticated, match="'alice' is not enrolled here"):
        call(pem, {"bob": Record(serial)})


def test_the_certificate_of_another_federation_is_refused(authority: Authority) -> None:
    pem, serial = certify(authority)
    for other in (pem, authority.operator_chain_pem):
        with pytest.raises(Unauthenticated, match="of federation 'f', not of 'g'"):
            call(other, {"alice": Record(serial)}, federation="g")


def test_the_servers_own_certificate_is_no_callers(authority: Authority) -> None:
    with pytest.raises(Unauthenticated, match="the server's own certificate"):
        call(authority.server_chain_pem, {})


def test_a_certificate_without_an_identity_is_refused(authority: Authority) -> None:
    with pytest.raises(Unauthenticated, match="names nobody"):
        call(authority.ca_pem, {})


@pytest.mark.parametrize("pem", [b"", b"x", b"-----BEGIN CERTIFICATE-----\n", b"x" * 20_000])
def test_no_certificate_is_refused(pem: bytes) -> None:
    with pytest.raises(Unauthenticated, match="cannot be read"):
        call(pem, {})


@given(st.binary())
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Unauthenticated):
        call(data, {})


def test_two_certificates_at_once_are_refused(authority: Authority) -> None:
    (alice, serial), (bob, _) = certify(authority), certify(authority, "bob")
    with pytest.raises(Unauthenticated, match="2 certificates"):
        call(alice + bob, {"alice": Record(serial)})


def test_the_table_is_asked_on_every_call(authority: Authority) -> None:
    pem, serial = certify(authority)
    asked: list[str] = []

    def lookup(name: str) -> Record:
        asked.append(name)
        return Record(serial)

    for _ in range(3):
        admit(pem, federation="f", now_s=NOW_S, client=lookup)
    assert asked == ["alice"] * 3


def test_the_serial_is_plain_hexadecimal(authority: Authority) -> None:
    pem, serial = certify(authority)
    assert int(serial, 16) == x509.load_pem_x509_certificate(pem).serial_number
    assert serial == serial.lower().lstrip("0")

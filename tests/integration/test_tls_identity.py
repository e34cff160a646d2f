"""Real handshakes with gRPC: what our certificates open, and what stays shut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from fedclient.identity import ClientIdentity, new_request
from fedcore.errors import Unauthenticated
from fedcore.identity import serial_of
from fedserver.security.access import admit
from fedserver.security.authority import DAY_S, Authority

METHOD = "/test.Identity/WhoAmI"
OPTIONS = [("grpc.enable_retries", 0)]


@dataclass(frozen=True)
class Record:
    serial: str
    revoked_at: float | None = None


@dataclass
class Federation:
    """A server that answers every admitted caller with the caller's URI."""

    authority: Authority
    clients: dict[str, Record] = field(default_factory=dict)
    now_s: Callable[[], float] = time.time
    port: int = 0

    def who_am_i(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        (pem,) = context.auth_context()["x509_pem_cert"]
        try:
            caller = admit(
                bytes(pem), federation=self.authority.federation, now_s=self.now_s(), client=self.clients.get
            )
        except Unauthenticated as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise AssertionError("abort raises") from error
        return caller.identity.uri.encode()

    def enrol(self, name: str) -> ClientIdentity:
        request = new_request(name, self.authority.federation)
        certificate = self.authority.sign_client(request.csr_pem, name, 600.0)
        self.clients[name] = Record(serial_of(certificate))
        return request.complete(
            certificate.public_bytes(serialization.Encoding.PEM),
            server=f"localhost:{self.port}",
            ca_pem=self.authority.ca_pem,
            now_s=time.time(),
        )


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    # Made a while ago, so that there is room in its life for certificates that have expired.
    Authority.create(tmp_path / "ca", "f", ["localhost", "127.0.0.1", "::1"], wall_s=lambda: time.time() - 2 * DAY_S)
    federation = Federation(Authority.load(tmp_path / "ca"))
    with serving(federation):
        yield federation


@contextmanager
def serving(federation: Federation) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(federation.who_am_i)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Identity", {"WhoAmI": handler}),))
    authority = federation.authority
    credentials = grpc.ssl_server_credentials(
        [(authority.server_key_pem, authority.server_chain_pem)],
        root_certificates=authority.ca_pem,
        require_client_auth=True,
    )
    federation.port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def dial(
    federation: Federation,
    root: bytes,
    key: bytes | None,
    chain: bytes | None,
    host: str = "127.0.0.1",
) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    # 127.0.0.1 is the only address served; another name is checked against the certificate alone.
    options = [*OPTIONS] if host == "127.0.0.1" else [*OPTIONS, ("grpc.ssl_target_name_override", host)]
    return grpc.secure_channel(f"127.0.0.1:{federation.port}", credentials, options=options)


def ask(channel: grpc.Channel) -> str:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD, None, None)
    return call(b"", timeout=10).decode()


def refusal(channel: grpc.Channel) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught, channel:
        ask(channel)
    return caught.value.code(), caught.value.details() or ""


def test_clients_and_operators_are_known_by_their_certificates(federation: Federation) -> None:
    alice, authority = federation.enrol("alice"), federation.authority
    alice.check(time.time())
    with dial(federation, alice.ca_pem, alice.key_pem, alice.certificate_pem) as channel:
        assert ask(channel) == "roundtable://f/client/alice"
    with dial(federation, authority.ca_pem, authority.operator_key_pem, authority.operator_chain_pem) as channel:
        assert ask(channel) == "roundtable://f/operator/operator"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_every_name_of_the_server_is_accepted(federation: Federation, host: str) -> None:
    alice = federation.enrol("alice")
    with dial(federation, alice.ca_pem, alice.key_pem, alice.certificate_pem, host) as channel:
        assert ask(channel) == "roundtable://f/client/alice"


def test_another_name_is_refused_by_the_client(federation: Federation) -> None:
    alice = federation.enrol("alice")
    channel = dial(federation, alice.ca_pem, alice.key_pem, alice.certificate_pem, "evil.example.org")
    assert refusal(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_no_certificate_opens_nothing(federation: Federation) -> None:
    channel = dial(federation, federation.authority.ca_pem, None, None)
    assert refusal(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_foreign_authority_opens_nothing(federation: Federation, tmp_path: Path) -> None:
    # Same federation, same names, another key.
    foreign = Federation(Authority.create(tmp_path / "foreign", "f", ["localhost", "127.0.0.1"]))
    mallory = foreign.enrol("alice")
    channel = dial(federation, federation.authority.ca_pem, mallory.key_pem, mallory.certificate_pem)
    assert refusal(channel)[0] is grpc.StatusCode.UNAVAILABLE
    assert foreign.authority.federation == federation.authority.federation


def test_a_server_of_a_foreign_authority_is_refused_by_the_client(federation: Federation, tmp_path: Path) -> None:
    foreign = Federation(Authority.create(tmp_path / "foreign", "f", ["localhost", "127.0.0.1"]))
    alice = federation.enrol("alice")
    with serving(foreign):
        channel = dial(foreign, alice.ca_pem, alice.key_pem, alice.certificate_pem)
        assert refusal(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_the_servers_certificate_opens_nothing(federation: Federation) -> None:
    authority = federation.authority
    channel = dial(federation, authority.ca_pem, authority.server_key_pem, authority.server_chain_pem)
    assert refusal(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_outside_its_time_opens_nothing(federation: Federation, tmp_path: Path) -> None:
    for shift_s in (-DAY_S, DAY_S):
        there_s = time.time() + shift_s
        shifted = Authority.load(tmp_path / "ca", wall_s=partial(float, there_s))
        request = new_request("alice", "f")
        certificate = shifted.sign_client(request.csr_pem, "alice", 60.0)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        with pytest.raises(Unauthenticated, match="expired" if shift_s < 0 else "not valid before"):
            request.complete(pem, server="h:1", ca_pem=shifted.ca_pem, now_s=time.time())
        key_pem = request.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        channel = dial(federation, federation.authority.ca_pem, key_pem, pem)
        assert refusal(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_an_open_connection_ends_with_its_certificate(federation: Federation) -> None:
    alice = federation.enrol("alice")
    with dial(federation, alice.ca_pem, alice.key_pem, alice.certificate_pem) as channel:
        assert ask(channel)
        federation.now_s = lambda: time.time() + DAY_S
        code, text = refusal(channel)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "'alice' expired at" in text


def test_an_open_connection_ends_with_revocation(federation: Federation) -> None:
    alice = federation.enrol("alice")
    with dial(federation, alice.ca_pem, alice.key_pem, alice.certificate_pem) as channel:
        assert ask(channel)
        federation.clients["alice"] = Record(federation.clients["alice"].serial, revoked_at=time.time())
        code, text = refusal(channel)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "'alice' was revoked" in text


def test_an_open_connection_ends_with_a_new_enrolment(federation: Federation) -> None:
    alice = federation.enrol("alice")
    with dial(federation, alice.ca_pem, alice.key_pem, alice.certificate_pem) as channel:
        assert ask(channel)
        again = federation.enrol("alice")
        code, text = refusal(channel)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "enrolled again" in text
    with dial(federation, again.ca_pem, again.key_pem, again.certificate_pem) as channel:
        assert ask(channel) == "roundtable://f/client/alice"


def test_a_renewed_server_is_still_trusted(tmp_path: Path) -> None:
    old = Authority.create(tmp_path / "ca", "f", ["127.0.0.1"], wall_s=lambda: time.time() - 340 * DAY_S)
    federation = Federation(Authority.load(tmp_path / "ca"))
    assert federation.authority.server_chain_pem != old.server_chain_pem
    alice = federation.enrol("alice")
    with serving(federation), dial(federation, old.ca_pem, alice.key_pem, alice.certificate_pem) as channel:
        assert ask(channel) == "roundtable://f/client/alice"

"""Who gets in: every method of every service, each kind of stranger; and what becomes of whoever was welcome once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fedclient.enroll import enroll
from fedclient.identity import ClientIdentity, new_request
from fedclient.transport.channel import secure_channel
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import NotFound, Unauthenticated, Unreachable
from fedcore.identity import EnrolmentToken, sign
from fedcore.layout import Layout
from fedcore.messages import CHUNK_BYTES, SIGNATURE_CONTEXT, UpdateHeader
from fedproto.v1 import client_pb2, client_pb2_grpc
from fedserver.federation import Federation
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.rpc.gatekeeper import ROLES
from fedserver.rpc.server import RpcServer
from fedserver.security.authority import Authority
from tests.support.player import HELLO, playing
from tests.support.processes import Deployment, deployed, run
from tests.support.server import FEDERATION, TestServer, running_server, small_job

PROTOS = Path(client_pb2.__file__).parent.glob("*.proto")
SERVICES = [
    service
    for proto in sorted(PROTOS)
    for service in import_module(f"fedproto.v1.{proto.stem}_pb2").DESCRIPTOR.services_by_name.values()
]
METHODS = {service.name: list(service.methods) for service in SERVICES}
CLIENT, OPERATOR, ENROLMENT = METHODS["ClientService"], METHODS["OperatorService"], METHODS["EnrolmentService"]

YEAR_S = 365 * 86_400.0

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE  # all that gRPC says of a handshake that the other side refused
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


@dataclass
class Tripwire:
    """Stands where the handlers' federation and membership would; notes that somebody got so far."""

    membership: Membership | None = None
    touched: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        if name == "admit" and self.membership is not None:
            return self.membership.admit
        self.touched.append(name)
        raise NotFound("the tripwire")


class LaterClock(SystemClock):
    """The machine's clock, set forward by the test."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def wall_s(self) -> float:
        return super().wall_s() + self.ahead_s


@dataclass
class Doors:
    """Both ports of a server whose handlers do nothing, and the real membership before them."""

    server: TestServer
    clock: LaterClock
    rpc: RpcServer
    wires: tuple[Tripwire, Tripwire]

    @property
    def main(self) -> str:
        return f"localhost:{self.rpc.port}"

    @property
    def enrolment(self) -> str:
        return f"localhost:{self.rpc.enrolment_port}"

    async def knock(self, address: str, method: MethodDescriptor, pair: tuple[bytes, bytes] | None) -> tuple[Any, bool]:
        """Call a method on a connection of its own; return the status, and whether its handler was reached."""
        for wire in self.wires:
            wire.touched.clear()
        certificate_pem, key_pem = pair or (None, None)
        channel = secure_channel(address, self.server.authority.ca_pem, certificate_pem, key_pem)
        try:
            status = await call(channel, method)
        finally:
            await channel.close(None)
        return status, any(wire.touched for wire in self.wires)


async def call(channel: grpc.aio.Channel, method: MethodDescriptor) -> grpc.StatusCode:
    arity = {False: "unary", True: "stream"}
    make = getattr(channel, f"{arity[method.client_streaming]}_{arity[method.server_streaming]}")
    start = make(f"/{method.containing_service.full_name}/{method.name}", lambda message: message.SerializeToString())
    request = first_message(method.input_type)
    status = grpc.StatusCode.INTERNAL  # which gRPC's client says, now and then, of a refusal while it still writes
    for _ in range(5):
        if status is grpc.StatusCode.INTERNAL:
            status = await call_once(start, method, request)
    return status


async def call_once(start: Any, method: MethodDescriptor, request: Message) -> grpc.StatusCode:
    async def requests() -> AsyncIterator[Message]:
        yield request

    started = start(requests() if method.client_streaming else request, timeout=20)
    try:
        if method.server_streaming:
            async for _ in started:
                pass
        else:
            await started
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def first_message(kind: Descriptor) -> Message:
    """Return what a handler takes as a beginning: empty, but of a choice the first."""
    message = GetMessageClass(kind)()
    for choice in kind.oneofs:
        getattr(message, choice.fields[0].name).SetInParent()
    return message


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    clock = LaterClock()
    async with running_server(tmp_path, clock) as server:
        wires = Tripwire(), Tripwire(server.membership)
        federation, membership = cast("Federation", wires[0]), cast("Membership", wires[1])
        rpc = RpcServer(federation, membership, Metrics(), server.authority, SystemClock())
        await rpc.start("127.0.0.1", 0, 0)
        try:
            yield Doors(server, clock, rpc, wires)
        finally:
            await rpc.stop(0)


def pair_of(identity: ClientIdentity) -> tuple[bytes, bytes]:
    return identity.certificate_pem, identity.key_pem


def operator_pair(authority: Authority) -> tuple[bytes, bytes]:
    return authority.operator_chain_pem, authority.operator_key_pem


def certified(authority: Authority, name: str) -> tuple[bytes, bytes]:
    """Return a client's certificate by this authority, with its key, for somebody who never enrolled."""
    request = new_request(name, authority.federation)
    certificate = authority.sign_client(request.csr_pem, name)
    key_pem = request.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


def test_the_walk_knows_every_service_and_the_gatekeeper_too() -> None:
    assert {service.full_name for service in SERVICES} == set(ROLES)
    assert sum(len(methods) for methods in METHODS.values()) == len(CLIENT) + len(OPERATOR) + 1
    assert len(CLIENT) >= 4
    assert len(OPERATOR) >= 8
    kinds = {(method.client_streaming, method.server_streaming) for method in CLIENT + OPERATOR + ENROLMENT}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}, "a kind of call that nobody tries"


async def test_whoever_is_welcome_reaches_every_handler(doors: Doors) -> None:
    """Else the refusals below would show nothing."""
    alice = await doors.server.enrol("alice")
    found = [(method, await doors.knock(doors.main, method, pair_of(alice))) for method in CLIENT]
    found += [
        (method, await doors.knock(doors.main, method, operator_pair(doors.server.authority))) for method in OPERATOR
    ]
    found += [(method, await doors.knock(doors.enrolment, method, None)) for method in ENROLMENT]
    assert [(method.name, reached) for method, (_, reached) in found if not reached] == []


@pytest.mark.parametrize(
    ("stranger", "methods", "status"),
    [
        ("nobody", CLIENT + OPERATOR + ENROLMENT, UNAVAILABLE),
        ("client of a foreign authority", CLIENT + OPERATOR + ENROLMENT, UNAVAILABLE),
        ("operator of a foreign authority", CLIENT + OPERATOR + ENROLMENT, UNAVAILABLE),
        ("the server itself", CLIENT + OPERATOR + ENROLMENT, UNAVAILABLE),
        ("client", OPERATOR, UNAUTHENTICATED),
        ("operator", CLIENT, UNAUTHENTICATED),
        ("revoked client", CLIENT + OPERATOR, UNAUTHENTICATED),
        ("client with the certificate before the last", CLIENT + OPERATOR, UNAUTHENTICATED),
        ("client that never enrolled", CLIENT + OPERATOR, UNAUTHENTICATED),
        ("client whose certificate has expired", CLIENT + OPERATOR, UNAUTHENTICATED),
        ("client whose certificate is not valid yet", CLIENT + OPERATOR, UNAVAILABLE),
        ("operator whose certificate has expired", CLIENT + OPERATOR, UNAUTHENTICATED),
    ],
)
async def test_a_stranger_reaches_no_handler(
    doors: Doors, tmp_path: Path, stranger: str, methods: list[MethodDescriptor], status: grpc.StatusCode
) -> None:
    authority = doors.server.authority
    foreign = Authority.create(tmp_path / "foreign", FEDERATION, ["localhost"])
    alice = await doors.server.enrol("alice")
    pair: tuple[bytes, bytes] | None = pair_of(alice)
    match stranger:
        case "nobody":
            pair = None
        case "client of a foreign authority":
            pair = certified(foreign, "alice")
        case "operator of a foreign authority":
            pair = operator_pair(foreign)
        case "the server itself":
            pair = authority.server_chain_pem, authority.server_key_pem
        case "operator":
            pair = operator_pair(authority)
        case "revoked client":
            await doors.server.membership.revoke("alice")
        case "client with the certificate before the last":
            await doors.server.enrol("alice")
        case "client that never enrolled":
            pair = certified(authority, "mallory")
        # By the server's clock: TLS has another one, and test_tls_identity.py asks that.
        case "client whose certificate has expired":
            doors.clock.ahead_s = 100 * YEAR_S
        case "client whose certificate is not valid yet":
            doors.clock.ahead_s = -YEAR_S
        case "operator whose certificate has expired":
            pair = operator_pair(authority)
            doors.clock.ahead_s = 100 * YEAR_S
    found = {method.full_name: await doors.knock(doors.main, method, pair) for method in methods}
    assert found == {method.full_name: (status, False) for method in methods}


async def test_the_enrolment_port_offers_enrolment_alone_and_the_main_port_offers_none(doors: Doors) -> None:
    alice = await doors.server.enrol("alice")
    for pair in (None, pair_of(alice), operator_pair(doors.server.authority)):
        for method in CLIENT + OPERATOR:
            assert await doors.knock(doors.enrolment, method, pair) == (UNIMPLEMENTED, False), method.full_name
    for pair in (pair_of(alice), operator_pair(doors.server.authority)):
        assert await doors.knock(doors.main, ENROLMENT[0], pair) == (UNIMPLEMENTED, False)


def fields_within(kind: Descriptor) -> Iterator[str]:
    for found in kind.fields:
        yield found.name
        if found.message_type is not None:
            yield from fields_within(found.message_type)


def test_no_message_of_a_client_says_who_it_is() -> None:
    """Identity is the certificate's; where there is no field, nobody can believe one."""
    sent = [name for method in CLIENT + ENROLMENT for name in fields_within(method.input_type)]
    sent += list(UpdateHeader.model_fields)
    assert "assignment_id" in sent
    assert [name for name in sent if any(word in name for word in ("client", "name", "user", "sender", "node"))] == []


# -- with the real daemon --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("identity")) as deployment:
        yield deployment


def revoke(deployment: Deployment, name: str) -> None:
    revoked = run("fedserver", "revoke", name, "--yes", "--folder", deployment.state)
    assert revoked.wait() == 0, revoked.story()


async def connect(transport: GrpcTransport) -> None:
    """Open a session. gRPC may see that the stream is closed before it sees why; a client tries again then."""
    for _ in range(20):
        with suppress(Unreachable):
            async with transport.connect(HELLO):
                return


async def test_revoking_cuts_an_open_session_and_refuses_the_next(deployment: Deployment) -> None:
    identity = await asyncio.to_thread(deployment.enrol, "alice")
    transport = GrpcTransport(identity, SystemClock())
    async with playing(transport, identity.signing_key) as player:
        await asyncio.to_thread(revoke, deployment, "alice")
        with pytest.raises(Unauthenticated, match="revoked"):
            await asyncio.wait_for(player.next_order(), 10)
    # The connection is still there, and of no use.
    with pytest.raises(Unauthenticated, match="revoked"):
        await transport.upload_state("0" * 32)
    with pytest.raises(Unauthenticated, match="revoked"):
        await connect(transport)
    await transport.close()


async def test_revoking_cuts_an_upload_in_progress_and_nothing_of_it_counts(deployment: Deployment) -> None:
    identity = await asyncio.to_thread(deployment.enrol, "bob")
    job_id = await asyncio.to_thread(deployment.submit, small_job(max_retries=5))
    transport = GrpcTransport(identity, SystemClock())
    channel = secure_channel(identity.server, identity.ca_pem, identity.certificate_pem, identity.key_pem)
    values = 3 * CHUNK_BYTES // 4
    frame = bytes(4 * values)
    layout = Layout.of([("adapter", "large", (values,), "float32")])
    rows = [["adapter", "large", [values], "float32"]]
    async with playing(transport, identity.signing_key) as player:
        header = player.header(await player.next_work(), frame, layout=rows, layout_digest=layout.digest)
        data = header.to_bytes()
        upload = client_pb2_grpc.ClientServiceStub(channel).Upload(timeout=30)  # type: ignore[call-arg]
        opening = client_pb2.UploadOpening(
            header=data, signature=sign(identity.signing_key, SIGNATURE_CONTEXT, data), offset=0
        )
        await upload.write(client_pb2.UploadRequest(opening=opening))
        await upload.write(client_pb2.UploadRequest(chunk=client_pb2.Chunk(offset=0, data=frame[:CHUNK_BYTES])))
        while (await transport.upload_state(header.update_id)).received_bytes < CHUNK_BYTES:
            pass
        await asyncio.to_thread(revoke, deployment, "bob")
        chunk = client_pb2.Chunk(offset=CHUNK_BYTES, data=frame[CHUNK_BYTES : 2 * CHUNK_BYTES])
        await upload.write(client_pb2.UploadRequest(chunk=chunk))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await upload
        assert refused.value.code() is UNAUTHENTICATED
    await channel.close(None)
    await transport.close()
    status = await asyncio.to_thread(deployment.status, job_id)
    assert (status["status"], status["version"], status["accepted"]) == ("running", None, 0)
    with deployment.operator() as server:
        server.stop(job_id)


async def test_enrolling_again_makes_the_old_certificate_useless(deployment: Deployment) -> None:
    old = await asyncio.to_thread(deployment.enrol, "carol")
    transport = GrpcTransport(old, SystemClock())
    async with playing(transport, old.signing_key) as player:
        new = await asyncio.to_thread(deployment.enrol, "carol", "--force")
        with pytest.raises(Unauthenticated, match="enrolled anew"):
            await asyncio.wait_for(player.next_order(), 10)
    with pytest.raises(Unauthenticated, match="no longer in force"):
        await transport.upload_state("0" * 32)
    await transport.close()
    assert new.certificate_pem != old.certificate_pem
    transport = GrpcTransport(new, SystemClock())
    assert (await transport.upload_state("0" * 32)).received_bytes == 0
    await transport.close()


def test_a_revoked_client_process_ends_and_says_why(deployment: Deployment) -> None:
    client = deployment.start_client("dave", {"shard": 0, "num_shards": 1})
    client.wait_for_event("connected")
    revoke(deployment, "dave")
    assert client.wait() == 9, client.story()
    assert "revoked" in client.err[-1]
    assert "Traceback" not in client.story()


def test_a_token_works_once_and_not_after_its_client_is_revoked(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.operator() as server:
        used, unused = (server.issue_token("erin", 600) for _ in range(2))
    first = run("fedclient", "enroll", "--token", used, "--folder", tmp_path / "first")
    assert first.wait() == 0, first.story()
    second = run("fedclient", "enroll", "--token", used, "--folder", tmp_path / "second")
    assert second.wait() == 9, second.story()
    assert "already used" in second.err[-1]
    revoke(deployment, "erin")
    third = run("fedclient", "enroll", "--token", unused, "--folder", tmp_path / "third")
    assert third.wait() == 9, third.story()
    assert not (tmp_path / "second").exists() or not any((tmp_path / "second").iterdir())


async def test_an_expired_token_is_refused_by_the_server(tmp_path: Path) -> None:
    clock = LaterClock()
    async with running_server(tmp_path, clock) as server:
        token = EnrolmentToken.decode(await server.membership.issue_token("alice", 60))
        clock.ahead_s = 61.0
        with pytest.raises(Unauthenticated, match="expired"):
            await enroll(token, tmp_path / "alice", SystemClock())
        assert server.membership.clients() == []

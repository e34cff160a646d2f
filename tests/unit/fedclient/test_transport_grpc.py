"""The gRPC transport against a scripted service on loopback, under real mutual TLS."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fedclient.identity import ClientIdentity, new_request
from fedclient.pieces import Pieces
from fedclient.transport import grpc_session, grpc_transport
from fedclient.transport.base import Transport
from fedclient.transport.convert import UnfitAssignment, assignment_from_wire, upload_state_from_wire
from fedclient.transport.enrolment import enrol
from fedclient.transport.errors import STATUSES, from_rpc_error
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import (
    FedError,
    NotFound,
    Refused,
    Unauthenticated,
    Unreachable,
    UpdateRejected,
    UpdateResult,
)
from fedcore.messages import (
    CHUNK_BYTES,
    ERROR_CODE_KEY,
    ERROR_REASON_KEY,
    Assignment,
    Cancel,
    Decline,
    Heartbeat,
    Hello,
    UploadState,
)
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import client_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc
from fedserver.security.authority import Authority

Context = grpc.aio.ServicerContext[Any, Any]
HELLO = Hello("test", "cpu", ("toy",), ("full",), ("raw",), ("aa" * 16,))
WIRE_ASSIGNMENT = pb.Assignment(
    assignment_id="ab" * 16,
    job_id="cd" * 16,
    job=b"{}",
    version=3,
    kind=pb.WORK_KIND_TRAIN,
    seed=2**63 - 1,
    layout_digest="0" * 64,
    frame_digest="1" * 64,
    frame_bytes=7,
    deadline_ms=1500,
)


class Service(client_pb2_grpc.ClientServiceServicer):
    """Keeps what it hears; `script` holds what the next session says after its welcome."""

    def __init__(self) -> None:
        self.heard: list[pb.SessionRequest] = []
        self.half_closed = asyncio.Event()
        self.script: list[pb.SessionReply] = []
        self.abort: tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]] | None = None
        self.frame = bytes(range(256)) * 10_000
        self.received = bytearray()
        self.chunk_sizes: list[int] = []
        self.answer_early = False
        self.silent = False
        self.answers = True
        self.ends_with_update = False

    async def Session(self, request_iterator: Any, context: Context) -> AsyncIterator[pb.SessionReply]:  # noqa: N802
        self.heard.append(await anext(aiter(request_iterator)))
        await self._maybe_abort(context)
        yield pb.SessionReply(welcome=pb.Welcome(heartbeat_interval_ms=2500))
        for reply in self.script:
            yield reply
        async for request in request_iterator:
            self.heard.append(request)
            await self._maybe_abort(context)
            if request.WhichOneof("event") == "update":
                if self.ends_with_update:
                    return
                for number in (99, request.update.number) if self.answers else ():
                    yield pb.SessionReply(
                        upload=pb.UploadState(
                            number=number,
                            received_bytes=len(request.update.frame),
                            result="duplicate",
                            text=request.update.header.decode(),
                        )
                    )
        self.half_closed.set()

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:  # noqa: N802
        await self._maybe_abort(context)
        for start in range(request.offset, len(self.frame), CHUNK_BYTES):
            yield pb.Chunk(offset=start, data=self.frame[start : start + CHUNK_BYTES])
            if self.silent:
                await asyncio.Event().wait()

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.UploadState:  # noqa: N802
        await self._maybe_abort(context)
        return pb.UploadState(received_bytes=len(self.received))

    async def Upload(self, request_iterator: Any, context: Context) -> pb.UploadState:  # noqa: N802
        requests = aiter(request_iterator)
        opening = (await anext(requests)).opening
        if self.answer_early:
            return pb.UploadState(result="too-late", text="the round is closed")
        if self.silent:
            await asyncio.Event().wait()
        assert opening.offset == len(self.received)
        async for request in requests:
            assert request.chunk.offset == len(self.received)
            self.received += request.chunk.data
            self.chunk_sizes.append(len(request.chunk.data))
        return pb.UploadState(received_bytes=len(self.received), result="accepted")

    async def _maybe_abort(self, context: Context) -> None:
        if self.abort is not None:
            code, text, metadata = self.abort
            await context.abort(code, text, metadata)


class Enrolment(enrolment_pb2_grpc.EnrolmentServiceServicer):
    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolReply:  # noqa: N802
        if request.secret != "open sesame":
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "the token is used", ((ERROR_CODE_KEY, "unauthenticated"),)
            )
        return enrolment_pb2.EnrolReply(certificate=b"cert for " + request.certificate_request)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority") / "ca", "fed", ["localhost", "127.0.0.1"])


@pytest.fixture(scope="module")
def base_identity(authority: Authority) -> ClientIdentity:
    return identity_from(authority)


def identity_from(authority: Authority) -> ClientIdentity:
    request = new_request("c1", "fed")
    pem = authority.sign_client(request.csr_pem, "c1").public_bytes(Encoding.PEM)
    return request.complete(pem, server="127.0.0.1:1", ca_pem=authority.ca_pem, now_s=SystemClock().wall_s())


@asynccontextmanager
async def listening(
    authority: Authority, add: Callable[[grpc.aio.Server], None], *, mutual: bool
) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add(server)
    pair = [(authority.server_key_pem, authority.server_chain_pem)]
    credentials = grpc.ssl_server_credentials(pair, authority.ca_pem if mutual else None, mutual)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
async def transport(authority: Authority, base_identity: ClientIdentity, service: Service) -> AsyncIterator[Transport]:
    def add(server: grpc.aio.Server) -> None:
        client_pb2_grpc.add_ClientServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call,unused-ignore]

    async with listening(authority, add, mutual=True) as address:
        transport = GrpcTransport(base_identity, SystemClock(), address)
        try:
            yield transport
        finally:
            await transport.close()


async def download(transport: Transport, offset: int = 0) -> list[bytes]:
    return [chunk async for chunk in transport.download("cd" * 16, 1, offset)]


def rpc_error(status: grpc.StatusCode, *trailing: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "why", "")


def test_every_status_of_grpc_is_mapped() -> None:
    assert set(STATUSES) == set(grpc.StatusCode)
    for status, expected in STATUSES.items():
        found = from_rpc_error(rpc_error(status))
        assert type(found) is expected
        assert str(found) == "why"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("not-found", NotFound),
        ("refused", Refused),
        ("unauthenticated", Unauthenticated),
        ("unreachable", Unreachable),
        ("storage-failed", Unreachable),
        ("what-is-this", Unreachable),
    ],
)
def test_the_servers_own_code_says_more_than_the_status(code: str, expected: type[FedError]) -> None:
    error = rpc_error(grpc.StatusCode.UNAVAILABLE, (ERROR_CODE_KEY, code), ("binary-bin", b"\x00"))
    assert type(from_rpc_error(error)) is expected


@pytest.mark.parametrize(
    ("reason", "expected"), [("too-late", "too-late"), ("nonsense", "malformed"), ("", "malformed")]
)
def test_a_rejected_update_keeps_its_reason(reason: str, expected: str) -> None:
    error = rpc_error(
        grpc.StatusCode.FAILED_PRECONDITION, (ERROR_CODE_KEY, "update-rejected"), (ERROR_REASON_KEY, reason)
    )
    found = from_rpc_error(error)
    assert isinstance(found, UpdateRejected)
    assert found.reason == expected


async def test_a_session_introduces_itself_and_carries_orders_both_ways(transport: Transport, service: Service) -> None:
    service.script = [
        pb.SessionReply(assignment=WIRE_ASSIGNMENT),
        pb.SessionReply(cancel=pb.Cancel(assignment_id="ab" * 16, reason="closed")),
    ]
    async with transport.connect(HELLO) as session:
        assert session.heartbeat_interval_s == 2.5
        orders = session.orders()
        assignment, cancel = await anext(orders), await anext(orders)
        await session.send(Heartbeat("ab" * 16, 0.25))
        await session.send(Decline("ab" * 16, "no data"))
    assert isinstance(assignment, Assignment)
    assert (assignment.seed, assignment.deadline_s, assignment.frame_bytes) == (2**63 - 1, 1.5, 7)
    assert cancel == Cancel("ab" * 16, "closed")
    assert service.half_closed.is_set()
    hello, beat, decline = service.heard
    assert (list(hello.hello.assignment_ids), list(hello.hello.codecs)) == (["aa" * 16], ["raw"])
    assert beat.heartbeat.progress == 0.25
    assert decline.decline.reason == "no data"


async def test_leaving_while_orders_are_awaited_still_says_goodbye(transport: Transport, service: Service) -> None:
    async with transport.connect(HELLO) as session:
        waiting = asyncio.ensure_future(anext(session.orders()))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await session.send(Decline("ab" * 16, "shutting down"))
    assert service.half_closed.is_set()
    assert service.heard[-1].decline.reason == "shutting down"


async def test_revocation_in_a_session_is_heard(transport: Transport, service: Service) -> None:
    async with transport.connect(HELLO) as session:
        service.abort = (grpc.StatusCode.UNAUTHENTICATED, "revoked", ((ERROR_CODE_KEY, "unauthenticated"),))
        await session.send(Heartbeat())
        with pytest.raises(Unauthenticated, match="revoked"):
            await anext(session.orders())


async def test_a_refused_client_cannot_connect(transport: Transport, service: Service) -> None:
    service.abort = (grpc.StatusCode.PERMISSION_DENIED, "not a client", ())
    with pytest.raises(Unauthenticated, match="not a client"):
        async with transport.connect(HELLO):
            pass


async def test_work_of_an_unknown_kind_is_declined_and_the_session_goes_on(
    transport: Transport, service: Service
) -> None:
    newer = pb.Assignment(assignment_id="ef" * 16, kind=99)  # type: ignore[arg-type,unused-ignore]
    service.script = [
        pb.SessionReply(assignment=newer),
        pb.SessionReply(),
        pb.SessionReply(assignment=WIRE_ASSIGNMENT),
    ]
    async with transport.connect(HELLO) as session:
        order = await anext(session.orders())
    assert isinstance(order, Assignment)
    assert order.assignment_id == "ab" * 16
    assert "unknown kind of work 99" in service.heard[1].decline.reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("assignment_id", "../../etc/passwd"),
        ("job_id", "AB" * 16),
        ("layout_digest", ""),
        ("frame_digest", "0" * 63),
        ("job", b"x" * 65_537),
        ("kind", pb.WORK_KIND_UNSPECIFIED),
        ("counted_in", WIRE_ASSIGNMENT.version + 1),
    ],
)
def test_an_assignment_with_a_wrong_field_is_not_understood(field: str, value: object) -> None:
    wire = pb.Assignment()
    wire.CopyFrom(WIRE_ASSIGNMENT)
    setattr(wire, field, value)
    with pytest.raises(UnfitAssignment):
        assignment_from_wire(wire)


def test_an_unknown_result_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'postponed'"):
        upload_state_from_wire(pb.UploadState(result="postponed"))


async def test_a_download_comes_in_chunks_from_the_offset(transport: Transport, service: Service) -> None:
    chunks = await download(transport, 1_000_000)
    assert max(map(len, chunks)) == CHUNK_BYTES
    assert b"".join(chunks) == service.frame[1_000_000:]


async def test_a_missing_version_is_not_found(transport: Transport, service: Service) -> None:
    service.abort = (grpc.StatusCode.NOT_FOUND, "no version 1", ())
    with pytest.raises(NotFound, match="no version 1"):
        await download(transport)


async def test_a_download_that_stalls_is_given_up(
    transport: Transport, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_transport, "PROGRESS_S", 0.05)
    service.silent = True
    with pytest.raises(Unreachable, match="next chunk"):
        await download(transport)


async def test_an_upload_goes_in_chunks_from_the_offset(transport: Transport, service: Service) -> None:
    service.received = bytearray(service.frame[:500_000])
    assert await transport.upload_state("ab" * 16) == UploadState(500_000)
    state = await transport.upload(b"h", b"s", Pieces(service.frame[:1000], memoryview(service.frame)[1000:]), 500_000)
    assert state == UploadState(len(service.frame), UpdateResult.ACCEPTED)
    assert hashlib.sha256(service.received).digest() == hashlib.sha256(service.frame).digest()
    assert max(service.chunk_sizes) == CHUNK_BYTES


async def test_an_upload_ends_when_the_server_has_heard_enough(transport: Transport, service: Service) -> None:
    service.answer_early = True
    try:
        state = await transport.upload(b"h", b"s", service.frame * 20, 0)
    except Unreachable:
        return  # the reset overtook the answer; whoever asks for the state of the upload gets it again
    assert (state.result, state.text) == (UpdateResult.TOO_LATE, "the round is closed")


async def test_an_upload_that_stalls_is_given_up(
    transport: Transport, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_transport, "PROGRESS_S", 0.05)
    service.silent = True
    with pytest.raises(Unreachable, match="next chunk"):
        await transport.upload(b"h", b"s", service.frame * 20, 0)


async def test_a_small_update_goes_in_one_message_within_the_session(transport: Transport) -> None:
    with pytest.raises(Unreachable, match="no session"):
        await transport.send_update(b"head", b"s", b"abc")
    async with transport.connect(HELLO):
        states = await asyncio.gather(*(transport.send_update(b"head%d" % n, b"s", b"abc") for n in range(3)))
    assert states == [UploadState(3, UpdateResult.DUPLICATE, f"head{n}") for n in range(3)]


async def test_a_session_that_ends_before_the_answer_is_unreachable(transport: Transport, service: Service) -> None:
    service.ends_with_update = True
    async with transport.connect(HELLO):
        with pytest.raises(Unreachable, match="ended before the answer"):
            await transport.send_update(b"head", b"s", b"abc")
        with pytest.raises(Unreachable, match="session is over"):
            await transport.send_update(b"head", b"s", b"abc")


async def test_an_update_that_is_not_answered_is_given_up(
    transport: Transport, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_session, "ANSWER_S", 0.05)
    service.answers = False
    async with transport.connect(HELLO):
        with pytest.raises(Unreachable, match="the answer to an update"):
            await transport.send_update(b"head", b"s", b"abc")
        service.answers = True
        assert (await transport.send_update(b"again", b"s", b"abc")).text == "again"


async def test_cancelling_who_sends_an_update_leaves_the_session_alone(transport: Transport, service: Service) -> None:
    service.answers = False
    async with transport.connect(HELLO):
        sending = asyncio.ensure_future(transport.send_update(b"head", b"s", bytes(1 << 20)))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        service.answers = True
        assert (await transport.send_update(b"again", b"s", b"abc")).text == "again"


async def test_an_upload_that_the_server_never_saw_has_no_bytes(transport: Transport, service: Service) -> None:
    service.abort = (grpc.StatusCode.NOT_FOUND, "no such upload", ())
    assert await transport.upload_state("ab" * 16) == UploadState(0)


async def test_nobody_listening_is_unreachable_for_every_call(base_identity: ClientIdentity) -> None:
    transport = GrpcTransport(base_identity, SystemClock(), "127.0.0.1:1")
    with pytest.raises(Unreachable):
        async with transport.connect(HELLO):
            pass
    with pytest.raises(Unreachable):
        await download(transport)
    with pytest.raises(Unreachable):
        await transport.upload(b"h", b"s", b"frame", 0)
    with pytest.raises(Unreachable):
        await transport.send_update(b"h", b"s", b"frame")
    await transport.close()
    await transport.close()


async def test_closing_the_connection_under_a_call_is_unreachable(transport: Transport, service: Service) -> None:
    async with transport.connect(HELLO) as session:
        waiting = asyncio.ensure_future(anext(session.orders()))
        await asyncio.sleep(0)
        await transport.close()
        with pytest.raises(Unreachable):
            await waiting


async def test_a_server_of_another_federation_gets_no_word(
    transport: Transport, service: Service, base_identity: ClientIdentity, tmp_path: Path
) -> None:
    stranger = Authority.create(tmp_path / "ca", "fed", ["127.0.0.1"])
    assert isinstance(transport, GrpcTransport)
    fooled = GrpcTransport(replace(base_identity, ca_pem=stranger.ca_pem), SystemClock(), transport._server)
    with pytest.raises(Unauthenticated, match="not signed by the authority"):
        async with fooled.connect(HELLO):
            pass
    with pytest.raises(Unreachable):
        await fooled.send_update(b"h", b"s", b"frame")
    await fooled.close()
    assert service.heard == []


async def test_an_expired_certificate_is_named_before_dialling(base_identity: ClientIdentity) -> None:
    class Later(SystemClock):
        def wall_s(self) -> float:
            return base_identity.expires_at + 1

    transport = GrpcTransport(base_identity, Later())
    with pytest.raises(Unauthenticated, match="expired at"):
        async with transport.connect(HELLO):
            pass


async def test_enrolling_trades_the_secret_for_a_certificate(authority: Authority) -> None:
    def add(server: grpc.aio.Server) -> None:
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(Enrolment(), server)  # type: ignore[no-untyped-call,unused-ignore]

    request = {"certificate_request": b"csr", "signing_key": b"k", "signing_key_proof": b"p"}
    async with listening(authority, add, mutual=False) as address:
        assert await enrol(address, authority.ca_pem, secret="open sesame", **request) == b"cert for csr"
        with pytest.raises(Unauthenticated, match="the token is used"):
            await enrol(address, authority.ca_pem, secret="wrong", **request)
    with pytest.raises(Unreachable):
        await enrol(address, authority.ca_pem, secret="open sesame", **request)

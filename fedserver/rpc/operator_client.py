"""The operator's side of `OperatorService`: plain values in and out, every failure one of our errors.

Synchronous, because commands do one thing at a time. Each call has a deadline. Streams are opened anew before a
connection gets old; `watch` also sits out a short outage, as a restart of the server.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf.message import Message

from fedcore.errors import StateUnusable, Unreachable
from fedcore.messages import CHUNK_BYTES
from fedproto.v1 import client_pb2, operator_pb2_grpc
from fedproto.v1 import operator_pb2 as pb
from fedserver.initial.adapter import GivenAdapter
from fedserver.rpc.operator_errors import from_rpc_error

ANSWER_S: Final = 30.0
CHECK_S: Final = 600.0
STREAM_S: Final = 60.0  # a stream that brings nothing for so long is broken, however alive its connection looks
OUTAGE_S: Final = 60.0
RETRY_S: Final = 1.0

OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.max_receive_message_length", 4 * CHUNK_BYTES),
    ("grpc.max_send_message_length", 4 * CHUNK_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # despite its name: how long one attempt to connect may take
]


@dataclass(frozen=True)
class JobState:
    """A job's id and what becomes of it."""

    job_id: str
    status: str


@dataclass(frozen=True)
class ClientState:
    """An enrolled client. Times are seconds since 1970; `software` and `device` are empty while it is away."""

    name: str
    connected: bool
    revoked: bool
    enrolled_at: float
    expires_at: float
    software: str
    device: str


@dataclass(frozen=True)
class VersionState:
    """What a version is.

    Attributes:
        job: canonical JSON (`fedcore.jobfile.Job.from_json`).
        layout: `fedcore.layout.Layout.from_json`.
        sha256: of the trained values, hexadecimal.
        num_bytes: of all there is: the trained values and the basis, raw float32 little-endian, then the changes.
        basis_sha256: of the basis; None: there is none.
        basis_bytes: of the basis.
        changes: SHA-256 and bytes of each change that has led to the frozen matrices (`fedcore.changes`).
        base_digest: of the base model's frozen weights; None: not known, or none is frozen.
        adapter_sha256: of the PEFT weights that version 0 has the values of; None: none.
        history: a row for each version (docs/status.md).
    """

    job_id: str
    job: bytes
    layout: bytes
    version: int
    sha256: str
    num_bytes: int
    basis_sha256: str | None
    basis_bytes: int
    changes: tuple[tuple[str, int], ...]
    history: list[dict[str, Any]]
    base_digest: str | None = None
    adapter_sha256: str | None = None

    @property
    def state_bytes(self) -> int:
        """Of the trained values and the basis."""
        return self.num_bytes - sum(num_bytes for _, num_bytes in self.changes)

    def changes_in(self, data: bytes | bytearray) -> list[bytes]:
        """Return the changes in what `read_version` has returned."""
        ends = accumulate((num_bytes for _, num_bytes in self.changes), initial=self.state_bytes)
        return [bytes(data[start:end]) for start, end in pairwise(ends)]


class OperatorClient:
    """A connection to one server; dials on the first call. A context manager that closes itself.

    Every method raises `Unreachable` if nobody answers, `Unauthenticated` if the operator's certificate is not
    accepted, and the server's own errors under their own classes.
    """

    def __init__(self, address: str, *, ca_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> None:
        self.address = address
        credentials = grpc.ssl_channel_credentials(ca_pem, key_pem, certificate_pem)
        self._channel = grpc.secure_channel(address, credentials, options=OPTIONS)
        self._stub = operator_pb2_grpc.OperatorServiceStub(self._channel)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: bytes, adapter: GivenAdapter | None = None) -> JobState:
        """Start a job, given as canonical JSON, from the values of `adapter` if there is one.

        Raises:
            InvalidInput: the server cannot run it, or not from this adapter.
            NotFound: the adapter's weights have not been sent.
        """
        request = pb.SubmitRequest(job=spec)
        if adapter is not None:
            request.adapter_digest, request.adapter_config = adapter.digest, adapter.config
        # The server looks at every value of an adapter.
        reply = self._ask(self._stub.Submit, request, ANSWER_S if adapter is None else CHECK_S)
        return JobState(reply.job_id, reply.status)

    def put_adapter(
        self, digest: str, weights: memoryview, on_bytes: Callable[[int], None] = lambda total: None
    ) -> None:
        """Send the weights of an adapter, and return when the server has them on its disk.

        A transfer that breaks goes on from where it was, as long as each try brings something. What the server has
        already is not sent.

        Args:
            digest: SHA-256 (hex) of the weights.
            weights: the safetensors file.
            on_bytes: told how many bytes are on their way or there.

        Raises:
            InvalidInput: the server does not take them.
        """
        held, failed_at = 0, -1
        while True:
            try:
                request = _adapter_requests(digest, weights, held, on_bytes)
                received = int(self._ask(self._stub.PutAdapter, request, STREAM_S).received_bytes)
            except Unreachable:
                if failed_at == held:
                    raise
                failed_at = held
                continue
            if received == len(weights):
                on_bytes(received)
                return
            if received == held or received > len(weights):
                raise Unreachable(f"the server at {self.address} took {received} of {len(weights)} bytes")
            held = received

    def stop(self, job: str) -> JobState:
        """End a job, named by id, by the start of its id, or by its name if that is unique.

        Raises:
            NotFound: no such job.
        """
        reply = self._ask(self._stub.Stop, pb.JobRequest(job_id=job))
        return JobState(reply.job_id, reply.status)

    def status(self, job: str = "") -> dict[str, Any]:
        """Return what the server does now (docs/status.md), with one job or all.

        Raises:
            NotFound: no such job.
        """
        with closing(self._stream(self._stub.Status, pb.StatusRequest(job_id=job))) as replies:
            for reply in replies:
                return _status(reply)
        raise Unreachable(f"the server at {self.address} ended the call without an answer")

    def watch(self, job: str = "", *, on_outage: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
        """Yield `status` now and after each change, for as long as the caller wants.

        A status may come twice. An outage of up to `OUTAGE_S` seconds is sat out, if there was an answer before it.

        Args:
            job: as for `stop`; empty for all.
            on_outage: told once for each outage what is wrong.

        Raises:
            NotFound: no such job.
            Unreachable: no answer, for too long.
        """
        heard_s: float | None = None
        is_outage = False
        while True:
            is_answered = False
            failure = Unreachable(f"the server at {self.address} ended the call")
            try:
                with closing(self._stream(self._stub.Status, pb.StatusRequest(job_id=job, watch=True))) as replies:
                    for reply in replies:
                        heard_s, is_answered, is_outage = time.monotonic(), True, False
                        yield _status(reply)
            except Unreachable as error:
                failure = error
            if is_answered:
                continue  # usually it was only due to be opened anew; if not, the next one says so
            if heard_s is None or time.monotonic() - heard_s > OUTAGE_S:
                raise failure
            if not is_outage:
                is_outage = True
                on_outage(str(failure))
            time.sleep(RETRY_S)

    # -- clients -----------------------------------------------------------------------------------------------------

    def issue_token(self, client: str, lifetime_s: int) -> str:
        """Return a new one-time enrolment token, one line.

        Raises:
            InvalidInput: not a name, or a lifetime out of bounds.
        """
        reply = self._ask(self._stub.IssueToken, pb.IssueTokenRequest(client=client, lifetime_s=lifetime_s))
        return str(reply.token)

    def clients(self) -> list[ClientState]:
        """Return every client by name, revoked ones too."""
        return [
            ClientState(
                row.name,
                row.connected,
                row.revoked,
                row.enrolled_at_s,
                row.expires_at_s,
                row.software,
                row.device,
            )
            for row in self._ask(self._stub.ListClients, pb.ListClientsRequest()).clients
        ]

    def revoke(self, client: str) -> None:
        """Refuse a client from now on.

        Raises:
            NotFound: no such client.
        """
        self._ask(self._stub.Revoke, pb.RevokeRequest(client=client))

    # -- versions ----------------------------------------------------------------------------------------------------

    def version(self, job: str, version: int | None = None) -> VersionState:
        """Return what a version is, or the newest one.

        Raises:
            NotFound: no such job or version.
        """
        request = pb.GetVersionRequest(job_id=job, latest=version is None, version=version or 0)
        reply = self._ask(self._stub.GetVersion, request)
        with closing(self._stream(self._stub.ListVersions, pb.JobRequest(job_id=reply.job_id))) as rows:
            history = [json.loads(row.json) for row in rows]
        return VersionState(
            reply.job_id,
            reply.job,
            reply.layout,
            reply.version,
            reply.state_digest,
            reply.state_bytes + reply.basis_bytes + sum(change.bytes for change in reply.changes),
            reply.basis_digest or None,
            reply.basis_bytes,
            tuple((change.digest, change.bytes) for change in reply.changes),
            history,
            reply.base_digest or None,
            reply.adapter_digest or None,
        )

    def read_version(self, wanted: VersionState, on_bytes: Callable[[int], None] = lambda total: None) -> bytearray:
        """Return a version's vector, raw float32, little-endian, its basis, and the changes of what is frozen.

        All is checked against its digests.

        A transfer that breaks goes on from where it was, as long as each try brings something.

        Args:
            wanted: from `version`.
            on_bytes: told after each chunk how many bytes are there.

        Raises:
            StateUnusable: the bytes are not those that the server announced.
        """
        data = bytearray()
        while len(data) < wanted.num_bytes:
            before = len(data)
            request = client_pb2.DownloadRequest(job_id=wanted.job_id, version=wanted.version, offset=before)
            try:
                with closing(self._stream(self._stub.ReadVersion, request)) as chunks:
                    for chunk in chunks:
                        _check_chunk(wanted, chunk, len(data))
                        data += chunk.data
                        on_bytes(len(data))
            except Unreachable:
                if len(data) == before:
                    raise
                continue
            if len(data) == before:
                raise Unreachable(f"the server at {self.address} sent {before} of {wanted.num_bytes} bytes")
        trained = wanted.state_bytes - wanted.basis_bytes
        parts = [(wanted.sha256, trained), (wanted.basis_sha256, wanted.basis_bytes), *wanted.changes]
        start = 0
        for announced, num_bytes in parts:
            with memoryview(data)[start : start + num_bytes] as part:
                found = hashlib.sha256(part).hexdigest()
            start += num_bytes
            if announced is not None and found != announced:
                raise StateUnusable(f"version {wanted.version} has SHA-256 {found}, the server announced {announced}")
        return data

    def _ask(
        self, method: Callable[..., Any], request: Message | Iterator[Message], timeout_s: float = ANSWER_S
    ) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    def _stream(self, method: Callable[..., Any], request: Message) -> Generator[Any, None, None]:
        call = method(request, timeout=STREAM_S)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        finally:
            call.cancel()


def _adapter_requests(
    digest: str, weights: memoryview, offset: int, on_bytes: Callable[[int], None]
) -> Iterator[pb.AdapterRequest]:
    yield pb.AdapterRequest(opening=pb.AdapterOpening(digest=digest, num_bytes=len(weights), offset=offset))
    for start in range(offset, len(weights), CHUNK_BYTES):
        data = bytes(weights[start : start + CHUNK_BYTES])
        on_bytes(start)
        yield pb.AdapterRequest(chunk=client_pb2.Chunk(offset=start, data=data))


def _status(reply: pb.StatusReply) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(reply.json)
    return tree


def _check_chunk(wanted: VersionState, chunk: client_pb2.Chunk, received: int) -> None:
    if chunk.offset != received or not 0 < len(chunk.data) <= wanted.num_bytes - received:
        raise StateUnusable(
            f"version {wanted.version}: the server sent {len(chunk.data)} bytes at {chunk.offset},"
            f" expected at most {wanted.num_bytes - received} at {received}"
        )

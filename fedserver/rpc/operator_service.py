"""OperatorService: decode, call the federation or the membership, encode."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fedcore.errors import InvalidInput
from fedcore.messages import CHUNK_BYTES
from fedproto.v1 import client_pb2, operator_pb2_grpc
from fedproto.v1 import operator_pb2 as pb
from fedserver.federation import Federation
from fedserver.initial.adapter import GivenAdapter
from fedserver.membership import Membership
from fedserver.rpc.gatekeeper import Context, check_again
from fedserver.rpc.patience import Flow
from fedserver.state.records import JobRecord
from fedserver.status import history_of, status_of

MIN_STATUS_INTERVAL_S = 0.2


class OperatorService(operator_pb2_grpc.OperatorServiceServicer):
    """See proto/fedproto/v1/operator.proto."""

    def __init__(self, federation: Federation, membership: Membership) -> None:
        self._federation = federation
        self._membership = membership

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.JobReply:
        given = GivenAdapter(request.adapter_config, request.adapter_digest) if request.adapter_digest else None
        return _reply(await self._federation.submit(request.job, given))

    async def PutAdapter(self, requests: AsyncIterator[pb.AdapterRequest], context: Context) -> pb.AdapterState:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("part") != "opening":
            raise InvalidInput("an adapter starts with its opening")
        adapters, digest, num_bytes = self._federation.adapters, first.opening.digest, first.opening.num_bytes
        held = await adapters.held(digest, num_bytes)
        if first.opening.offset != held or held == num_bytes:
            return pb.AdapterState(received_bytes=held)
        flow = Flow(requests, self._federation.services.clock)
        async for request in flow:
            check_again()
            offset, data = request.chunk.offset, request.chunk.data
            del request  # not held while the next one is on its way
            if not 0 < len(data) <= CHUNK_BYTES:
                raise InvalidInput(f"expected a chunk of 1 to {CHUNK_BYTES} bytes")
            await adapters.append(digest, num_bytes, offset, data)
            held = offset + len(data)
            flow.brought(len(data))
        return pb.AdapterState(received_bytes=held)

    async def Stop(self, request: pb.JobRequest, context: Context) -> pb.JobReply:
        job = self._federation.job(request.job_id)
        return _reply(await self._federation.stop_job(job.job_id))

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Context) -> pb.IssueTokenReply:
        return pb.IssueTokenReply(token=await self._membership.issue_token(request.client, request.lifetime_s))

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsReply:
        reply = pb.ListClientsReply()
        for record in self._membership.clients():
            seat = self._federation.fleet.seats.get(record.name)
            reply.clients.add(
                name=record.name,
                connected=seat is not None,
                revoked=record.revoked_at is not None,
                enrolled_at_s=record.enrolled_at,
                expires_at_s=record.expires_at,
                software="" if seat is None else seat.hello.software,
                device="" if seat is None else seat.hello.device,
            )
        return reply

    async def Revoke(self, request: pb.RevokeRequest, context: Context) -> pb.RevokeReply:
        await self._membership.revoke(request.client)
        return pb.RevokeReply()

    async def Status(self, request: pb.StatusRequest, context: Context) -> AsyncIterator[pb.StatusReply]:
        job_id = self._federation.job(request.job_id).job_id if request.job_id else ""
        clock = self._federation.services.clock
        while True:
            change = self._federation.next_change()
            tree = status_of(self._federation, self._membership.num_enrolled, job_id)
            yield pb.StatusReply(json=json.dumps(tree).encode())
            if not request.watch:
                return
            await clock.sleep(MIN_STATUS_INTERVAL_S)
            await change.wait()
            check_again()

    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.VersionReply:
        job = self._federation.job(request.job_id)
        version = self._federation.version(job.job_id, None if request.latest else request.version)
        vault, basis = self._federation.services.vault, version.basis_blob
        return pb.VersionReply(
            job_id=job.job_id,
            job=job.spec,
            layout=job.layout or b"",
            version=version.version,
            state_digest=version.state_blob,
            state_bytes=vault.size(version.state_blob),
            basis_digest=basis or "",
            basis_bytes=0 if basis is None else vault.size(basis),
            changes=[pb.VersionChange(digest=each, bytes=vault.size(each)) for each in vault.changes(version)],
            base_digest=job.base_digest or "",
            adapter_digest=job.adapter_blob or "",
        )

    async def ListVersions(self, request: pb.JobRequest, context: Context) -> AsyncIterator[pb.VersionRow]:
        for row in history_of(self._federation, self._federation.job(request.job_id).job_id):
            yield pb.VersionRow(json=json.dumps(row).encode())

    async def ReadVersion(
        self, request: client_pb2.DownloadRequest, context: Context
    ) -> AsyncIterator[client_pb2.Chunk]:
        job = self._federation.job(request.job_id)
        offset = request.offset
        async for data in self._federation.state(job.job_id, request.version, offset):
            check_again()
            yield client_pb2.Chunk(offset=offset, data=data)
            offset += len(data)


def _reply(job: JobRecord) -> pb.JobReply:
    return pb.JobReply(job_id=job.job_id, status=job.status.value)

"""EnrolmentService: decode, call the membership, encode."""

from __future__ import annotations

from fedcore.errors import InvalidInput
from fedproto.v1 import enrolment_pb2 as pb
from fedproto.v1 import enrolment_pb2_grpc as pb_grpc
from fedserver.membership import Membership
from fedserver.rpc.gatekeeper import Context

MAX_FIELD_BYTES = 16 * 1024


class EnrolmentService(pb_grpc.EnrolmentServiceServicer):
    """See proto/fedproto/v1/enrolment.proto."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:
        for field, value in request.ListFields():
            if len(value) > MAX_FIELD_BYTES:
                raise InvalidInput(f"{field.name} has {len(value)} bytes, at most {MAX_FIELD_BYTES}")
        certificate = await self._membership.enrol(
            request.secret, request.certificate_request, request.signing_key, request.signing_key_proof
        )
        return pb.EnrolReply(certificate=certificate)

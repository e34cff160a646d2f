"""The one call of a machine that has no certificate yet."""

from __future__ import annotations

import asyncio
from typing import Final

from fedclient.transport.channel import secure_channel
from fedclient.transport.errors import wire_errors
from fedproto.v1 import enrolment_pb2, enrolment_pb2_grpc

ANSWER_S: Final = 30.0


async def enrol(
    address: str,
    ca_pem: bytes,
    *,
    secret: str,
    certificate_request: bytes,
    signing_key: bytes,
    signing_key_proof: bytes,
) -> bytes:
    """Trade a token's secret and a signing request for a certificate (PEM).

    The server proves itself by `ca_pem` before the secret is sent.

    Raises:
        Unauthenticated: the token is unknown, used or expired.
        Refused: the request is not acceptable.
        Unreachable: nobody answers, or whoever answers is not certified by `ca_pem`.
    """
    channel = secure_channel(address, ca_pem)
    try:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        request = enrolment_pb2.EnrolRequest(
            secret=secret,
            certificate_request=certificate_request,
            signing_key=signing_key,
            signing_key_proof=signing_key_proof,
        )
        with wire_errors(f"an answer from {address}"):
            async with asyncio.timeout(ANSWER_S):
                reply = await stub.Enrol(request)
        return reply.certificate
    finally:
        await channel.close(None)

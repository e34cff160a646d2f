"""The two listening ports: mutual TLS for clients and operators, server TLS for enrolment."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.internal import api_implementation
from grpc import aio

from fedcore.addresses import join_address
from fedcore.errors import AddressInUse, ConfigError
from fedproto.v1 import client_pb2_grpc, enrolment_pb2_grpc, operator_pb2_grpc
from fedserver.federation import Federation
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.rpc.client_service import ClientService
from fedserver.rpc.enrolment_service import EnrolmentService
from fedserver.rpc.gatekeeper import Gatekeeper
from fedserver.rpc.operator_service import OperatorService
from fedserver.security.authority import Authority

OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.max_receive_message_length", 4 << 20),  # chunks are 1 MiB, small updates at most 2 MiB with their header
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.max_concurrent_streams", 100),  # per connection; bounds what a flood of resets can cost
    ("grpc.server_handshake_timeout_ms", 5_000),  # silent peers give their descriptor back
    ("grpc.max_connection_age_ms", 3_600_000),  # a connection outlives its certificate: not by more than this
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.so_reuseport", 0),  # or a second server would share the port instead of failing
]


class RpcServer:
    """Both ports. `start` once, then `stop`; called on the event loop that everything else runs on.

    Attributes:
        port: of the main port, known after `start` (0 asks for any free one).
        enrolment_port: likewise.
    """

    def __init__(self, federation: Federation, membership: Membership, metrics: Metrics, authority: Authority) -> None:
        self.port = self.enrolment_port = 0
        self._authority = authority
        self._main = aio.server(interceptors=[Gatekeeper(membership, metrics)], options=OPTIONS)
        client_pb2_grpc.add_ClientServiceServicer_to_server(ClientService(federation), self._main)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(OperatorService(federation, membership), self._main)
        self._enrolment = aio.server(interceptors=[Gatekeeper(membership, metrics)], options=OPTIONS)
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(EnrolmentService(membership), self._enrolment)

    async def start(self, host: str, port: int, enrolment_port: int) -> None:
        """Listen.

        Raises:
            AddressInUse: a port is taken or the address is not of this machine.
            ConfigError: protobuf runs without its C parser, which bounds recursion and is fast enough.
        """
        if api_implementation.Type() != "upb":
            raise ConfigError(f"protobuf runs on its {api_implementation.Type()!r} backend; upb is needed")
        pair = [(self._authority.server_key_pem, self._authority.server_chain_pem)]
        mutual = grpc.ssl_server_credentials(pair, self._authority.ca_pem, require_client_auth=True)
        self.port = _listen(self._main, host, port, mutual)
        self.enrolment_port = _listen(self._enrolment, host, enrolment_port, grpc.ssl_server_credentials(pair))
        await self._main.start()
        await self._enrolment.start()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and give open ones `grace_s` seconds."""
        await self._main.stop(grace_s)
        await self._enrolment.stop(grace_s)


def _listen(server: aio.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> int:
    address = join_address(host, port)
    try:
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressInUse(f"cannot listen on {address}: it is in use or not an address of this machine") from error

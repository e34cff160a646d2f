"""The two listening ports: mutual TLS for clients and operators, server TLS for enrolment."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Final

import google.protobuf
import grpc
from cryptography.hazmat.backends.openssl import backend as openssl
from google.protobuf.internal import api_implementation
from grpc import aio

from fedcore.addresses import join_address
from fedcore.clock import Clock
from fedcore.errors import AddressInUse, ConfigError, FedError
from fedproto.v1 import client_pb2_grpc, enrolment_pb2_grpc, operator_pb2_grpc
from fedserver.federation import Federation
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.rpc.client_service import ClientService
from fedserver.rpc.enrolment_service import EnrolmentService
from fedserver.rpc.gatekeeper import MAX_MESSAGE_BYTES, Gatekeeper
from fedserver.rpc.guarded_server import guarded_server
from fedserver.rpc.operator_service import OperatorService
from fedserver.security.authority import Authority

log = logging.getLogger(__name__)

MAX_FILES: Final = 65_536
"""How many descriptors the process asks for; a connection takes one."""
OWN_FILES: Final = 256
"""Descriptors that no connection may take: without one to open a file with, the server would have to stop."""
MAX_ENROLMENTS: Final = 32
"""Connections on the enrolment port, which is open to strangers."""

CONNECTIONS: Final = "grpc.max_allowed_incoming_connections"
MAIN_OPTIONS: Final[dict[str, int]] = {
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": 4 << 20,
    "grpc.max_concurrent_streams": 100,  # per connection; bounds what a flood of resets can cost
    "grpc.http2.bdp_probe": 0,  # on a fast line it grows each upload's window to 16 MiB; a chunk is all that is wanted
    "grpc.server_handshake_timeout_ms": 5_000,  # silent peers give their descriptor back
    "grpc.http2.settings_timeout": 5_000,  # until a peer acknowledges limits, gRPC does not hold it to them
    "grpc.max_connection_idle_ms": 300_000,  # likewise peers that call nothing
    "grpc.max_connection_age_ms": 3_600_000,  # a connection outlives its certificate: not by more than this
    "grpc.max_connection_age_grace_ms": 600_000,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.http2.ping_timeout_ms": 20_000,  # the keepalive timeout: the option of that name does nothing in grpcio 1.85
    "grpc.http2.min_ping_interval_without_data_ms": 30_000,
    "grpc.so_reuseport": 0,  # or a second server would share the port instead of failing
}
ENROLMENT_OPTIONS: Final = MAIN_OPTIONS | {  # one short call is all that there is
    "grpc.max_receive_message_length": 128 << 10,  # four fields of 16 KiB
    "grpc.max_concurrent_streams": 4,
    "grpc.max_connection_idle_ms": 10_000,
    "grpc.max_connection_age_ms": 60_000,
    "grpc.max_connection_age_grace_ms": 10_000,
    CONNECTIONS: MAX_ENROLMENTS,
}


class RpcServer:
    """Both ports. `start` once, then `stop`; called on the event loop that everything else runs on.

    Attributes:
        port: of the main port, known after `start` (0 asks for any free one).
        enrolment_port: likewise.
        broken: has an error when a port has closed although nobody called `stop`.

    Raises:
        ConfigError: the operating system grants too few open files.
    """

    def __init__(
        self, federation: Federation, membership: Membership, metrics: Metrics, authority: Authority, clock: Clock
    ) -> None:
        self.port = self.enrolment_port = 0
        self.broken: asyncio.Future[FedError] = asyncio.get_running_loop().create_future()
        self._authority = authority
        self._watching: list[asyncio.Task[None]] = []
        gatekeeper = Gatekeeper(membership, metrics, clock)
        self._main = guarded_server([gatekeeper], MAIN_OPTIONS | {CONNECTIONS: _max_connections()})
        client_pb2_grpc.add_ClientServiceServicer_to_server(ClientService(federation), self._main)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(OperatorService(federation, membership), self._main)
        self._enrolment = guarded_server([gatekeeper], ENROLMENT_OPTIONS)
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(EnrolmentService(membership), self._enrolment)

    async def start(self, host: str, port: int, enrolment_port: int) -> None:
        """Listen.

        Raises:
            AddressInUse: a port is taken or the address is not of this machine.
            ConfigError: protobuf runs without its C parser, which bounds recursion and is fast enough.
        """
        if api_implementation.Type() != "upb":
            raise ConfigError(f"protobuf runs on its {api_implementation.Type()!r} backend; upb is needed")
        log.info(
            "libraries",
            extra={
                "grpc": grpc.__version__,
                "protobuf": f"{google.protobuf.__version__} ({api_implementation.Type()})",
                "openssl": openssl.openssl_version_text(),
            },
        )
        pair = [(self._authority.server_key_pem, self._authority.server_chain_pem)]
        mutual = grpc.ssl_server_credentials(pair, self._authority.ca_pem, require_client_auth=True)
        self.port = _listen(self._main, host, port, mutual)
        self.enrolment_port = _listen(self._enrolment, host, enrolment_port, grpc.ssl_server_credentials(pair))
        for server in (self._main, self._enrolment):
            await server.start()
            self._watching.append(asyncio.create_task(self._watch(server)))

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and give open ones `grace_s` seconds."""
        await self._main.stop(grace_s)
        await self._enrolment.stop(grace_s)
        await asyncio.gather(*self._watching)

    async def _watch(self, server: aio.Server) -> None:
        """Tell when a server ends by itself: gRPC logs that and closes its port, and nobody would answer any more."""
        try:
            await server.wait_for_termination()
        except Exception as error:
            log.exception("a port has closed")
            if not self.broken.done():
                self.broken.set_result(FedError(f"a port has closed: {type(error).__name__}: {error}"))


def _max_connections() -> int:
    """Ask the system for open files, and return how many of them the connections of the main port may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    granted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY:
        granted = max(soft, granted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    if (left := granted - OWN_FILES - MAX_ENROLMENTS) < 1:
        raise ConfigError(f"at most {granted} open files are allowed (ulimit -n), {granted - left + 1} are needed")
    return left


def _listen(server: aio.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> int:
    address = join_address(host, port)
    try:
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressInUse(f"cannot listen on {address}: it is in use or not an address of this machine") from error

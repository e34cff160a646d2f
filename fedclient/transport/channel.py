"""Channels to a server, with the settings that were measured."""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio

from fedcore.messages import CHUNK_BYTES

MAX_MESSAGE_BYTES: Final = 4 * CHUNK_BYTES

OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    # Retries are the runner's: it knows deadlines, offsets and when to stop.
    ("grpc.enable_retries", 0),
    # gRPC waits up to two minutes before it dials again, and fails every call meanwhile; the back-off is ours.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # despite its name: how long one attempt to connect may take
    # Two clients in one process, with two certificates, must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
)


def secure_channel(
    address: str, ca_pem: bytes, certificate_pem: bytes | None = None, key_pem: bytes | None = None
) -> grpc.aio.Channel:
    """Return a channel that trusts only `ca_pem`; with a certificate and its key, mutual TLS. Dials on the first call.

    Call it on the event loop that will use it.
    """
    credentials = grpc.ssl_channel_credentials(
        root_certificates=ca_pem, private_key=key_pem, certificate_chain=certificate_pem
    )
    return grpc.aio.secure_channel(address, credentials, options=OPTIONS, compression=grpc.Compression.NoCompression)

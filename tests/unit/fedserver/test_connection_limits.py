"""What ends a connection: each time limit does what it is for, and is the one that the documents promise."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fedclient.transport.channel import OPTIONS as CLIENT_OPTIONS
from fedserver.rpc import server as rpc_server
from fedserver.rpc.server import ENROLMENT_OPTIONS, MAIN_OPTIONS
from tests.support import http2
from tests.support.http2 import Connection, Tls, call_headers
from tests.support.server import running_server

LIMITS = Path(__file__).resolve().parents[3] / "proto" / "README.md"
SHORT_MS = 300


def call_without_message(tls: Tls) -> bytes:
    """Return the beginning of a call that the server waits 30 s for."""
    path = b"/fedproto.v1.EnrolmentService/Enrol" if tls.stranger else b"/fedproto.v1.ClientService/Upload"
    return http2.frame(http2.HEADERS, http2.END_HEADERS, 1, call_headers(path))


async def last_words_of_a_server_with(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    peer: Callable[[int, Tls], list[bytes]],
    *short: str,
) -> list[list[bytes]]:
    """Return what `peer` hears on each port of a server of which these limits, if it has them at all, are short."""
    for table in ("MAIN_OPTIONS", "ENROLMENT_OPTIONS"):
        options = {name: SHORT_MS if name in short else value for name, value in getattr(rpc_server, table).items()}
        monkeypatch.setattr(rpc_server, table, options)
    async with running_server(folder) as server:
        await server.enrol("mallory")
        ports = {server.rpc.port: False, server.rpc.enrolment_port: True}
        return [
            await asyncio.to_thread(peer, port, Tls(folder / "mallory", stranger=stranger))
            for port, stranger in ports.items()
        ]


def last_words(connection: Connection) -> list[bytes]:
    """Return the reasons that the server gives until it hangs up. One that does not is a `TimeoutError`."""
    return [found.payload[8:] for found in connection.frames() if found.kind == http2.GOAWAY]


def silent(port: int, tls: Tls) -> list[bytes]:
    with Connection(port, tls) as connection:
        return last_words(connection)


def silent_in_a_call(port: int, tls: Tls, *, obliging: bool = True) -> list[bytes]:
    with Connection(port, tls, obliging=obliging) as connection:
        connection.send(call_without_message(tls))
        return last_words(connection)


async def test_a_peer_that_never_acknowledges_the_settings_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = partial(silent_in_a_call, obliging=False)
    heard = await last_words_of_a_server_with(tmp_path, monkeypatch, peer, "grpc.http2.settings_timeout")
    assert heard == 2 * [[b"settings_timeout"]]


async def test_a_peer_with_an_open_call_that_answers_no_ping_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms")
    heard = await last_words_of_a_server_with(tmp_path, monkeypatch, silent_in_a_call, *short)
    assert heard == 2 * [[b"ping_timeout"]]


async def test_a_connection_without_a_call_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = await last_words_of_a_server_with(tmp_path, monkeypatch, silent, "grpc.max_connection_idle_ms")
    assert heard == 2 * [[b"connection idle"]]


async def test_an_old_connection_is_asked_to_go_and_cut_when_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms")
    heard = await last_words_of_a_server_with(tmp_path, monkeypatch, silent_in_a_call, *short)
    assert heard == 2 * [[b"max_age", b"max connection age"]]


# -- what is promised ------------------------------------------------------------------------------------------------

UNITS_MS = {"": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
Tables = tuple[dict[str, int], ...]
MAIN, ENROLMENT, BOTH = (MAIN_OPTIONS,), (ENROLMENT_OPTIONS,), (MAIN_OPTIONS, ENROLMENT_OPTIONS)
# The rows of the table, and of which options on which ports their figures are.
PROMISED: dict[str, list[tuple[Tables, *tuple[str, ...]]]] = {
    "TLS handshake; acknowledging the HTTP/2 settings": [
        (BOTH, "grpc.server_handshake_timeout_ms", "grpc.http2.settings_timeout")
    ],
    "concurrent streams of a connection": [
        (MAIN, "grpc.max_concurrent_streams"),
        (ENROLMENT, "grpc.max_concurrent_streams"),
    ],
    "HTTP/2 pings without data": [(BOTH, "grpc.http2.min_ping_interval_without_data_ms")],
    "silence of a peer with an open call": [(BOTH, "grpc.keepalive_time_ms"), (BOTH, "grpc.http2.ping_timeout_ms")],
    "a connection without a call": [
        (MAIN, "grpc.max_connection_idle_ms"),
        (ENROLMENT, "grpc.max_connection_idle_ms"),
    ],
    "age of a connection": [
        (MAIN, "grpc.max_connection_age_ms"),
        (MAIN, "grpc.max_connection_age_grace_ms"),
        (ENROLMENT, "grpc.max_connection_age_ms"),
        (ENROLMENT, "grpc.max_connection_age_grace_ms"),
    ],
}


@pytest.mark.parametrize("row", PROMISED)
def test_the_limits_are_those_of_the_documents(row: str) -> None:
    (text,) = re.findall(rf"^\| {re.escape(row)} \| (.*?) \|", LIMITS.read_text(encoding="utf-8"), re.MULTILINE)
    figures = [int(number) * UNITS_MS[unit] for number, unit in re.findall(r"(\d+)(?: (s|min|h)\b)?", text)]
    assert len(figures) == len(PROMISED[row]), text
    for figure, (tables, *names) in zip(figures, PROMISED[row], strict=True):
        assert {name: [table.get(name) for table in tables] for name in names} == dict.fromkeys(
            names, [figure] * len(tables)
        )


def test_a_client_of_ours_does_not_ping_more_often_than_it_may() -> None:
    assert (
        dict(CLIENT_OPTIONS)["grpc.keepalive_time_ms"] >= MAIN_OPTIONS["grpc.http2.min_ping_interval_without_data_ms"]
    )

"""The operator's client: every failure is one of our errors, short outages are sat out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

import fedcore.errors
from fedcore.errors import (
    FedError,
    InvalidInput,
    JobFileError,
    NotFound,
    StateUnusable,
    Unauthenticated,
    Unreachable,
    UpdateRejected,
)
from fedserver.rpc import operator_client
from fedserver.rpc.operator_client import OperatorClient, VersionState
from fedserver.rpc.operator_errors import CODES, STATUSES
from fedserver.state.records import JobRecord, JobStatus, VersionRecord
from tests.support.server import TestServer, running_server, small_job

T = TypeVar("T")


def client_of(server: TestServer) -> OperatorClient:
    authority = server.authority
    return OperatorClient(
        server.address,
        ca_pem=authority.ca_pem,
        certificate_pem=authority.operator_chain_pem,
        key_pem=authority.operator_key_pem,
    )


async def ask(server: TestServer, question: Callable[[OperatorClient], T]) -> T:
    """Ask on a thread, so that the server's loop stays free."""

    def asked() -> T:
        with client_of(server) as client:
            return question(client)

    return await asyncio.to_thread(asked)


def all_errors(root: type[FedError] = FedError) -> list[type[FedError]]:
    return [root, *(found for child in root.__subclasses__() for found in all_errors(child))]


def test_every_error_code_of_the_server_is_known_and_keeps_its_exit_code() -> None:
    ours = [kind for kind in all_errors() if kind.__module__ == fedcore.errors.__name__]
    assert {kind.code for kind in ours} == set(CODES)
    assert all(CODES[kind.code].exit_code == kind.exit_code for kind in ours)
    assert all(issubclass(kind, CODES[kind.code]) for kind in (JobFileError, UpdateRejected))


def test_a_status_that_says_nothing_of_the_peer_means_unreachable() -> None:
    unreachable = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
    assert not unreachable & set(STATUSES)


async def test_the_servers_errors_come_with_their_class_and_text(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        with pytest.raises(NotFound, match="no job 'x'; known: none"):
            await ask(server, lambda client: client.stop("x"))
        with pytest.raises(NotFound, match="no job 'x'; known: none"):
            await ask(server, lambda client: client.status("x"))
        with pytest.raises(NotFound, match="no job 'x'; known: none"):
            await ask(server, lambda client: next(client.watch("x")))
        with pytest.raises(InvalidInput, match=r"schedule: is required"):
            await ask(server, lambda client: client.submit(b"{}"))


async def test_a_clients_certificate_is_no_operators(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        ann = await server.enrol("ann")

        def asked() -> None:
            with OperatorClient(
                server.address, ca_pem=ann.ca_pem, certificate_pem=ann.certificate_pem, key_pem=ann.key_pem
            ) as client:
                client.clients()

        with pytest.raises(Unauthenticated, match="is for the role operator"):
            await asyncio.to_thread(asked)


async def test_nobody_there_is_unreachable_with_the_address(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        gone = client_of(server)
    with gone, pytest.raises(Unreachable, match=rf"no answer from localhost:{server.rpc.port}: connection refused"):
        await asyncio.to_thread(gone.status)


async def test_a_server_of_another_federation_is_not_believed(tmp_path: Path) -> None:
    async with running_server(tmp_path / "a") as server, running_server(tmp_path / "b") as other:
        confused = replace(other, authority=server.authority)
        with pytest.raises(Unreachable, match=r"the TLS handshake failed|its certificate is not of this"):
            await ask(confused, lambda client: client.clients())


async def test_watching_goes_on_over_the_end_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_client, "STREAM_S", 0.3)
    outages: list[str] = []

    def watch(client: OperatorClient) -> list[int]:
        states = client.watch(on_outage=outages.append)
        return [len(next(states)["jobs"]) for _ in range(3)]

    async with running_server(tmp_path) as server:
        assert await ask(server, watch) == [0, 0, 0]
    assert outages == []


async def test_watching_sits_out_an_outage_and_gives_up_on_a_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_client, "OUTAGE_S", 0.3)
    monkeypatch.setattr(operator_client, "RETRY_S", 0.01)
    outages: list[str] = []
    async with running_server(tmp_path) as server:
        client = client_of(server)
        states = client.watch(on_outage=outages.append)
        assert (await asyncio.to_thread(next, states))["jobs"] == []
    with client, pytest.raises(Unreachable):
        await asyncio.to_thread(next, states)
    assert len(outages) == 1
    assert server.address in outages[0]


async def stored_version(server: TestServer, state: bytes) -> VersionState:
    services = server.federation.services
    job = JobRecord("0" * 32, "small", small_job().to_json(), JobStatus.FINISHED, 1.0, 2.0, layout=b"[]")
    digest = services.blobs.put(state)
    await services.journal.write(job, VersionRecord("0" * 32, 1, digest, digest, b"", digest, None, 1, 1, 1, 1, 2.0))
    return await ask(server, lambda client: client.version("small"))


async def test_a_version_of_many_chunks_is_read_whole(tmp_path: Path) -> None:
    state = bytes(range(256)) * 10_000  # three chunks
    seen: list[int] = []
    async with running_server(tmp_path) as server:
        version = await stored_version(server, state)
        assert (version.version, version.num_bytes) == (1, len(state))
        assert version.sha256 == hashlib.sha256(state).hexdigest()
        assert version.history[0]["sha256"] == version.sha256
        assert await ask(server, lambda client: client.read_version(version, seen.append)) == state
    assert seen[-1] == len(state)


async def test_bytes_that_are_not_those_announced_are_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        version = await stored_version(server, b"1234")
        with pytest.raises(StateUnusable, match="SHA-256"):
            await ask(server, lambda client: client.read_version(replace(version, sha256="0" * 64)))
        with pytest.raises(StateUnusable, match="4 bytes at 0, expected at most 3 at 0"):
            await ask(server, lambda client: client.read_version(replace(version, num_bytes=3)))
        with pytest.raises(Unreachable, match="sent 4 of 5 bytes"):
            await ask(server, lambda client: client.read_version(replace(version, num_bytes=5)))

"""The ports: what they need to start, and what happens when one of them ends by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from fedcore.errors import FedError
from fedserver.rpc import server as rpc_server
from tests.support import http2
from tests.support.processes import Deployment, command, run
from tests.support.server import running_server


def unguarded(interceptors: Sequence[Any], options: Mapping[str, int]) -> grpc.aio.Server:
    return grpc.aio.server(interceptors=list(interceptors), options=list(options.items()))


async def test_a_port_that_ends_by_itself_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_server, "guarded_server", unguarded)
    async with running_server(tmp_path) as server:
        await server.enrol("alice")
        tls = http2.Tls(tmp_path / "alice", stranger=True)

        def call() -> None:
            with http2.Connection(server.rpc.enrolment_port, tls) as connection:
                connection.send(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.call_headers(b"/\xff")))
                connection.wait_for(http2.GOAWAY)

        await asyncio.to_thread(call)
        error = await asyncio.wait_for(server.rpc.broken, 20)
    assert type(error) is FedError
    assert "UnicodeDecodeError" in str(error)


async def test_a_server_that_is_stopped_is_not_broken(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        pass
    assert not server.rpc.broken.done()


def test_the_server_does_not_start_without_the_parser_that_bounds_recursion(tmp_path: Path) -> None:
    with Deployment(tmp_path) as deployment:
        environment = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python"
        ended = run("env", environment, command("fedserver"), "run", "--folder", deployment.state)
        assert ended.wait() == 3, ended.story()
        assert "'python' backend; upb is needed" in ended.err[-1]

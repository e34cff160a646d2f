"""Played clients at the server of a `Deployment`: what they send depends on their names and the version alone.

So the same job gives the same bytes however often a server dies under it, and a test decides when each message goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedclient.enroll import enroll
from fedclient.identity import ClientIdentity
from fedclient.transport.base import Transport
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.adapters import gradient_layout
from fedcore.clock import SystemClock
from fedcore.errors import UpdateResult
from fedcore.identity import EnrolmentToken, sign
from fedcore.layout import Layout, Vector
from fedcore.messages import SIGNATURE_CONTEXT, Assignment, Hello, UpdateHeader, UploadState, WorkKind
from fedcore.rng import stream
from tests.support.player import HELLO, LAYOUT, RAW, Player, playing
from tests.support.processes import Deployment

PATIENCE_S = 30.0
NO_DRAWS = np.random.default_rng(0)  # the codec raw draws nothing


@dataclass
class Member:
    """One client of a crew, connected. With a basis in its layout it plays a client of Fed-SB."""

    name: str
    identity: ClientIdentity
    transport: Transport
    player: Player
    layout: Layout

    async def next_work(self) -> Assignment:
        async with asyncio.timeout(PATIENCE_S):
            return await self.player.next_work()

    def frame(self, work: Assignment) -> bytes:
        """Return the frame that this client sends for this work. Whoever makes version 0 makes the same."""
        if work.kind is WorkKind.EVALUATE:
            return b""
        maker = "anybody" if work.kind is WorkKind.INITIALISE else self.name
        rng = stream(5, work.kind.value, maker, work.version)
        layout = gradient_layout(self.layout) if work.kind is WorkKind.GRADIENT else self.layout.moving
        values_D: Vector = rng.standard_normal(layout.num_values).astype(np.float32)
        return RAW.encode(values_D, NO_DRAWS)

    def header(self, work: Assignment, **changes: Any) -> UpdateHeader:
        values: dict[str, Any] = {"layout_digest": self.layout.digest, "basis_digest": work.basis_digest or None}
        if work.kind in (WorkKind.GRADIENT, WorkKind.TRAIN):
            values["num_examples"] = 10 + len(self.name)
        if work.kind is WorkKind.INITIALISE:
            values["layout"] = [[t.group, t.name, list(t.shape), t.dtype] for t in self.layout.tensors]
        return self.player.header(work, self.frame(work), **{**values, **changes})

    def signed(self, header: UpdateHeader) -> tuple[bytes, bytes]:
        data = header.to_bytes()
        return data, self.sign(data)

    def sign(self, data: bytes) -> bytes:
        return sign(self.identity.signing_key, SIGNATURE_CONTEXT, data)

    async def answer(self, work: Assignment, **changes: Any) -> UploadState:
        """Send the update that the work asks for, its header changed."""
        return await self.transport.send_update(*self.signed(self.header(work, **changes)), self.frame(work))

    async def work_until(self, kind: WorkKind, version: int) -> Assignment:
        """Do what is asked until this is, and return it undone."""
        while True:
            work = await self.next_work()
            if (work.kind, work.version) == (kind, version):
                return work
            assert (await self.answer(work)).result is UpdateResult.ACCEPTED

    async def finish(self, work: Assignment | None = None) -> None:
        """Do `work` and then what is asked, to the job's last evaluation."""
        while True:
            work = work or await self.next_work()
            assert (await self.answer(work)).result is UpdateResult.ACCEPTED
            if work.kind is WorkKind.EVALUATE:
                return
            work = None


async def enrol(deployment: Deployment, name: str) -> ClientIdentity:
    """Return a client's identity, enrolling it if it is not yet; without the cost of a process."""
    if deployment.home(name).exists():
        return ClientIdentity.load(deployment.home(name))

    def token() -> str:
        with deployment.operator() as server:
            return server.issue_token(name, 600)

    return await enroll(EnrolmentToken.decode(await asyncio.to_thread(token)), deployment.home(name), SystemClock())


@asynccontextmanager
async def crew(
    deployment: Deployment, *names: str, hello: Hello = HELLO, layout: Layout = LAYOUT
) -> AsyncIterator[Sequence[Member]]:
    """Connect clients; that their server dies within the block is no error of theirs."""
    async with AsyncExitStack() as stack:
        members = []
        for name in names:
            identity = await enrol(deployment, name)
            transport = GrpcTransport(identity, SystemClock())
            stack.push_async_callback(transport.close)
            player = await stack.enter_async_context(playing(transport, identity.signing_key, hello))
            members.append(Member(name, identity, transport, player, layout))
        yield members

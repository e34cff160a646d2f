"""Load: clients that send updates as fast as the server takes them, each over a connection of its own.

`python -m benchmarks.load_client FOLDER...`: one process for all folders. They speak the protocol and
leave out what costs a client time and the server nothing: a runner, the decoding of versions, the making of a frame.
The update must be small enough to travel within the session, as the version does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.echo_client import ABOUT, constant_of
from fedclient.identity import ClientIdentity
from fedclient.transport.base import Session
from fedclient.transport.grpc_transport import GrpcTransport
from fedcodec import build_pipeline
from fedcore.clock import SystemClock
from fedcore.identity import sign
from fedcore.layout import Layout
from fedcore.messages import SIGNATURE_CONTEXT, Assignment, Heartbeat, UpdateHeader, WorkKind

CONNECTING_AT_ONCE = 16
RAW = build_pipeline([{"codec": "raw"}])


class LoadClient:
    """One client; `run` goes on until it is cancelled or the server ends the session."""

    def __init__(self, identity: ClientIdentity) -> None:
        self._transport = GrpcTransport(identity, SystemClock())
        self._key = identity.signing_key
        self._digest = ""
        self._frame = b""
        self._frame_digest = ""

    async def run(self, connecting: asyncio.Semaphore) -> None:
        """Connect, then answer every assignment."""
        await connecting.acquire()
        async with self._transport.connect(ABOUT) as session:
            connecting.release()
            beating = asyncio.create_task(beat(session))
            try:
                async for order in session.orders():
                    if isinstance(order, Assignment):
                        await self._answer(order)
            finally:
                beating.cancel()

    async def _answer(self, work: Assignment) -> None:
        frame = self._frame_of(work)
        training = work.kind is WorkKind.TRAIN
        header = UpdateHeader(
            federation=self._transport.federation,
            update_id=work.assignment_id,
            assignment_id=work.assignment_id,
            job_id=work.job_id,
            version=work.version,
            kind=work.kind,
            layout_digest=self._digest,
            frame_bytes=len(frame),
            frame_digest=self._frame_digest if frame else hashlib.sha256().hexdigest(),
            num_examples=1 if training else 0,
            metrics={},
            evaluated_examples=0,
            evaluation={},
            layout=json.loads(_layout(work).to_json()) if work.kind is WorkKind.INITIALISE else None,
        ).to_bytes()
        await self._transport.send_update(header, sign(self._key, SIGNATURE_CONTEXT, header), frame)

    def _frame_of(self, work: Assignment) -> bytes:
        """Return the frame that this client sends each time, one constant of its own, made on first use."""
        if not self._frame:
            layout = _layout(work)
            self._digest = layout.digest
            values_D = np.full(layout.num_values, constant_of(self._transport.client), dtype=np.float32)
            self._frame = bytes(RAW.encode(values_D, np.random.default_rng(0)))
            self._frame_digest = hashlib.sha256(self._frame).hexdigest()
        return b"" if work.kind is WorkKind.EVALUATE else self._frame


def _layout(work: Assignment) -> Layout:
    return Layout.of([("model", "values", (json.loads(work.job)["task"]["num_values"],), "float32")])


async def beat(session: Session) -> None:
    """Say now and then that the client is there."""
    while True:
        await asyncio.sleep(session.heartbeat_interval_s)
        await session.send(Heartbeat())


async def main(folders: list[Path]) -> None:
    """Run the clients until the process is stopped."""
    connecting = asyncio.Semaphore(CONNECTING_AT_ONCE)
    clients = [LoadClient(ClientIdentity.load(folder)) for folder in folders]
    await asyncio.gather(*(client.run(connecting) for client in clients))


if __name__ == "__main__":
    asyncio.run(main([Path(folder) for folder in sys.argv[1:]]))

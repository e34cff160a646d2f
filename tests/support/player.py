"""A client played by a test, message by message: what a well-behaved client does, and the means to do otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.transport.base import Session, Transport
from fedcodec import build_pipeline
from fedcore.identity import sign
from fedcore.layout import Layout, Vector
from fedcore.messages import SIGNATURE_CONTEXT, Assignment, Cancel, Hello, UpdateHeader, UploadState, WorkKind

LAYOUT = Layout.of([("adapter", "w", (3, 4), "float32"), ("adapter", "b", (5,), "float32")])
HELLO = Hello("test", "test", ("played",), ("full",), ("raw", "bf16"))
RAW = build_pipeline([{"codec": "raw"}])


@dataclass
class Player:
    transport: Transport
    key: Ed25519PrivateKey
    session: Session
    orders: AsyncIterator[Assignment | Cancel]

    async def next_order(self) -> Assignment | Cancel:
        return await anext(self.orders)

    async def next_work(self) -> Assignment:
        while not isinstance(order := await anext(self.orders), Assignment):
            pass
        return order

    async def download(self, work: Assignment) -> Vector:
        frame = b"".join([chunk async for chunk in self.transport.download(work.job_id, work.version, 0)])
        assert hashlib.sha256(frame).hexdigest() == work.frame_digest
        assert len(frame) == work.frame_bytes
        return RAW.decode(frame, LAYOUT.num_values)

    def header(self, work: Assignment, frame: bytes, **changes: Any) -> UpdateHeader:
        training = work.kind is WorkKind.TRAIN
        values: dict[str, Any] = {
            "federation": self.transport.federation,
            "update_id": work.assignment_id,
            "assignment_id": work.assignment_id,
            "job_id": work.job_id,
            "version": work.version,
            "kind": work.kind,
            "layout_digest": LAYOUT.digest,
            "frame_bytes": len(frame),
            "frame_digest": hashlib.sha256(frame).hexdigest(),
            "num_examples": 10 if training else 0,
            "metrics": {"train_loss": 0.5} if training else {},
            "evaluated_examples": 0 if work.kind is WorkKind.INITIALISE else 4,
            "evaluation": {} if work.kind is WorkKind.INITIALISE else {"accuracy": 0.5},
        }
        if work.kind is WorkKind.INITIALISE:
            values["layout"] = [[t.group, t.name, list(t.shape), t.dtype] for t in LAYOUT.tensors]
        return UpdateHeader(**{**values, **changes})

    async def answer(self, work: Assignment, values_D: Vector | None = None, **changes: Any) -> UploadState:
        """Send the update that the work asks for: `values_D`, zeros by default."""
        frame = b""
        if work.kind is not WorkKind.EVALUATE:
            vector = np.zeros(LAYOUT.num_values, np.float32) if values_D is None else values_D
            frame = RAW.encode(vector, np.random.default_rng(0))
        return await self.send(self.header(work, frame, **changes), frame)

    async def send(self, header: UpdateHeader, frame: bytes) -> UploadState:
        data = header.to_bytes()
        return await self.transport.send_update(data, sign(self.key, SIGNATURE_CONTEXT, data), frame)


@asynccontextmanager
async def playing(transport: Transport, key: Ed25519PrivateKey, hello: Hello = HELLO) -> AsyncIterator[Player]:
    async with transport.connect(hello) as session:
        yield Player(transport, key, session, session.orders())

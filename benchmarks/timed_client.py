"""An echo client with a clock: `python -m benchmarks.timed_client FOLDER`.

Appends to `SENT` in its identity folder, for each update that has values, the seconds from its first byte to the
server's durable answer; a number a line.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.echo_client import main
from fedclient.identity import ClientIdentity
from fedclient.pieces import Pieces
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.allocator import keep_memory
from fedcore.clock import Clock
from fedcore.messages import UploadState

SENT: Final = "sent.jsonl"


class TimedTransport(GrpcTransport):
    """The client's transport, with a clock around what sends updates."""

    def __init__(self, identity: ClientIdentity, clock: Clock, file: Path) -> None:
        super().__init__(identity, clock)
        self._file = file

    async def upload(self, header: bytes, signature: bytes, frame: bytes | Pieces, offset: int) -> UploadState:
        """Send a large one."""
        began_s = time.perf_counter()
        state = await super().upload(header, signature, frame, offset)
        self._note(time.perf_counter() - began_s)
        return state

    async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
        """Send a small one."""
        began_s = time.perf_counter()
        state = await super().send_update(header, signature, frame)
        if frame:
            self._note(time.perf_counter() - began_s)
        return state

    def _note(self, seconds: float) -> None:
        with self._file.open("a", encoding="ascii") as file:
            file.write(f"{seconds}\n")


if __name__ == "__main__":
    keep_memory()
    home = Path(sys.argv[1])
    asyncio.run(main([home], lambda identity, clock: TimedTransport(identity, clock, home / SENT)))

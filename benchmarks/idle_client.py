"""Idle clients: `python -m benchmarks.idle_client ADDRESS FOLDER...`, each with a connection of its own.

They open their sessions, print the seconds until all of them had, and then only say that they are there.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.echo_client import ABOUT
from benchmarks.load_client import CONNECTING_AT_ONCE, beat
from fedclient.identity import ClientIdentity
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock


async def main(address: str, folders: list[Path]) -> None:
    """Run the clients until the process is stopped."""
    identities = [replace(ClientIdentity.load(folder), server=address) for folder in folders]
    connecting, clock = asyncio.Semaphore(CONNECTING_AT_ONCE), SystemClock()
    missing = len(identities)
    began_s = time.monotonic()

    async def idle(identity: ClientIdentity) -> None:
        nonlocal missing
        await connecting.acquire()
        async with GrpcTransport(identity, clock).connect(ABOUT) as session:
            connecting.release()
            missing -= 1
            if missing == 0:
                sys.stdout.write(f"{time.monotonic() - began_s:.2f}\n")
                sys.stdout.flush()
            await beat(session)

    await asyncio.gather(*map(idle, identities))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]]))

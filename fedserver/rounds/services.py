"""What the rooms of the server share, handed in by the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from fedcore.clock import Clock
from fedserver.metrics import Metrics
from fedserver.rounds.fleet import Fleet
from fedserver.state.base import Blobs, Store
from fedserver.state.journal import Journal
from fedserver.state.vault import Vault

T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    """Storage, clock, metrics and threads of one server, and the clients that are connected to it.

    Attributes:
        workers: threads for what takes long, so that the event loop never does.
    """

    store: Store
    journal: Journal
    blobs: Blobs
    fleet: Fleet
    clock: Clock
    metrics: Metrics
    workers: Executor

    async def in_worker(self, work: Callable[[], T]) -> T:
        """Do what takes long in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)

    @cached_property
    def vault(self) -> Vault:
        """Bytes of any size, over `store` and `blobs`."""
        return Vault(self.store, self.blobs)

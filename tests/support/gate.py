"""Holds clients with the task of `gated_task.py` in the middle of their training."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TASK_FILE = Path(__file__).with_name("gated_task.py")
DEADLINE_S = 60.0


class Held:
    """A client that has begun to train and waits."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def release(self) -> None:
        """Let it train."""
        self._connection.sendall(b"!")

    def wait_until_trained(self) -> None:
        """Return when its training is over, for whatever reason."""
        assert self._connection.recv(1) == b""

    def close(self) -> None:
        """Hang up, which lets it train too."""
        self._connection.close()


class Gate:
    """Where clients come to; `port` is what their `--data gate=` names."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._held: list[Held] = []
        self.port: int = listener.getsockname()[1]

    def wait_for_client(self) -> Held:
        """Return the next client that has begun to train."""
        connection, _ = self._listener.accept()
        connection.settimeout(DEADLINE_S)
        held = Held(connection)
        self._held.append(held)
        return held

    def close(self) -> None:
        """Let everybody go."""
        for held in self._held:
            held.close()


@contextmanager
def open_gate() -> Iterator[Gate]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        gate = Gate(listener)
        try:
            yield gate
        finally:
            gate.close()

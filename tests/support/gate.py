"""Holds clients with the task of `gated_task.py` in the middle of their training."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TASK_FILE = Path(__file__).with_name("gated_task.py")
DEADLINE_S = 60.0


class Held:
    """A client that has begun to train and waits."""

    def __init__(self, connection: socket.socket, address: tuple[str, int]) -> None:
        self._connection = connection
        self.address = address

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
        connection, address = self._listener.accept()
        connection.settimeout(DEADLINE_S)
        held = Held(connection, address)
        self._held.append(held)
        return held

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let everybody through who comes within the block."""
        with socket.socket() as last:
            last.bind(("127.0.0.1", 0))
            thread = threading.Thread(target=self._let_through, args=(last.getsockname(),))
            thread.start()
            try:
                yield
            finally:
                last.connect(("127.0.0.1", self.port))
                thread.join()

    def _let_through(self, last: tuple[str, int]) -> None:
        while (held := self.wait_for_client()).address != last:
            held.release()

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

"""The HTTP endpoint that Prometheus scrapes."""

from __future__ import annotations

import errno
import threading
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from fedcore.errors import AddressInUse, ConfigError
from fedserver.metrics import Metrics

DEFAULT_PORT = 9464


class MetricsEndpoint:
    """A running endpoint; `serve` makes one. A context manager that closes itself."""

    def __init__(self, server: WSGIServer, thread: threading.Thread, host: str) -> None:
        self._server = server
        self._thread = thread
        self._host = host

    @property
    def port(self) -> int:
        """The port that is listened on: the one the system chose when 0 was asked for."""
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        """Where to scrape. `/` and every other path answer the same."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop answering and free the port. Returns when the thread has ended; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(metrics: Metrics, host: str, port: int) -> MetricsEndpoint:
    """Answer scrapes of `metrics` on a daemon thread until the endpoint is closed.

    The endpoint has neither TLS nor authentication: listen on loopback, or where only Prometheus can reach.

    Args:
        metrics: what to show.
        host: name or address to listen on.
        port: 0 lets the system choose.

    Raises:
        AddressInUse: another process listens there.
        ConfigError: nobody can listen there: not an address of this machine, a port out of 0 to 65535, a port
            that needs privileges.
    """
    where = f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise ConfigError(f"metrics address {where}: the port is not in 0 to 65535")
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"metrics address {where} is in use by another process") from error
        raise ConfigError(f"metrics address {where}: {error.strerror or error}") from error
    return MetricsEndpoint(server, thread, host)

"""HTTP/2 by hand over TLS: frames that no well-behaved library would send, and what a server says to them.

Header blocks are HPACK literals without indexing, so no state is shared between frames and any frame can be sent
again as it is.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0, 2, 7, 8, 11
DEADLINE_S: Final = 20.0


class Frame(NamedTuple):
    """A frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame as bytes."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def reset(stream: int, code: int = CANCEL) -> bytes:
    """Return a frame that ends a stream at once."""
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def literals(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a header block."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in pairs)


def call_headers(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """Return the header block that begins a gRPC call, with further headers."""
    return literals(
        [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *more,
        ]
    )


def headers(stream: int, block: bytes) -> bytes:
    """Return a header block in as many frames as it takes."""
    parts = [block[start : start + 16_384] for start in range(0, len(block), 16_384)]
    frames = [
        frame(CONTINUATION if number else HEADERS, END_HEADERS if part is parts[-1] else 0, stream, part)
        for number, part in enumerate(parts)
    ]
    return b"".join(frames)


def message(data: bytes, *, declared: int | None = None, compressed: bool = False) -> bytes:
    """Return a gRPC message, with a length of its own choice if `declared`."""
    return struct.pack(">BI", compressed, len(data) if declared is None else declared) + data


def _text(data: bytes) -> bytes:
    """Return a string of HPACK: not Huffman coded, behind its length as an integer with a prefix of 7 bits."""
    if len(data) < 127:
        return bytes([len(data)]) + data
    length, rest = bytearray([127]), len(data) - 127
    while rest >= 128:
        length.append(rest % 128 | 128)
        rest //= 128
    return bytes(length) + bytes([rest]) + data


@dataclass(frozen=True)
class Tls:
    """Whom a peer trusts and what it shows.

    Attributes:
        home: a folder with `ca.pem` and, unless a stranger, `certificate.pem` and `key.pem`.
        stranger: shows no certificate.
    """

    home: Path
    stranger: bool = False

    def context(self) -> ssl.SSLContext:
        """Return the settings of a TLS client that speaks HTTP/2."""
        context = ssl.create_default_context(cafile=str(self.home / "ca.pem"))
        context.set_alpn_protocols(["h2"])
        if not self.stranger:
            context.load_cert_chain(self.home / "certificate.pem", self.home / "key.pem")
        return context


class Connection:
    """A connection whose every byte the test decides. Use it as a context manager.

    Args:
        port: on this machine.
        tls: whom it trusts and what it shows.
        window: how many bytes it lets the server send in each stream, before it says more.
        obliging: accepts the server's settings. Until it does, gRPC does not hold it to them.
    """

    def __init__(self, port: int, tls: Tls, *, window: int = 65_535, obliging: bool = True) -> None:
        plain = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self._socket = tls.context().wrap_socket(plain, server_hostname="localhost")
        self.is_cut = False
        self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window)))
        if obliging and self.wait_for(SETTINGS) is not None:
            self.send(frame(SETTINGS, ACK, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes; if the server has hung up, note that in `is_cut`."""
        try:
            self._socket.sendall(data)
        except OSError:
            self.is_cut = True

    def frames(self) -> Iterator[Frame]:
        """Yield what the server says, until it hangs up."""
        while (head := self._read(9)) is not None:
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            payload = self._read(int.from_bytes(head[:3]))
            if payload is None:
                return
            yield Frame(kind, flags, stream, payload)

    def wait_for(self, kind: int, stream: int = 0, flags: int = 0) -> Frame | None:
        """Return the first such frame; None if the server hangs up instead."""
        for found in self.frames():
            if found.kind == kind and found.stream == stream and found.flags & flags == flags:
                return found
        return None

    def ping(self) -> Frame | None:
        """Wait until the server has dealt with all that was sent; None if it hangs up instead."""
        self.send(frame(PING, 0, 0, b"are you?"))
        return self.wait_for(PING, flags=ACK)

    def _read(self, num_bytes: int) -> bytes | None:
        found = b""
        while len(found) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(found))
            except TimeoutError:
                raise
            except OSError:
                part = b""
            if not part:
                self.is_cut = True
                return None
            found += part
        return found

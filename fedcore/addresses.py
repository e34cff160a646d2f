"""Host names and addresses, as people write them and as certificates hold them."""

from __future__ import annotations

import ipaddress
import re

from fedcore.errors import InvalidInput

_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")


def check_host(host: str, what: str = "host") -> str:
    """Return `host` (a DNS name or an IP address without brackets) if a client could dial it.

    Raises:
        InvalidInput: it is neither, or it is the wildcard address, which one can only listen on.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        # A name whose last label is a number would be read as an IPv4 address by some and as a name by others.
        if len(host) > 253 or not all(map(_HOST_LABEL.fullmatch, labels)) or labels[-1].isdigit():
            raise InvalidInput(f"{what} {host[:80]!r} is neither a DNS name nor an IP address") from None
        return host
    zone = host.partition("%")[2]  # fe80::1%eth0: Python lets anything stand after the sign
    if zone and _ZONE.fullmatch(zone) is None:
        raise InvalidInput(f"{what} {host[:80]!r} has a zone that is not a name of a network interface")
    if address.is_unspecified:
        raise InvalidInput(f"{what} {host!r} is an address to listen on; give the one that clients dial")
    return host


def check_address(address: str, what: str = "address") -> str:
    """Return `address` if it is HOST:PORT (IPv6 addresses in brackets) that a client could dial.

    Raises:
        InvalidInput: it is not.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise InvalidInput(f"{what} {address[:80]!r} is not HOST:PORT with a port from 1 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed != (":" in host):
        raise InvalidInput(f"{what} {address[:80]!r} is not HOST:PORT; an IPv6 address stands in brackets")
    check_host(host[1:-1] if bracketed else host, what)
    return address


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.addresses import check_address, check_host
from fedcore.errors import InvalidInput


@pytest.mark.parametrize(
    "host", ["a", "fl.example.org", "fl.example.org.", "my_service", "10.0.0.1", "::1", "fe80::1%eth0.1", "x-1.y"]
)
def test_what_a_client_can_dial_is_a_host(host: str) -> None:
    assert check_host(host) == host
    assert check_address(f"[{host}]:1" if ":" in host else f"{host}:1")


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "a..b",
        "-a",
        "a-",
        "*.example.org",
        "a b",
        "a/b",
        "1.2.3",
        "256.1.1.1",
        "ü.de",
        "a" * 64,
        "[::1]",
        "::1%",
        "::1%a b",
        '::1%"\n',
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(InvalidInput):
        check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_wildcard_address_is_refused_with_advice(host: str) -> None:
    with pytest.raises(InvalidInput, match="listen on; give the one that clients dial"):
        check_host(host)


@pytest.mark.parametrize(
    "address", ["", "a", "a:", ":1", "a:0", "a:65536", "a:+1", "a: 1", "::1:80", "[a]:1", "[::1:80"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidInput):
        check_address(address)


@given(st.text())
def test_arbitrary_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert check_address(text) == text

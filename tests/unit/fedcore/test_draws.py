"""Draws from a secret: against the standards that they follow, and against the distributions that they promise."""

from __future__ import annotations

import hashlib
import hmac
import struct

import numpy as np
import pytest
from scipy import stats

from fedcore.draws import PrivateDraws

N = 200_000
FALSE_ALARM = 1e-6  # draws are fixed, so a test that passes once passes always


def chacha20_block(key: bytes, counter: int) -> bytes:
    """Return a block of the key stream as RFC 8439, section 2.3 puts it, with a nonce of zeros."""
    words = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
    state = list(words)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) & 0xFFFFFFFF
            mixed = state[z] ^ state[x]
            state[z] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF

    for _ in range(10):
        for column in range(4):
            quarter(column, column + 4, column + 8, column + 12)
        for column in range(4):
            quarter(column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return struct.pack("<16I", *((new + old) & 0xFFFFFFFF for new, old in zip(state, words, strict=True)))


def hkdf(secret: bytes, info: bytes) -> bytes:
    """Return 32 bytes as RFC 5869 derives them without a salt."""
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(extracted, info + b"\1", hashlib.sha256)


def test_bytes_are_a_chacha20_key_stream_under_a_derived_key() -> None:
    key = hkdf(b"secret", b"roundtable draws\1\0\0\0a\2\0\0\0bc")
    draws = PrivateDraws(b"secret", b"a", b"bc")
    assert draws.bytes(50) + draws.bytes(78) == chacha20_block(key, 0) + chacha20_block(key, 1)


def test_other_secrets_and_other_keys_draw_other_numbers() -> None:
    kinds = [
        (b"s", b"a", b"b"),
        (b"s", b"ab"),
        (b"s", b"a", b"b", b""),
        (b"s", b"", b"ab"),
        (b"t", b"a", b"b"),
        (b"s",),
    ]
    assert len({PrivateDraws(*kind).bytes(16) for kind in kinds}) == len(kinds)
    assert PrivateDraws(b"s", b"a").bytes(16) == PrivateDraws(b"s", b"a").bytes(16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_uniform_numbers_are_the_upper_bits_of_the_stream(dtype: type) -> None:
    width, bits = (4, 24) if dtype == np.float32 else (8, 53)
    stream = PrivateDraws(b"s").bytes(width * 1000)
    expected = [
        int.from_bytes(stream[at : at + width], "little") >> (8 * width - bits) for at in range(0, len(stream), width)
    ]
    found = PrivateDraws(b"s").random(1000, dtype=dtype)
    assert found.dtype == dtype
    assert [int(number) for number in found.astype(np.float64) * 2.0**bits] == expected


@pytest.mark.parametrize("method", ["random", "standard_exponential", "standard_normal"])
def test_numbers_have_their_distribution(method: str) -> None:
    cdf = {"random": "uniform", "standard_exponential": "expon", "standard_normal": "norm"}[method]
    found = getattr(PrivateDraws(b"s", method.encode()), method)(N)
    assert found.size == N
    assert np.isfinite(found).all()
    assert stats.kstest(found, cdf).pvalue > FALSE_ALARM
    # Neighbours know nothing of each other: nor do the halves that one pair of uniform numbers gives.
    for shift in (1, N // 2):
        assert stats.spearmanr(found[:-shift], found[shift:]).pvalue > FALSE_ALARM


def test_odd_numbers_of_normal_draws() -> None:
    assert [PrivateDraws(b"s").standard_normal(size).size for size in (0, 1, 2, 7)] == [0, 1, 2, 7]

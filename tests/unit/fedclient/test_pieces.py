"""Bytes in pieces are what they are together."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.pieces import Pieces


@given(st.lists(st.binary(max_size=20), max_size=4), st.integers(-70, 100), st.integers(-70, 100))
def test_they_slice_as_one(pieces: list[bytes], start: int, stop: int) -> None:
    whole, found = b"".join(pieces), Pieces(*(memoryview(piece) for piece in pieces))
    assert len(found) == len(whole)
    assert found[start:stop] == whole[start:stop]
    assert found[:] == whole
    assert found.sha256() == hashlib.sha256(whole).hexdigest()


def test_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="step 2"):
        Pieces(b"abc")[::2]

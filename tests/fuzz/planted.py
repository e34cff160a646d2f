"""A target with a bug in it: what fuzzing that finds nothing is worth, this one tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedcore.errors import LayoutError
from fedcore.layout import Layout
from tests.fuzz.target import Target
from tests.support.player import LAYOUT


def read(data: bytes) -> None:
    try:
        layout = Layout.from_json(data)
    except LayoutError:
        return
    assert layout.num_values < 10 * LAYOUT.num_values, "planted"


def seeds() -> Iterator[bytes]:
    yield LAYOUT.to_json()


PLANTED: Final = Target("planted", read, seeds)

"""Where the vector is cut before anything else is done to it."""

from __future__ import annotations

from typing import ClassVar

from fedcodec.base import LOSSLESS, Kind, Traits
from fedcore.plugin import Plugin


class PerTensor(Plugin):
    """Each tensor of the layout goes through the other stages by itself, with a table of its own.

    One that they would make longer than float32 is sent as it is, where the quantiser allows it.
    """

    name: ClassVar[str] = "per-tensor"
    wire_id: ClassVar[int] = 10
    kind: ClassVar[Kind] = "split"
    traits: ClassVar[Traits] = LOSSLESS

"""The visible table of codecs. A new codec is one file and one line here; README.md has its wire id."""

from __future__ import annotations

from typing import Final

from fedcodec.base import Codec
from fedcore.registry import Registry

CODECS: Final[Registry[type[Codec]]] = Registry(
    kind="codec",
    group="roundtable.codecs",
    builtins={
        "bf16": "fedcodec.bf16:Bf16",
        "raw": "fedcodec.raw:Raw",
    },
)

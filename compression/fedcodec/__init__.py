"""Codecs and pipelines: float32 vectors ↔ the frames that cross the wire. README.md has the byte format."""

from __future__ import annotations

from typing import Final

from fedcodec.base import Codec, Traits
from fedcodec.pipeline import Pipeline, build_pipeline
from fedcodec.table import CODECS

__all__: Final = ["CODECS", "Codec", "Pipeline", "Traits", "build_pipeline"]

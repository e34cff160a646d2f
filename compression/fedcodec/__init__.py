"""Codecs and pipelines: float32 vectors ↔ the frames that cross the wire. docs/wire-format.md has the byte format."""

from __future__ import annotations

from typing import Final

from fedcodec.base import Stage, Traits
from fedcodec.build import build_pipeline
from fedcodec.pipeline import Pipeline
from fedcodec.table import CODECS

__all__: Final = ["CODECS", "Pipeline", "Stage", "Traits", "build_pipeline"]

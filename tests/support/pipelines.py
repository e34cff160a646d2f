"""Pipelines to try a stage in."""

from __future__ import annotations

from typing import Final

from fedcodec import CODECS, Pipeline, build_pipeline

NEEDS: Final = {"positions": ["top-k"], "noise": ["clip"]}
"""By kind: stages without which one of it makes no sense."""


def shortest(name: str) -> Pipeline:
    """Return the shortest pipeline that has a stage, with its defaults."""
    stage = CODECS.get(name).configure({})
    before = NEEDS.get(stage.kind, [])
    if getattr(stage, "max_codes", 1 << 32) < 1 << 32:
        before = [*before, "int8"]  # 255 codes
    return build_pipeline([{"codec": stage} for stage in [*before, name]])

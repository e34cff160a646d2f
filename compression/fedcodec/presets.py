"""Whole pipelines by one word. A preset is short for what it stands for: a job that names one is submitted as that.

Parameters are those of the papers where they fit any model; who wants others writes the stages out
(`fedserver check` prints them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from fedcore.errors import UnknownPlugin
from fedcore.jobfile import CodecStage, CompressionSection, ErrorFeedbackSection
from fedcore.names import nearest

Stages = tuple[dict[str, JsonValue], ...]

RAW: Final[Stages] = ({"codec": "raw"},)


@dataclass(frozen=True)
class Preset:
    """What a preset stands for.

    Attributes:
        about: what it does, and who found it.
        uplink: client to server.
        downlink: server to client.
        error_feedback: whether clients keep what was left out, and add it to their next update.
    """

    about: str
    uplink: Stages
    downlink: Stages = RAW
    error_feedback: bool = False


PRESETS: Final = {
    "none": Preset("every bit of every value", RAW),
    "int8": Preset(
        "8 bits a value, right on average (Alistarh et al., QSGD, 2017)",
        ({"codec": "per-tensor"}, {"codec": "int8"}),
    ),
    "fedzip": Preset(
        "a tenth of each tensor as two values; the rest is one, not sent (Malekijoo et al., FedZip, 2021)",
        (
            {"codec": "per-tensor"},
            {"codec": "top-k", "fraction": 0.1},
            {"codec": "kmeans", "clusters": 3},
            {"codec": "rice"},
        ),
        error_feedback=True,
    ),
    "compeft": Preset(
        "the signs of the largest tenth, and one scale (Yadav et al., ComPEFT, 2023)",
        ({"codec": "top-k", "fraction": 0.1}, {"codec": "ternary"}, {"codec": "rice"}),
        error_feedback=True,
    ),
    "flasc": Preset(
        "the largest quarter of the weights down, the largest tenth of the update up (Kuo et al., FLASC, 2024)",
        ({"codec": "top-k", "fraction": 0.1}, {"codec": "bf16"}, {"codec": "rice"}),
        ({"codec": "top-k", "fraction": 0.25}, {"codec": "bf16"}, {"codec": "rice"}),
    ),
    "rqm": Preset(
        "16 levels, which of them is drawn in private (Youn et al., RQM, 2023); needs aggregator.max_examples = 1",
        ({"codec": "rqm", "levels": 16, "keep": 0.42, "clip": 0.01, "extension": 0.01},),
    ),
}


def expand(compression: CompressionSection) -> CompressionSection:
    """Return the section with its preset written out.

    Raises:
        UnknownPlugin: there is no preset of that name; the text names the known ones.
    """
    if compression.preset is None:
        return compression
    if compression.preset not in PRESETS:
        guess = nearest(compression.preset, PRESETS)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise UnknownPlugin(f"unknown preset {compression.preset!r}: {hint}known: {', '.join(PRESETS)}")
    preset = PRESETS[compression.preset]
    return CompressionSection(
        uplink=[CodecStage.model_validate(stage) for stage in preset.uplink],
        downlink=[CodecStage.model_validate(stage) for stage in preset.downlink],
        error_feedback=ErrorFeedbackSection() if preset.error_feedback else None,
    )

"""From the stages in a job file to a pipeline, or a sentence that says why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import JsonValue

from fedcodec.base import KINDS, Stage
from fedcodec.coders.fixed import FixedPositions, FixedSymbols
from fedcodec.pipeline import Pipeline
from fedcodec.quantisers.floats import Raw
from fedcodec.table import CODECS
from fedcore.errors import InvalidInput

WORDS: Final = {
    "clip": "bounds the norm",
    "noise": "adds noise",
    "split": "cuts the vector into tensors",
    "select": "selects values",
    "quantise": "turns values into codes",
    "positions": "writes positions",
    "symbols": "writes codes",
    "compress": "compresses bytes",
}


MAX_CODED: Final = 1 << 32
"""Values of one tensor: a quantiser whose number of codes grows with them has a code for each at most."""


def build_pipeline(stages: Sequence[Mapping[str, JsonValue]]) -> Pipeline:
    """Return the pipeline of a job's stages, in the order of encoding.

    A stage is ``{"codec": name, parameter: value, …}``.

    Raises:
        InvalidInput: a stage names no codec, a parameter is unknown or out of bounds, or the stages do not
            compose.
        UnknownPlugin: there is no codec of that name; the text names the known ones.
    """
    built = [_build_stage(stage) for stage in stages]
    if not built:
        raise InvalidInput("a pipeline has at least one stage")
    found: dict[str, Any] = {}
    for before, stage in zip([None, *built], built, strict=False):
        if before is not None and KINDS.index(stage.kind) <= KINDS.index(before.kind):
            raise InvalidInput(
                f"{stage.name} {WORDS[stage.kind]}, so it cannot follow {before.name}, which {WORDS[before.kind]}"
            )
        found[stage.kind] = stage
    pipeline = Pipeline(
        stages=tuple(built),
        quantise=found.get("quantise", Raw()),
        positions=found.get("positions", FixedPositions()),
        symbols=found.get("symbols", FixedSymbols()),
        transforms=tuple(found[kind] for kind in ("clip", "noise") if kind in found),
        select=found.get("select"),
        compress=found.get("compress"),
        by_tensor="split" in found,
    )
    _check(pipeline, found)
    return pipeline


def _check(pipeline: Pipeline, found: Mapping[str, Stage]) -> None:
    select, quantise = pipeline.select, pipeline.quantise
    if "noise" in found and "clip" not in found:
        raise InvalidInput(f"{found['noise'].name} hides no more than the norm allows: put clip before it")
    if select is not None and not select.note_bytes and quantise.traits.private_draws:
        raise InvalidInput(
            f"{quantise.name} hides values, but {select.name} before it sends where the large ones are; rand-k sends"
            " nothing of that kind"
        )
    if select is not None and select.note_bytes and quantise.drops:
        raise InvalidInput(
            f"{quantise.name} leaves values out, which it cannot after {select.name}, whose positions are not sent"
        )
    if "positions" in found and not pipeline.is_sparse:
        raise InvalidInput(f"{pipeline.positions.name} writes positions, and no stage before it leaves anything out")
    if pipeline.symbols.max_codes < quantise.num_codes(MAX_CODED):
        raise InvalidInput(
            f"{pipeline.symbols.name} writes at most {pipeline.symbols.max_codes} different codes, {quantise.name} has"
            f" {quantise.num_codes(MAX_CODED)}"
        )


def _build_stage(stage: Mapping[str, JsonValue]) -> Stage:
    name = stage.get("codec")
    if not isinstance(name, str):
        raise InvalidInput(f"a stage names its codec, known: {', '.join(CODECS.names())}; got {str(dict(stage))[:80]}")
    return CODECS.get(name).configure({key: value for key, value in stage.items() if key != "codec"})

"""Whether the parts of a job go together: what each stage promises against what the others need.

What one pipeline can hold is `fedcodec.build_pipeline`'s to say. docs/compatibility.md is the whole table.
"""

from __future__ import annotations

import numpy as np

from fedagg import FactorRule, Rule
from fedcodec import Pipeline
from fedcodec.base import code_type
from fedcodec.reader import Reader
from fedcodec.transforms import GaussianNoise
from fedcore.jobfile import Job, ServerOptimizerSection
from fedcore.sending import Sending


def misfits_of(job: Job, uplink: Pipeline, downlink: Pipeline, rule: Rule, sending: Sending) -> list[str]:
    """Return a sentence for each part of a job that the rest of it does not allow."""
    return [
        *(_factors(job, rule, sending) if isinstance(rule, FactorRule) else []),
        *(_turns(job) if sending.alternates else []),
        *(f"compression.downlink: {text}" for text in _downlink(downlink)),
        *(f"compression.uplink: {text}" for text in _sum(job, uplink)),
        *(f"compression.error_feedback: {text}" for text in _error_feedback(job, uplink)),
    ]


def _factors(job: Job, rule: FactorRule, sending: Sending) -> list[str]:
    name, found = rule.name, []
    if job.adapter.name != "lora":
        found.append(
            f"aggregator.rule: {name} makes one pair of factors of many, and adapter {job.adapter.name!r} has"
            " no pairs that are trained: use 'lora'"
        )
    if sending.ranks and not rule.unequal_ranks:
        others = "flora, flexlora, hetlora or weighted-mean"
        found.append(f"adapter.ranks: {name} averages factors of one rank; ranks that differ go with {others}")
    if job.server_optimizer != ServerOptimizerSection():
        found.append(f"server_optimizer: {name} gives the next version's values, not a step to be scaled: leave it out")
    if job.compression.error_feedback is not None:
        found.append(f"compression.error_feedback: {name} replaces the factors that an update is the difference to")
    return found


def _turns(job: Job) -> list[str]:
    found = []
    if job.server_optimizer != ServerOptimizerSection():
        found.append(
            f"server_optimizer: {job.adapter.name} keeps one factor as it is, and {job.server_optimizer.name}"
            " would go on moving it: leave it out"
        )
    if job.compression.error_feedback is not None:
        found.append(
            f"compression.error_feedback: what {job.adapter.name} leaves out of one factor does not fit the"
            " other, which is trained next"
        )
    return found


def _downlink(pipeline: Pipeline) -> list[str]:
    found = [
        f"{stage.name} is for updates, and a version is none: it would be changed for good"
        for stage in pipeline.transforms
    ]
    if pipeline.quantise.traits.private_draws:
        found.append(f"{pipeline.quantise.name} hides an update from the server, and versions come from the server")
    if pipeline.traits.votes:
        found.append(f"{pipeline.quantise.name} keeps ranks alone, and clients need values")
    if not found:
        found = [
            f"{stage.name} is no contraction, so nothing bounds how far off the clients' copies are"
            for stage in pipeline.stages
            if not stage.traits.contraction
        ]
    return found


def _sum(job: Job, pipeline: Pipeline) -> list[str]:
    name, rule, max_abs = pipeline.quantise.name, job.aggregator.rule, job.aggregator.max_abs
    if pipeline.traits.votes:
        return [f"{name} sends votes, and {rule} adds steps"]
    if (largest := _largest(pipeline)) > max_abs:
        return [f"values up to {largest:g} are made, and above aggregator.max_abs {max_abs:g} an update is refused"]
    if pipeline.traits.integer_sum and job.aggregator.max_examples != 1:
        weight = f"set aggregator.max_examples to 1, it is {job.aggregator.max_examples}"
        return [f"{name} sends integers that are added as they are, so every update must weigh the same: {weight}"]
    return []


def _largest(pipeline: Pipeline) -> float:
    """Return the largest magnitude that the stages give whatever the values are; 0 if that depends on the values."""
    spread = max((6 * each.std for each in pipeline.transforms if isinstance(each, GaussianNoise)), default=0.0)
    quantise = pipeline.quantise
    if quantise.max_table_bytes(1):
        return spread
    code = np.zeros(1, dtype=code_type(quantise.num_codes(1)))
    book = quantise.decode(code, quantise.read_table(Reader(b""), 1), 0).book
    return spread if book is None else float(np.abs(book).max())


def _error_feedback(job: Job, pipeline: Pipeline) -> list[str]:
    if job.compression.error_feedback is None:
        return []
    if pipeline.traits.lossless:
        return ["the uplink leaves nothing out that could be fed back"]
    for stage in pipeline.stages:
        if stage.traits.private_draws:
            return [f"{stage.name} hides the update by what it draws, and feeding back would take that out again"]
        if not stage.traits.contraction:
            return [f"{stage.name} is no contraction, so what is fed back could grow for ever"]
    return []

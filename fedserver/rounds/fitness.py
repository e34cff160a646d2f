"""Whether the parts of a job go together: what each stage promises against what the others need.

What one pipeline can hold is `fedcodec.build_pipeline`'s to say. docs/compatibility.md is the whole table.
"""

from __future__ import annotations

from fedcodec import Pipeline
from fedcore.jobfile import Job


def misfits_of(job: Job, uplink: Pipeline, downlink: Pipeline) -> list[str]:
    """Return a sentence for each part of a job that the rest of it does not allow."""
    return [
        *(f"compression.downlink: {text}" for text in _downlink(downlink)),
        *(f"compression.uplink: {text}" for text in _sum(job, uplink)),
        *(f"compression.error_feedback: {text}" for text in _error_feedback(job, uplink)),
    ]


def _downlink(pipeline: Pipeline) -> list[str]:
    found = [
        f"{stage.name} is for updates, and a version is none: it would be changed for good"
        for stage in pipeline.transforms
    ]
    if pipeline.quantise.traits.private_draws:
        found.append(f"{pipeline.quantise.name} hides an update from the server, and versions come from the server")
    if pipeline.traits.votes:
        found.append(f"{pipeline.quantise.name} keeps ranks alone, and clients need values")
    return found


def _sum(job: Job, pipeline: Pipeline) -> list[str]:
    name, rule = pipeline.quantise.name, job.aggregator.rule
    if pipeline.traits.votes:
        return [f"{name} sends votes, and {rule} adds steps"]
    if pipeline.traits.integer_sum and job.aggregator.max_examples != 1:
        weight = f"set aggregator.max_examples to 1, it is {job.aggregator.max_examples}"
        return [f"{name} sends integers that are added as they are, so every update must weigh the same: {weight}"]
    return []


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

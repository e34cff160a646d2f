"""What a finished job comes down to: the figures that the simulator and the demo end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from fedcodec import build_pipeline
from fedcodec.presets import expand
from fedcore.jobfile import Job
from fedserver.export import Exported


@dataclass(frozen=True)
class Bounds:
    """Figures on the union of the clients' held-out data: untrained, and after training on all data in one place."""

    base: dict[str, float]
    pooled: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """See docs/simulator.md for each key. Accuracies and losses are None for a task that does not measure them.

    Attributes:
        base_accuracy: of version 0, on all clients' held-out data.
        pooled_accuracy: with the adapter trained on all data in one place; None if that was not measured.
        base_loss, final_loss, pooled_loss: of the same three, the task's loss.
        uplink_bytes: all updates with headers and signatures, as sent.
        round_uplink_bytes: of these, what the cheapest round took.
        downlink_bytes: all downloads.
        raw_uplink_bytes: what the values of all updates would take as float32, without any header.
        ratio: `raw_uplink_bytes` / `uplink_bytes`.
        relative_error: mean over the versions of what encoding left out of updates; None if clients hide it.
        epsilon: what a private job has spent; None: it is not private.
        model_sha256: of the last version's vector.
        adapter: the PEFT folder, or the weights' file for anything but LoRA.
        plot: None where matplotlib is not installed.
    """

    base_accuracy: float | None
    final_accuracy: float | None
    pooled_accuracy: float | None
    base_loss: float | None
    final_loss: float | None
    pooled_loss: float | None
    rounds: int
    clients: int
    uplink_bytes: int
    round_uplink_bytes: int
    downlink_bytes: int
    raw_uplink_bytes: int
    ratio: float
    relative_error: float | None
    epsilon: float | None
    model_sha256: str
    adapter: str
    model_card: str
    plot: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return asdict(self)


def summarise(
    job: Job, history: Sequence[Mapping[str, Any]], num_clients: int, bounds: Bounds | None, exported: Exported
) -> Summary:
    """Return the summary of a job whose last version was exported.

    Args:
        job: that was run.
        history: a row for each version, the oldest first (docs/status.md).
        num_clients: that took part.
        bounds: from `fedsim.pooled.measure`.
        exported: the last version's files.
    """
    # Version 0 is measured by its cohort only; where all data is at hand, on all of it.
    base = history[0]["evaluation"] if bounds is None else bounds.base
    final = history[-1]["evaluation"]
    pooled = {} if bounds is None else bounds.pooled
    uplink_bytes, downlink_bytes, raw_uplink_bytes = (
        sum(row[key] for row in history) for key in ("uplink_bytes", "downlink_bytes", "raw_uplink_bytes")
    )
    return Summary(
        base_accuracy=base.get("accuracy"),
        final_accuracy=final.get("accuracy"),
        pooled_accuracy=pooled.get("accuracy"),
        base_loss=base.get("loss"),
        final_loss=final.get("loss"),
        pooled_loss=pooled.get("loss"),
        rounds=history[-1]["version"],
        clients=num_clients,
        uplink_bytes=uplink_bytes,
        round_uplink_bytes=min((row["uplink_bytes"] for row in history[1:]), default=0),
        downlink_bytes=downlink_bytes,
        raw_uplink_bytes=raw_uplink_bytes,
        ratio=raw_uplink_bytes / uplink_bytes,
        relative_error=_relative_error(job, history),
        epsilon=history[-1]["epsilon"],
        model_sha256=history[-1]["sha256"],
        adapter=str(exported.adapter or exported.weights),
        model_card=str(exported.model_card),
        plot=None if exported.plot is None else str(exported.plot),
    )


def _relative_error(job: Job, history: Sequence[Mapping[str, Any]]) -> float | None:
    stages = expand(job.compression).uplink
    if build_pipeline([{"codec": stage.codec, **stage.params} for stage in stages]).traits.lossless:
        return 0.0
    errors = [row["encoding_error"] for row in history if row["encoding_error"] is not None]
    return fmean(errors) if errors else None

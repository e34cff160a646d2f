"""What a finished job comes down to: the figures that the simulator and the demo end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedserver.export import Exported


@dataclass(frozen=True)
class Bounds:
    """Figures on the union of the clients' held-out data: untrained, and after training on all data in one place."""

    base: dict[str, float]
    pooled: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """See docs/simulator.md for each key. Accuracies are None for a task that does not measure accuracy.

    Attributes:
        base_accuracy: of version 0, on all clients' held-out data.
        pooled_accuracy: with the adapter trained on all data in one place; None if that was not measured.
        uplink_bytes: all updates with headers and signatures, as sent.
        downlink_bytes: all downloads.
        model_sha256: of the last version's vector.
        adapter: the PEFT folder, or the weights' file for anything but LoRA.
        plot: None where matplotlib is not installed.
    """

    base_accuracy: float | None
    final_accuracy: float | None
    pooled_accuracy: float | None
    rounds: int
    clients: int
    uplink_bytes: int
    downlink_bytes: int
    model_sha256: str
    adapter: str
    model_card: str
    plot: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return asdict(self)


def summarise(
    history: Sequence[Mapping[str, Any]], num_clients: int, bounds: Bounds | None, exported: Exported
) -> Summary:
    """Return the summary of a job whose last version was exported.

    Args:
        history: a row for each version, the oldest first (docs/status.md).
        num_clients: that took part.
        bounds: from `fedsim.pooled.measure`.
        exported: the last version's files.
    """
    # Version 0 is measured by its cohort only; where all data is at hand, on all of it.
    base = history[0]["evaluation"] if bounds is None else bounds.base
    return Summary(
        base_accuracy=base.get("accuracy"),
        final_accuracy=history[-1]["evaluation"].get("accuracy"),
        pooled_accuracy=None if bounds is None else bounds.pooled.get("accuracy"),
        rounds=history[-1]["version"],
        clients=num_clients,
        uplink_bytes=sum(row["uplink_bytes"] for row in history),
        downlink_bytes=sum(row["downlink_bytes"] for row in history),
        model_sha256=history[-1]["sha256"],
        adapter=str(exported.adapter or exported.weights),
        model_card=str(exported.model_card),
        plot=None if exported.plot is None else str(exported.plot),
    )

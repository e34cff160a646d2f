"""How a private job trains and starts on this client, as its section `[privacy]` says."""

from __future__ import annotations

from fedclient import dpsgd
from fedclient.adapters.base import AdaptedModel
from fedclient.clipping import CannotHide
from fedclient.tasks.base import Split, Task, TrainingRun
from fedcore.draws import PrivateDraws
from fedcore.layout import Vector
from fedcore.privacy import DpLoraPaper, DpSgd, PrivacySection, steps_per_round


def train(
    task: Task, model: AdaptedModel, data: Split, run: TrainingRun, section: PrivacySection, draws: PrivateDraws
) -> None:
    """Train in place; what hides the client as a whole, and comes after training, is left to the caller.

    Raises:
        CannotHide: as `dpsgd.train`, or the section's delta is too large for so few examples.
    """
    match section:
        case DpSgd():
            _check_delta(section, len(data))
            dpsgd.train(
                task,
                model,
                data,
                run,
                draws,
                sampling=section.sampling,
                steps=steps_per_round(section, run.settings.local_epochs),
                clip=section.clip,
                noise_multiplier=section.multiplier,
            )
        case DpLoraPaper():
            how = {"clip": section.clip, "noise_multiplier": section.multiplier}
            dpsgd.train_as_published(task, model, data, run, draws, **how)
        case _:
            task.train(model, data, run)


def start(
    task: Task, model: AdaptedModel, data: Split, run: TrainingRun, section: DpSgd, draws: PrivateDraws
) -> Vector:
    """Return what `dpsgd.start` does.

    Raises:
        CannotHide: the section's delta is too large for so few examples.
        ValueError: the section does not say how to start.
    """
    if section.start is None:
        raise ValueError("privacy.start is missing")
    _check_delta(section, len(data))
    how = {"clip": section.start.clip, "noise_multiplier": section.start.noise_multiplier}
    return dpsgd.start(task, model, data, run, draws, sampling=section.sampling, **how)


def _check_delta(section: DpSgd, number: int) -> None:
    """Refuse a delta with which it would count as private to publish an example outright."""
    if section.delta * number >= 1:
        raise CannotHide(f"delta {section.delta:g}: below 1/n = {1 / number:.2g} is needed for {number} examples")

"""What a private job must not do beside its mechanism: the order of clipping, noise and compression, and weights.

The server refuses such a job when it is submitted, and a client when it is asked to work for it, whatever the server
says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from fedcore.adapters import GRADIENT_START, LoraSbParams
from fedcore.params import parse_params
from fedcore.privacy import DpFedAvg, DpLoraPaper, DpSgd, RqmPrivacy
from fedprivacy.events import Trust
from fedprivacy.jobs import Accounting

_RQM_KINDS: Final = ("clip", "split", "quantise", "symbols", "compress")
"""Stages that may stand beside `rqm`: others would choose or scale values before they are hidden."""

_LENGTH_KINDS: Final = ("select", "positions", "symbols", "compress")
_FIXED: Final = ("fixed-symbols",)
"""Stages whose length follows from the number of values alone."""


class Traits(Protocol):
    """Of a stage, as `fedcodec.base.Traits` explains them."""

    @property
    def lossless(self) -> bool: ...  # noqa: D102
    @property
    def changes_sensitivity(self) -> bool: ...  # noqa: D102


class Stage(Protocol):
    """A stage of the uplink."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def traits(self) -> Traits: ...  # noqa: D102


def disorder_of(accounting: Accounting, uplink: Sequence[Stage]) -> list[str]:
    """Return a sentence for each part of a job that would undo what its mechanism hides."""
    return [
        *_weights(accounting),
        *_feedback(accounting),
        *_order(accounting, uplink),
        *_sum(accounting, uplink),
        *_shapes(accounting, uplink),
        *_start(accounting),
        *_training(accounting),
    ]


def _weights(accounting: Accounting) -> Iterator[str]:
    weight = accounting.job.aggregator.max_examples
    if not isinstance(accounting.section, DpSgd) and weight != 1:
        yield (
            f"aggregator.max_examples: {weight}, and {accounting.section.mechanism} bounds what one client adds to a"
            " sum in which all weigh the same: set it to 1"
        )


def _feedback(accounting: Accounting) -> Iterator[str]:
    if accounting.job.compression.error_feedback is not None:
        name = accounting.section.mechanism
        yield f"compression.error_feedback: what was left out of other updates would come past what {name} hides"


def _order(accounting: Accounting, uplink: Sequence[Stage]) -> Iterator[str]:
    name = accounting.section.mechanism
    names = [stage.name for stage in uplink]
    if isinstance(accounting.section, RqmPrivacy):
        if "rqm" not in names:
            yield f"compression.uplink: mechanism rqm is the codec 'rqm', and there is {', '.join(names)}"
        for stage in uplink:
            if stage.kind not in _RQM_KINDS:
                yield f"compression.uplink: {stage.name} before rqm changes how far two updates are apart"
        return
    for own in ("clip", "gaussian-noise"):
        if own in names:
            yield f"compression.uplink: {name} clips and adds noise by itself, before all codecs: leave {own} out"


def _sum(accounting: Accounting, uplink: Sequence[Stage]) -> Iterator[str]:
    """Yield what breaks it where it is the sum that hides."""
    if not isinstance(accounting.section, DpFedAvg):
        return
    for stage in uplink:
        if accounting.trust is Trust.DISTRIBUTED and not stage.traits.lossless:
            yield (f"compression.uplink: shares of noise add up as long as nothing changes them, and {stage.name} does")
        if accounting.trust is Trust.CENTRAL and stage.traits.changes_sensitivity:
            yield (
                f"compression.uplink: {stage.name} can make a clipped update longer, and noise is added after it:"
                " leave it out, or let noise = 'local'"
            )


def _shapes(accounting: Accounting, uplink: Sequence[Stage]) -> Iterator[str]:
    """Yield what of an update's shape breaks it where others' updates have to hide it."""
    if accounting.trust is Trust.LOCAL:
        return
    name, ranks = accounting.section.mechanism, accounting.job.adapter.params.get("ranks")
    if ranks and not (isinstance(accounting.section, DpFedAvg) and accounting.section.noise == "server"):
        yield f"adapter.ranks: with {name} the others of a sum hide a client, and of its higher ranks there are fewer"
    for stage in uplink:
        if stage.kind in _LENGTH_KINDS and stage.name not in _FIXED:
            yield (
                f"compression.uplink: the length of what {stage.name} makes tells of an update, and lengths are"
                f" published: leave it out, or use a mechanism that hides updates from the server"
            )


def _start(accounting: Accounting) -> Iterator[str]:
    job, section = accounting.job, accounting.section
    if job.adapter.name not in GRADIENT_START:
        if section.start is not None:
            yield f"privacy.start: adapter {job.adapter.name} does not start from gradients: leave it out"
        return
    if section.start is None:
        yield f"privacy.start: {job.adapter.name} starts from gradients of the data: give clip and noise_multiplier"
    params = parse_params(LoraSbParams, job.adapter.params, "adapter")
    if params.votes and not accounting.is_local:
        yield "adapter.votes: signs of gradients are not bounded by privacy.start.clip: leave it out"


def _training(accounting: Accounting) -> Iterator[str]:
    training, section = accounting.job.training, accounting.section
    if isinstance(section, DpSgd | DpLoraPaper) and training.max_grad_norm is not None:
        yield f"training.max_grad_norm: {section.mechanism} clips by privacy.clip: leave it out"

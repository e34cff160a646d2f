"""The `[privacy]` section of a job file: which mechanism hides what, and how much of it.

What a mechanism guarantees is `fedprivacy`'s to say; clients and server read here what they have to do.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CLIP: Final = 1_000_000
MAX_MULTIPLIER: Final = 1_000_000

Clip = Annotated[float, Field(gt=0, le=MAX_CLIP)]
Multiplier = Annotated[float, Field(ge=1e-3, le=MAX_MULTIPLIER)]


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class StartKeys(_Keys):
    """How the gradients are hidden that a job of adapter `lora-sb` starts from: clipped and noised like an update."""

    clip: Clip = Field(description="Largest L2 norm: of an example's gradient for dp-sgd, else of a client's sum.")
    noise_multiplier: Multiplier = Field(description="Standard deviation of the noise over the clip.")


class AdaptiveKeys(_Keys):
    """The clip follows the updates' norms (Andrew et al., 2021): clip · exp(−rate · (share below it − quantile))."""

    quantile: float = Field(default=0.5, gt=0, lt=1, description="Share of updates that shall be below the clip.")
    rate: float = Field(default=0.2, gt=0, le=10, description="Learning rate of the clip's logarithm.")
    count_std: float | None = Field(
        default=None,
        ge=1e-3,
        le=1_000_000,
        description="Noise on how many are below, in clients; default: cohort / 20.",
    )


class _Privacy(_Keys):
    """What all mechanisms have in common."""

    delta: float = Field(gt=0, lt=1, description="Chance with which epsilon need not hold.")
    epsilon: float | None = Field(
        default=None, gt=0, le=1_000_000, description="Budget: the job stops before the round that would exceed it."
    )
    evaluation: bool = Field(
        default=False, description="Whether clients send figures of held-out examples, which nothing hides."
    )
    unsafe_seed: int | None = Field(
        default=None, ge=0, lt=2**53, description="For experiments: draw from this, which is known, and hide nothing."
    )
    start: StartKeys | None = Field(default=None, description="Of a job that starts from gradients.")


class _Gaussian(_Privacy):
    clip: Clip = Field(description="Largest L2 norm of what is clipped, over all that is trained.")
    noise_multiplier: Multiplier | None = Field(
        default=None, description="Standard deviation of the noise over the clip; default: what epsilon allows."
    )

    @model_validator(mode="after")
    def _noise_follows_from_something(self) -> Self:
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("noise_multiplier or epsilon is needed")
        return self

    @property
    def multiplier(self) -> float:
        """The noise multiplier, once it is known: of a job that a server has taken."""
        if self.noise_multiplier is None:
            raise ValueError("noise_multiplier has not been solved for")
        return self.noise_multiplier


class DpSgd(_Gaussian):
    """Each client hides each of its examples, from the server too: DP-SGD (Abadi et al., 2016)."""

    mechanism: Literal["dp-sgd"]
    sampling: float = Field(gt=0, le=1, description="Probability of each example to be in a step's batch.")


class DpFedAvg(_Gaussian):
    """Each client is hidden as a whole: DP-FedAvg (McMahan et al., 2018)."""

    mechanism: Literal["dp-fedavg"]
    noise: Literal["server", "clients", "local"] = Field(
        default="server",
        description="Who adds it: the server, the clients each a share of it, or each client all of it.",
    )
    secret_cohort: bool = Field(
        default=False, description="Draw cohorts in secret and count on nobody's knowing them; noise by the server."
    )
    adaptive: AdaptiveKeys | None = Field(default=None, description="Let the clip follow the updates' norms.")

    @model_validator(mode="after")
    def _the_server_adds_noise(self) -> Self:
        for name, wanted in (("secret_cohort", self.secret_cohort), ("adaptive", self.adaptive is not None)):
            if wanted and self.noise != "server":
                raise ValueError(f"{name}: goes with noise = 'server'")
        return self


class RqmPrivacy(_Privacy):
    """Each client is hidden by the levels of the uplink's codec `rqm`."""

    mechanism: Literal["rqm"]
    trust: Literal["local", "central"] = Field(
        default="local", description="Whether the server is not trusted, or sees levels and shows their sum alone."
    )


class DpLoraPaper(_Gaussian):
    """DP-LoRA as published (Liu et al., 2023): the gradient of one batch, clipped as a whole, noised, one step."""

    mechanism: Literal["dp-lora-paper"]


PrivacySection = Annotated[DpSgd | DpFedAvg | RqmPrivacy | DpLoraPaper, Field(discriminator="mechanism")]


def steps_per_round(section: DpSgd, local_epochs: int) -> int:
    """Return how many batches are drawn in a round: as many as have `local_epochs` times the examples on average."""
    return max(1, round(local_epochs / section.sampling))

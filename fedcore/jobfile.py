"""The job file: one TOML file that describes one training run, checked as a whole before anything starts.

Sections that name a plugin (task, adapter, codec stages, rule, server optimiser) keep every further key as a parameter
of that plugin; who runs the plugin checks them: the server its rule, codecs and optimiser, the client task and adapter.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from fedcore.errors import InvalidInput, JobFileError
from fedcore.names import NAME_PATTERN
from fedcore.privacy import PrivacySection
from fedcore.validation import problems_of

MAX_JOB_BYTES: Final = 64 * 1024

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class _Plugin(BaseModel):
    """A plugin's name and, under any other key, its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    __pydantic_extra__: dict[str, JsonValue]

    @property
    def params(self) -> dict[str, JsonValue]:
        """The section's keys that belong to the plugin."""
        return dict(self.__pydantic_extra__)

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        """Refuse what `Job.to_json` could not write, such as integers of more than 4300 digits."""
        for key, value in self.__pydantic_extra__.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{key[:80]!r} cannot be written as JSON: {error}") from error
        return self


class JobSection(_Section):
    """What is trained, for how long."""

    name: Name = Field(description="Name of the run, shown everywhere.")
    rounds: int = Field(ge=1, le=1_000_000, description="How many versions to compute after version 0.")
    seed: int = Field(default=0, ge=0, lt=2**53, description="Every random choice of the job follows from it.")
    description: str = Field(default="", max_length=2000, description="Goes into the model card.")
    method: Name | None = Field(default=None, description="A known pair of adapter and rule, instead of their names.")
    base_digest: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Only clients whose base model has this digest take part; default: that of the first one.",
    )


class TaskSection(_Plugin):
    """The client-side task, by name, with its parameters."""

    name: Name = Field(description="A task that the clients have installed.")
    data: str = Field(default="", max_length=2000, description="What the data is, in words, for the model card.")


class AdapterSection(_Plugin):
    """Which weights are trained."""

    name: Name = Field(default="full", description="full, lora, or an installed adapter.")


class TrainingSection(_Section):
    """How a client trains on its own data between download and upload."""

    local_epochs: int = Field(default=1, ge=1, le=10_000, description="Passes over the client's training data.")
    batch_size: int = Field(default=32, ge=1, le=1_000_000, description="Examples in one step.")
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="The client's optimiser; starts fresh each round."
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=100, description="Of the client's optimiser.")
    weight_decay: float = Field(default=0.0, ge=0, le=100, description="Of the client's optimiser.")
    max_grad_norm: float | None = Field(default=None, gt=0, description="Clip each step's gradient to this L2 norm.")


class CodecStage(_Plugin):
    """One stage of a pipeline."""

    codec: Name = Field(description="An installed codec.")


class ErrorFeedbackSection(_Section):
    """What encoding left out of a client's update is added to its next one."""

    decay: float = Field(
        default=1.0, gt=0, le=1, description="What was left out is multiplied by this for each version missed."
    )
    max_age: int = Field(
        default=100, ge=1, le=1_000_000, description="Versions after which what was left out is forgotten."
    )


class CompressionSection(_Section):
    """What crosses the wire: a preset, or the stages written out."""

    preset: Name | None = Field(default=None, description="A known pair of pipelines, instead of all keys below.")
    uplink: list[CodecStage] = Field(
        default_factory=lambda: [CodecStage(codec="raw")],
        min_length=1,
        max_length=8,
        description="Client to server.",
    )
    downlink: list[CodecStage] = Field(
        default_factory=lambda: [CodecStage(codec="raw")],
        min_length=1,
        max_length=8,
        description="Server to client.",
    )
    error_feedback: ErrorFeedbackSection | None = Field(
        default=None, description="Clients keep what encoding left out, and add it to their next update."
    )

    @model_validator(mode="after")
    def _preset_stands_alone(self) -> Self:
        # By value: a job that went through JSON has every key.
        fields = type(self).model_fields
        also = [name for name in fields if getattr(self, name) != fields[name].get_default(call_default_factory=True)]
        if self.preset is not None and also != ["preset"]:
            rest = ", ".join(name for name in also if name != "preset")
            raise ValueError(f"preset {self.preset!r} stands for the whole section, so it goes without {rest}")
        return self


class AggregatorSection(_Plugin):
    """How updates become one step, and what an update may look like."""

    rule: Name = Field(default="weighted-mean", description="An installed aggregation rule.")
    max_examples: int = Field(
        default=1_000_000, ge=1, le=2**31, description="An update's weight is its sample count, capped here."
    )
    max_abs: float = Field(
        default=64.0,
        gt=0,
        le=2**40,
        description="An update with a larger value is rejected; bounds the exact sum.",
    )


class ServerOptimizerSection(_Plugin):
    """What the server does with the aggregated step."""

    name: Name = Field(default="none", description="none, momentum, adam, yogi, adagrad, or an installed one.")


class ScheduleSection(_Section):
    """Who takes part in a version, and when it closes."""

    cohort: int = Field(ge=1, le=1_000_000, description="Clients wanted for a version.")
    over_select: float = Field(
        default=1.0, ge=1, le=10, description="Assign this many times `cohort` clients if there are so many."
    )
    buffer: int | None = Field(
        default=None, ge=1, description="Accepted updates that close a version at once; default: cohort."
    )
    quorum: int | None = Field(
        default=None,
        ge=1,
        description="Accepted updates that are enough at the deadline; default: half of buffer, rounded up.",
    )
    deadline_s: float = Field(default=600.0, ge=0.001, le=7 * 86400, description="Seconds a version stays open.")
    max_retries: int = Field(
        default=10, ge=0, le=1_000_000, description="Abandoned tries in a row after which the job fails."
    )

    @property
    def updates_to_close(self) -> int:
        """Accepted updates that close a version at once."""
        return self.cohort if self.buffer is None else self.buffer

    @property
    def updates_at_deadline(self) -> int:
        """Accepted updates that are enough when the deadline comes."""
        return math.ceil(self.updates_to_close / 2) if self.quorum is None else self.quorum

    @property
    def clients_to_assign(self) -> int:
        """Clients that get work for a version when so many are there."""
        return math.ceil(self.cohort * self.over_select - 1e-9)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.updates_to_close > self.clients_to_assign:
            raise ValueError(
                f"buffer {self.updates_to_close} can never fill: at most {self.clients_to_assign} clients are assigned"
                " (cohort x over_select)"
            )
        if self.updates_at_deadline > self.updates_to_close:
            raise ValueError(f"quorum {self.updates_at_deadline} is above buffer {self.updates_to_close}")
        return self


class Job(_Section):
    """A whole job file."""

    job: JobSection
    task: TaskSection
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    compression: CompressionSection = Field(default_factory=CompressionSection)
    aggregator: AggregatorSection = Field(default_factory=AggregatorSection)
    server_optimizer: ServerOptimizerSection = Field(default_factory=ServerOptimizerSection)
    schedule: ScheduleSection
    privacy: PrivacySection | None = Field(default=None, description="What is hidden, how, and how much of it.")

    def to_json(self) -> bytes:
        """Return the canonical form that is journaled and sent: sorted keys, no spaces, ASCII."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode("ascii")

    @staticmethod
    def from_json(data: bytes) -> Job:
        """Read what `to_json` wrote; the input is hostile.

        Raises:
            JobFileError: it is too long, not JSON, or not a valid job.
        """
        source = "job"
        if len(data) > MAX_JOB_BYTES:
            raise JobFileError(source, [f"{len(data)} bytes, at most {MAX_JOB_BYTES}"])
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise JobFileError(source, [f"not JSON: {error}"]) from error
        return parse_job(tree, source)


def load_job(path: Path) -> Job:
    """Read and check a job file.

    Raises:
        JobFileError: the file cannot be read, is not TOML, or has keys that are unknown or out of bounds, all at once.
    """
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JOB_BYTES + 1)
    except OSError as error:
        raise JobFileError(source, [f"cannot be read: {error.strerror}"]) from error
    if len(data) > MAX_JOB_BYTES:
        raise JobFileError(source, [f"more than {MAX_JOB_BYTES} bytes"])
    try:
        tree = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: bad TOML or UTF-8, and integers of over 4300 digits
        raise JobFileError(source, [f"not TOML: {error}"]) from error
    _check_shorthands(tree, source)
    return parse_job(tree, source)


def _check_shorthands(tree: dict[str, Any], source: str) -> None:
    """Refuse a key beside the word that stands for it: in a file one sees whether it was written."""
    job, compression = tree.get("job"), tree.get("compression")
    if isinstance(compression, dict) and "preset" in compression and len(compression) > 1:
        others = ", ".join(sorted(compression.keys() - {"preset"}))
        raise JobFileError(source, [f"compression: preset stands for the whole section, so it goes without {others}"])
    if isinstance(job, dict) and "method" in job:
        for where, key in (("adapter", "name"), ("aggregator", "rule")):
            if isinstance(section := tree.get(where), dict) and key in section:
                raise JobFileError(source, [f"job.method: stands for {where}.{key} too, so it goes without it"])


def parse_job(tree: Any, source: str) -> Job:
    """Turn a parsed tree into a job, its method written out.

    Raises:
        JobFileError: with one line for every problem: key path, value, and what would be right.
    """
    from fedcore.methods import expand_method  # which needs the job's sections

    try:
        job = Job.model_validate(tree)
    except ValidationError as error:
        raise JobFileError(source, problems_of(error, Job, tree)) from error
    try:
        job = expand_method(job)
    except InvalidInput as error:
        raise JobFileError(source, [f"job.method: {error}"]) from error
    num_bytes = len(job.to_json())  # escapes and defaults can make it longer than the file was
    if num_bytes > MAX_JOB_BYTES:
        raise JobFileError(source, [f"{num_bytes} bytes as JSON, at most {MAX_JOB_BYTES}"])
    return job


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema of the job file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}

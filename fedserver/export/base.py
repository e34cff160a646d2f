"""What goes into an export, what comes out, and how its files are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeAlias

from fedcore.adapters import PEFT_ADAPTERS
from fedcore.jobfile import Job
from fedcore.layout import Layout

CARD_FILE: Final = "README.md"
PLOT_FILE: Final = "rounds.png"
MODEL_FILE: Final = "model.safetensors"
ADAPTER_FILE: Final = "adapter_model.safetensors"
"""The name that peft looks for, as is the next one."""
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"

MERGED_FILE: Final = "merged_files.json"
"""A list of the files that came with a merged model: only what is on it was written by us."""

FILES: Final = frozenset({CARD_FILE, PLOT_FILE, MODEL_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, MERGED_FILE})
"""Every file that an export may hold, besides a merged model's; a folder with anything else in it is never replaced."""

State: TypeAlias = bytes | bytearray | memoryview
"""A version's values: raw little-endian float32."""


class Format(StrEnum):
    """What an export is to be.

    Attributes:
        PEFT: an adapter for the `peft` package.
        MERGED: a whole model, the base's files with what was trained in its place.
        WEIGHTS: the trained tensors, and nothing else.
    """

    PEFT = "peft"
    MERGED = "merged"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Exportable:
    """One version of a job, and the way there.

    Attributes:
        federation: the federation's name.
        job_id: the job's permanent name on that server.
        job: its job file.
        layout: where each tensor lies in the state.
        version: which version; 0 is what training began with.
        state_sha256: SHA-256 (hex) of the version's trained values, without the basis.
        history: `fedserver.status.history_of` the job: a row for each version, the oldest first. Rows after
            `version` are ignored.
        basis_sha256: of what the start of the job has set for good; None: nothing.
        base_digest: of the base model's frozen weights; None: not known, or none is frozen.
        adapter_sha256: of the PEFT weights that version 0 has the values of; None: none.
        privacy: what the job has spent (docs/status.md, `privacy`); None: it is not private.
        changes: what has led to the frozen matrices, the oldest first (`fedcore.changes`); their digests were compared.
    """

    federation: str
    job_id: str
    job: Job
    layout: Layout
    version: int
    state_sha256: str
    history: list[dict[str, Any]]
    basis_sha256: str | None = None
    base_digest: str | None = None
    adapter_sha256: str | None = None
    changes: Sequence[bytes] = ()
    privacy: dict[str, Any] | None = None

    @property
    def is_lora(self) -> bool:
        """Whether its adapter adds low-rank updates, which peft knows."""
        return self.job.adapter.name in PEFT_ADAPTERS

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history up to the version."""
        return [row for row in self.history if row["version"] <= self.version]


@dataclass(frozen=True)
class Exported:
    """An export on disk.

    Attributes:
        folder: where it lies.
        files: every file in it.
        weights: the safetensors file; of several, their index.
        model_card: the Markdown file.
        adapter: the folder to give to peft; None for other formats.
        plot: the picture of the rounds; None where matplotlib is not installed.
    """

    folder: Path
    files: tuple[Path, ...]
    weights: Path
    model_card: Path
    adapter: Path | None
    plot: Path | None

"""What a client's updates are made with: the contract between what goes over the wire and what computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from fedclient.trainer import Evaluation, Gradient, Trained, Work
from fedcore.draws import PrivateDraws
from fedcore.layout import Layout, Vector


class Worker(Protocol):
    """What computes; `fedclient.trainer.LocalWorker` says what each method promises."""

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        """Return layout and values of version 0."""
        ...

    def layout(self, work: Work) -> Layout:
        """Return the job's layout."""
        ...

    def train(
        self,
        work: Work,
        base_D: Vector,
        *,
        draws: PrivateDraws | None = None,
        progress: Callable[[float], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Trained:
        """Train from `base_D`, which is the caller's again after the call, as is what is returned after the next."""
        ...

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        """Measure `base_D`."""
        ...

    def gradient(
        self,
        work: Work,
        base_D: Vector,
        samples: int,
        *,
        draws: PrivateDraws | None = None,
        stop: threading.Event | None = None,
    ) -> Gradient:
        """Return the loss's gradient at `base_D`, summed over some training examples."""
        ...

    def basis_digest(self, work: Work) -> str:
        """Return the SHA-256 (hex) of the basis that is set; "" if the job has none."""
        ...

    def base_digest(self, work: Work) -> str | None:
        """Return the digest of what is frozen of the base model; None: nothing is."""
        ...

    def set_basis(self, work: Work, basis: Vector) -> None:
        """Set what the start of the job has fixed."""
        ...

    def change_base(self, work: Work, change: memoryview) -> None:
        """Change the frozen matrices once more."""
        ...

    def restore_base(self, work: Work) -> None:
        """Make the frozen matrices what they were in the beginning."""
        ...

    def forget(self, job_id: str) -> None:
        """Drop what is kept for a job."""
        ...

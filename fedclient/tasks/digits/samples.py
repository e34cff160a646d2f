"""scikit-learn's 1797 handwritten digits (8 × 8 pixels), and who holds which.

600 of them were used to train the base model (`pretrain.py`) and never reach a client; the other 1197 are dealt out
to the clients, each to exactly one.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998;
the copy inside scikit-learn.

Shape legend: N samples, 8 × 8 pixels.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigError
from fedcore.rng import stream

NUM_CLASSES: Final = 10
NUM_BASE_SAMPLES: Final = 600
MIN_SHARD_SAMPLES: Final = 4
MAX_SHARDS: Final = 200

# Which samples belong to the base model is a fact about the committed weights, not a choice of a job.
_BASE_SPLIT_SEED: Final = 2025

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Images (N × 8 × 8, 0 is paper and 1 is ink) and their digits (N)."""

    images: Images
    labels: Labels


def base_samples() -> Samples:
    """Return the samples that the base model is trained on."""
    return _take(_split()[:NUM_BASE_SAMPLES])


def client_samples() -> Samples:
    """Return the samples that the clients hold between them."""
    return _take(_split()[NUM_BASE_SAMPLES:])


def deal(labels: Labels, num_shards: int, alpha: float | None, seed: int) -> list[npt.NDArray[np.int64]]:
    """Return for each shard the rows that it holds; every row goes to exactly one shard.

    Args:
        labels: N class labels.
        num_shards: how many shards.
        alpha: each class is spread over the shards in proportions drawn from Dirichlet(alpha), so a small value means
            skewed labels and uneven sizes; None deals evenly.
        seed: the draw.

    A shard that came out with fewer than `MIN_SHARD_SAMPLES` gets samples from the largest ones.

    Raises:
        ValueError: there are not enough samples for that minimum.
    """
    if len(labels) < num_shards * MIN_SHARD_SAMPLES:
        raise ValueError(f"{len(labels)} samples are too few for {num_shards} shards of {MIN_SHARD_SAMPLES}")
    generator = stream(seed, "digits", "deal")
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    for digit in range(NUM_CLASSES):
        rows = generator.permutation(np.flatnonzero(labels == digit))
        shares = np.full(num_shards, 1 / num_shards)
        if alpha is not None:
            shares = generator.dirichlet(np.full(num_shards, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for shard, part in zip(shards, np.split(rows, cuts), strict=True):
            shard.extend(part.tolist())
    while len(smallest := min(shards, key=len)) < MIN_SHARD_SAMPLES:
        smallest.append(max(shards, key=len).pop())
    return [np.sort(np.array(shard, dtype=np.int64)) for shard in shards]


def _take(rows: npt.NDArray[np.int64]) -> Samples:
    images, labels = _read()
    return Samples(images[rows], labels[rows])


def _split() -> npt.NDArray[np.int64]:
    return stream(_BASE_SPLIT_SEED, "digits", "base").permutation(len(_read()[1]))


@cache
def _read() -> tuple[Images, Labels]:
    """Read the file inside scikit-learn without importing it.

    `sklearn.datasets.load_digits` reads the same file, but importing scikit-learn and SciPy takes more than a
    second, which five clients starting together on two cores would all pay.
    """
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ConfigError("the task 'digits' needs scikit-learn for its data: pip install 'roundtable[client]'")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except OSError as error:
        raise ConfigError(f"cannot read the digits of scikit-learn: {error}") from error
    return table[:, :64].reshape(-1, 8, 8) / np.float32(16), table[:, 64].astype(np.int64)

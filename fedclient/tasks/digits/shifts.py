"""What is different about each client's digits: shard i sees them through shift i of the list, and around again.

Shape legend: N images of 8 × 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from fedclient.tasks.digits.samples import Images

Shift = Callable[[Images, np.random.Generator], Images]


def _invert(images: Images, generator: np.random.Generator) -> Images:
    return 1 - images


def _rotate(images: Images, generator: np.random.Generator) -> Images:
    return np.rot90(images, axes=(1, 2))


def _mirror(images: Images, generator: np.random.Generator) -> Images:
    return images[:, :, ::-1]


def _add_noise(images: Images, generator: np.random.Generator) -> Images:
    return images + generator.normal(0, 0.4, images.shape).astype(np.float32)


def _transpose(images: Images, generator: np.random.Generator) -> Images:
    return images.transpose(0, 2, 1)


def _blur(images: Images, generator: np.random.Generator) -> Images:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    blurred: Images = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / np.float32(9)
    return blurred


SHIFTS: Final[dict[str, Shift]] = {
    "inversion": _invert,
    "rotation": _rotate,
    "mirror": _mirror,
    "noise": _add_noise,
    "transposition": _transpose,
    "blur": _blur,
}


def shift_name(shard: int) -> str:
    """Return which shift a shard sees its digits through."""
    return list(SHIFTS)[shard % len(SHIFTS)]


def apply_shift(images: Images, shard: int, generator: np.random.Generator) -> Images:
    """Return the images as shard `shard` sees them; `generator` is drawn from by the noise alone."""
    return np.ascontiguousarray(SHIFTS[shift_name(shard)](images, generator))

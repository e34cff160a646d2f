"""Files of a base model, as somebody else wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fedcore.errors import InvalidInput
from fedserver.export.factors import Update
from fedserver.export.merged import Merge, merged_files
from fedserver.export.stored import open_base
from fedserver.export.weights import safetensors_file
from tests.fuzz.target import BOMBS, Target, check_refusal, scratch_folder
from tests.support.exports import make_job

FOLDER: Final = scratch_folder()
MODULE: Final = "h.0.c_proj"
UPDATE: Final = Update(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32), 2.0)


def read_base(data: bytes) -> None:
    """A safetensors file, and after a NUL the index or, if it is none, the configuration beside it."""
    weights, _, beside = data.partition(b"\0\0\0\0NEXT")
    (FOLDER / "model.safetensors").write_bytes(weights)
    (FOLDER / "config.json").write_bytes(beside or b"{}")
    try:
        base = open_base(FOLDER)
        copied = b"".join(safetensors_file([s.as_entry(key) for key, s in base.tensors.items()], {}))
        merge = Merge.of(base, {MODULE: UPDATE}, {})
        changed = b"".join(merged_files(merge, make_job(), {})["model.safetensors"])
    except InvalidInput as error:
        check_refusal(error)
        return
    assert len(copied) <= len(changed)
    assert sum(stored.num_bytes for stored in base.tensors.values()) < len(changed)


def bases() -> Iterator[bytes]:
    weight = np.arange(6, dtype=np.float32)
    rest: dict[str, npt.NDArray[Any]] = {
        "norm.weight": np.ones(3, np.float16),
        "steps": np.zeros((), np.int64),
        "none": np.zeros((0, 3), np.float32),
    }
    for shape in ((2, 3), (3, 2), (6, 1)):
        yield save({f"{MODULE}.weight": weight.reshape(shape), **rest})
    yield save({"0.c_proj.weight": weight.reshape(2, 3)}) + b"\0\0\0\0NEXT" + b'{"model_type": "gpt2"}'
    yield save({"wte.weight": weight.reshape(2, 3)}) + b"\0\0\0\0NEXT" + b"[1]"
    for row in (
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 25]},
        {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]},
        {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F4", "shape": [1 << 70], "data_offsets": [0, True]},
    ):
        header = json.dumps({f"{MODULE}.weight": row, "__metadata__": {"a": "b"}}).encode()
        yield len(header).to_bytes(8, "little") + header + bytes(24)
    yield from (len(bomb).to_bytes(8, "little") + bomb for bomb in BOMBS)


TARGETS: Final = (Target("base-model", read_base, bases, runs=3_000),)

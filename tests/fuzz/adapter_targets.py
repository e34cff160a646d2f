"""Adapters that jobs start from: the weights and the configuration, as an operator sends them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from safetensors.numpy import save

from fedcore.adapters import PEFT_PREFIX
from fedcore.errors import InvalidInput
from fedserver.initial.adapter import GivenValues, check_adapter
from fedserver.initial.tensors import TensorFile
from tests.fuzz.target import BOMBS, Target, check_refusal
from tests.support.adapters import config, factors, job_with, layout_of

JOB: Final = job_with()
LAYOUT: Final = layout_of()
WEIGHTS: Final = memoryview(save(factors()))


def read_weights(data: bytes) -> None:
    try:
        file = TensorFile(memoryview(data))
        for name, tensor in file.tensors.items():
            assert tensor.num_values <= len(data)
            assert file.values(name, 0, tensor.num_values).size == tensor.num_values
        check_adapter(JOB, config(), memoryview(data))
        GivenValues(file, LAYOUT).fill(found := np.full(LAYOUT.num_values, np.nan, np.float32), 0)
    except InvalidInput as error:
        check_refusal(error)
        return
    assert np.isfinite(found).all(), "what was checked fills every value"


def read_config(data: bytes) -> None:
    try:
        check_adapter(JOB, data, WEIGHTS)
    except InvalidInput as error:
        check_refusal(error)


def weights() -> Iterator[bytes]:
    yield bytes(WEIGHTS)
    yield save({name: value.astype(np.float16) for name, value in factors().items()})
    yield save({name: value.astype(np.float64) for name, value in factors(rank=1).items()})
    yield save({PEFT_PREFIX + "head.weight": np.ones(3, np.float32)})
    yield from (len(bomb).to_bytes(8, "little") + bomb for bomb in BOMBS)


def configs() -> Iterator[bytes]:
    yield config()
    yield config(rank_pattern={"a": 2}, use_dora=True, init_lora_weights="pissa", bias="all", lora_bias=[1])
    yield from BOMBS


TARGETS: Final = (
    Target("adapter-weights", read_weights, weights, max_bytes=1 << 14, runs=10_000),
    Target("adapter-config", read_config, configs, runs=10_000),
)

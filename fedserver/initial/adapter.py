"""A PEFT adapter as the start of a job: whether it fits, and its values in the place of those that version 0 has."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from fedcore.adapters import ADAPTER_GROUP, PEFT_PREFIX, PEFT_STARTS, LoraParams, is_lora_factor
from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedcore.layout import BASIS_GROUP, Layout, Vector
from fedcore.params import parse_params
from fedserver.initial.tensors import StoredTensor, TensorFile

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_ADAPTER_BYTES: Final = 1 << 36
"""Of the weights; they lie on the disk."""
MAX_SHOWN: Final = 5
"""Tensors that an error names."""

_HARMLESS: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # with eva_config, loftq_config and lora_ga_config: how init_lora_weights did its work
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Keys of `adapter_config.json` that change nothing of what A and B mean: which layers have them, the tensors say."""
_INITIAL: Final = ("gaussian", "eva", "orthogonal")
"""Ways of `init_lora_weights`, besides true and false, that leave the base model as it is."""
_REASONS: Final = {
    "alpha_pattern": "layers differ in scale, in a job all have one",
    "lora_bias": "the factors have biases, in a job they have none",
    "rank_pattern": "layers differ in rank, in a job all have one",
    "use_dora": "it has magnitudes besides A and B",
    "use_rslora": "its scale is lora_alpha / sqrt(r), a job's is alpha / rank",
}


class GivenAdapter(NamedTuple):
    """An adapter that a job is to start from: the content of `adapter_config.json`, and the SHA-256 of its weights."""

    config: bytes
    digest: str


def check_adapter(job: Job, config: bytes, weights: memoryview) -> None:
    """Check what can be known before the job's own tensors are.

    Args:
        job: the job.
        config: `adapter_config.json`.
        weights: `adapter_model.safetensors`; every value is looked at.

    Raises:
        InvalidInput: it is not what the job trains; a line for each problem.
    """
    if job.adapter.name not in PEFT_STARTS:
        raise InvalidInput(
            f"adapter.name {job.adapter.name!r}: a job cannot start from a PEFT adapter, but those of"
            f" {', '.join(sorted(PEFT_STARTS))} can"
        )
    params = parse_params(LoraParams, job.adapter.params, "adapter")
    if problems := [*_config_problems(config, params)]:
        raise InvalidInput("\n".join(f"adapter_config.json: {problem}" for problem in problems))
    try:
        file = TensorFile(weights)
        if problems := [*_tensor_problems(file, params.rank)]:
            raise InvalidInput(_shown(problems, "; "))
        file.check_finite()
    except InvalidInput as error:
        raise InvalidInput(f"adapter_model.safetensors: {error}") from error


def _config_problems(data: bytes, params: LoraParams) -> Iterable[str]:
    if len(data) > MAX_CONFIG_BYTES:
        yield f"more than {MAX_CONFIG_BYTES} bytes"
        return
    try:
        config: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        yield f"not JSON: {str(error)[:200]}"
        return
    if not isinstance(config, dict) or config.pop("peft_type", None) != "LORA":
        yield "peft_type: expected 'LORA'"
        return
    for key, word, wanted in (("r", "rank", params.rank), ("lora_alpha", "alpha", params.alpha)):
        # A default is peft's own business: what is not written is not guessed.
        if isinstance(found := config.pop(key, None), bool) or found != wanted:
            yield f"{key} {_text(found)}: the job's adapter.{word} is {wanted:g}"
    if (bias := config.pop("bias", "none")) != "none":
        yield f"bias {_text(bias)}: biases are trained too, in a job they are not"
    how = config.pop("init_lora_weights", True)
    if how is not None and not isinstance(how, bool) and how not in _INITIAL:
        yield f"init_lora_weights {_text(how)}: it has changed the base model, and clients have it unchanged"
    for key, value in config.items():
        if value and key not in _HARMLESS:
            reason = _REASONS.get(key, "this changes what the adapter is, and no job can do it")
            yield f"{_text(key)[1:-1]} {_text(value)}: {reason}"


def _tensor_problems(file: TensorFile, rank: int) -> Iterable[str]:
    names = {_name(key) for key in file.tensors}
    if not any(map(is_lora_factor, names)):
        yield f"no key is that of a factor, such as {PEFT_PREFIX}LAYER.lora_A.weight"
    for key, tensor in file.tensors.items():
        name = _name(key)
        stem, _, factor = name.removesuffix(".weight").rpartition(".")
        if not key.startswith(PEFT_PREFIX):
            yield f"{key}: does not begin with {PEFT_PREFIX}"
        elif not is_lora_factor(name):
            if "lora_" in name:  # anything else may be a weight that the job trains beside the factors
                yield f"{key}: no factor of a linear layer, lora_A.weight or lora_B.weight"
        elif f"{stem}.{'lora_B' if factor == 'lora_A' else 'lora_A'}.weight" not in names:
            yield f"{key}: the layer's other factor is missing"
        elif len(tensor.shape) != 2 or 0 in tensor.shape or tensor.shape[factor == "lora_B"] != rank:
            yield f"{key}: shape {tensor.shape}, of rank {rank} it is {'(m, r)' if factor == 'lora_B' else '(r, n)'}"


class GivenValues:
    """The values of a given adapter in the order of a job's layout.

    Every factor of the layout comes from the file. What is trained beside them comes from there if the file has it.

    Raises:
        InvalidInput: a tensor is missing, superfluous or of another shape; the text lists some.
    """

    def __init__(self, file: TensorFile, layout: Layout) -> None:
        self._file = file
        stored: dict[str, StoredTensor] = {_name(key): tensor for key, tensor in file.tensors.items()}
        needed = [t.name for t in layout.tensors if t.group in (ADAPTER_GROUP, BASIS_GROUP)]
        known = {tensor.name: tensor.shape for tensor in layout.tensors}
        parts = {
            "missing": [name for name in needed if name not in stored],
            "not in the job's model": [name for name in stored if name not in known],
            "of another shape": [
                f"{name} {tensor.shape}, in the job {known[name]}"
                for name, tensor in stored.items()
                if name in known and tensor.shape != known[name]
            ],
        }
        if problems := [f"{what}: {_shown(found)}" for what, found in parts.items() if found]:
            raise InvalidInput("; ".join(problems))
        self._tensors = [tensor for tensor in layout.tensors if tensor.name in stored]
        self._offsets = [tensor.offset for tensor in self._tensors]

    def fill(self, values_D: Vector, start: int) -> None:
        """Replace what the file has of `values_D`, which are the layout's values from index `start` on."""
        end = start + values_D.size
        for tensor in self._tensors[max(0, bisect_right(self._offsets, start) - 1) :]:
            if tensor.offset >= end:
                break
            left, right = max(start, tensor.offset), min(end, tensor.offset + tensor.num_values)
            if left < right:
                key, place = PEFT_PREFIX + tensor.name, tensor.offset
                values_D[left - start : right - start] = self._file.values(key, left - place, right - place)


def _name(key: str) -> str:
    return key.removeprefix(PEFT_PREFIX)


def _text(value: object) -> str:
    """Return a value as JSON, ASCII only, shortened."""
    return json.dumps(value)[:80]


def _shown(items: list[str], mark: str = ", ") -> str:
    more = f" and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else ""
    return mark.join(items[:MAX_SHOWN]) + more

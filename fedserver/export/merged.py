"""A whole model: the base's files copied tensor by tensor, with what the job has trained in its place.

No torch, and no more memory than one tensor takes. Shape legend: W is m × n = outputs × inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedcore.layout import TensorSpec, Vector
from fedserver.export.base import MERGED_FILE, MODEL_FILE
from fedserver.export.factors import Update
from fedserver.export.folder import Content
from fedserver.export.stored import INDEX_FILE, Base, Stored, prefix_of, reading
from fedserver.export.weights import CHUNK_VALUES, Entry, converted, entry_of, safetensors_file

CONV1D_MODELS: Final = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Model types of transformers whose layers of these names hold their weight as inputs × outputs."""
CONV1D_LAYERS: Final = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})

_COPIED: Final = frozenset({".jinja", ".json", ".model", ".txt"})
_COPIED_NAMES: Final = frozenset({"LICENSE", "NOTICE"})
_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Merge:
    """What becomes of a base.

    Attributes:
        base: its files.
        updates: by the paths of the adapted modules.
        whole: what was trained whole, by its name in the model.
        prefix: what the model's names have in front of the base's.
    """

    base: Base
    updates: Mapping[str, Update]
    whole: Mapping[str, tuple[TensorSpec, Vector]]
    prefix: str

    @staticmethod
    def of(base: Base, updates: Mapping[str, Update], whole: Mapping[str, tuple[TensorSpec, Vector]]) -> Merge:
        """Find in `base` what the job has trained.

        Raises:
            InvalidInput: something is not there, has another shape or dtype, or lies there twice.
        """
        made = Merge(base, updates, whole, prefix_of([*(f"{path}.weight" for path in updates), *whole], base))
        for path in updates:
            if (stored := made.find(f"{path}.weight")) is None:
                some = ", ".join(list(base.tensors)[:5])
                raise InvalidInput(f"base {base.folder}: has no {path}.weight, which the job adapts; it has {some}, …")
            made.is_transposed(path, stored)
        new = [name for name in whole if made.find(name) is None]
        for name, (tensor, _) in whole.items():
            stored = made.find(name)
            if stored is None:
                continue
            stored.check_float()
            if stored.shape != tensor.shape:
                raise InvalidInput(
                    f"base {base.folder}: {stored.key} has shape {stored.shape}, the job's is {tensor.shape}"
                )
        for name in new:
            made.check_new(name)
        made.check_twins()
        return made

    def find(self, name: str) -> Stored | None:
        """Return the base's tensor that is called `name` in the model."""
        return self.base.tensors.get(name.removeprefix(self.prefix)) if name.startswith(self.prefix) else None

    def is_transposed(self, path: str, stored: Stored) -> bool:
        """Return whether an adapted weight lies as inputs × outputs.

        Raises:
            InvalidInput: it is not a weight of the module's shape, or not of a floating-point type, or cannot be told.
        """
        stored.check_float()
        (m, _), (_, n) = self.updates[path].b_mr.shape, self.updates[path].a_rn.shape
        if stored.shape not in {(m, n), (n, m)}:
            raise InvalidInput(f"base {self.base.folder}: {stored.key} has shape {stored.shape}, the job's is {(m, n)}")
        if m != n:
            return stored.shape == (n, m)
        if path.rpartition(".")[2] not in CONV1D_LAYERS:
            return False
        kind = self.base.config.get("model_type")
        if not isinstance(kind, str):
            raise InvalidInput(
                f"base {self.base.folder}: config.json with model_type is missing, and only that tells which way the"
                f" square weight {stored.key} lies"
            )
        return kind in CONV1D_MODELS

    def check_new(self, name: str) -> None:
        """Check that a tensor that the base lacks is a head of its own, and not something by another name.

        Raises:
            InvalidInput: it is in a block, or the base has other tensors of its module.
        """
        module = name.rpartition(".")[0]
        beside = [key for key in self.base.tensors if (self.prefix + key).startswith(module + ".")]
        if not module or beside or any(part.isdecimal() for part in name.split(".")):
            has = f" but {beside[0]}" if beside else ""
            raise InvalidInput(f"base {self.base.folder}: has no {name}, which the job trained{has}")

    def check_twins(self) -> None:
        """Check that no tensor that was trained whole stays in the base under a second name, as a tied one may.

        Raises:
            InvalidInput: there is one with the same values.
        """
        if self.base.config.get("tie_word_embeddings") is False:
            return
        trained = [stored for stored in map(self.find, self.whole) if stored is not None and len(stored.shape) > 1]
        shapes = {(stored.code, stored.shape) for stored in trained}
        keys = {stored.key for stored in trained}
        alike = [s for key, s in self.base.tensors.items() if key not in keys and (s.code, s.shape) in shapes]
        if not alike:
            return
        known = {_digest(stored): stored.key for stored in trained}
        for stored in alike:
            if twin := known.get(_digest(stored)):
                raise InvalidInput(
                    f"base {self.base.folder}: {stored.key} holds the same values as {twin}, which the job trained: if"
                    " they are one weight, save the base without the former; else put tie_word_embeddings = false into"
                    " its config.json"
                )

    def entries(self, tensors: Mapping[str, Stored]) -> Iterator[Entry]:
        """Yield what becomes of some of the base's tensors, under their names in the model."""
        for key, stored in tensors.items():
            name = self.prefix + key
            path = name.removesuffix(".weight")
            if name in self.whole:
                yield entry_of(name, stored.dtype, self.whole[name][1])
            elif name.endswith(".weight") and path in self.updates:
                yield self._updated(name, path, stored)
            else:
                yield stored.as_entry(name)

    def new_entries(self) -> Iterator[Entry]:
        """Yield what the base lacks."""
        for name, (tensor, values) in self.whole.items():
            if self.find(name) is None:
                yield entry_of(name, tensor.dtype, values)

    def _updated(self, name: str, path: str, stored: Stored) -> Entry:
        update = self.updates[path]
        left, right = update.b_mr, update.a_rn
        if self.is_transposed(path, stored):
            left, right = right.T, left.T
        step = max(1, CHUNK_VALUES // stored.shape[1])

        def chunks() -> Iterator[memoryview]:
            for first in range(0, stored.shape[0], step):
                weight = stored.rows(first, first + step)
                weight = weight + np.float32(update.scale) * (left[first : first + step] @ right)
                yield converted(weight.reshape(-1), stored.dtype, name)

        return Entry(name, stored.code, stored.shape, stored.num_bytes, chunks)


def merged_files(merge: Merge, job: Job, metadata: Mapping[str, str]) -> dict[str, Content]:
    """Return the files of the merged model, sharded as the base is, with configuration and tokenizer of the base."""
    base = merge.base
    shards: dict[str, list[Entry]] = {}
    for name, tensors in base.files.items():
        shards[name if base.is_sharded else MODEL_FILE] = list(merge.entries(tensors))
    shards[next(reversed(shards))] += merge.new_entries()
    files: dict[str, Content] = {name: safetensors_file(entries, metadata) for name, entries in shards.items()}
    if base.is_sharded:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entries in shards.values() for entry in entries)},
            "weight_map": {entry.key: name for name, entries in shards.items() for entry in entries},
        }
        files[INDEX_FILE] = [_json(index)]
    with reading(base.folder):
        beside = sorted(path for path in base.folder.iterdir() if _is_copied(path))
    for path in beside:
        files[path.name] = _copy(path)
    if base.config:
        files["config.json"] = [_json(base.config | _labels(job))]
    files[MERGED_FILE] = [_json(sorted(files))]
    return files


def _is_copied(path: Path) -> bool:
    is_ours = path.name.endswith(".index.json") or path.name in {MERGED_FILE, "adapter_config.json"}
    return (path.suffix in _COPIED or path.name in _COPIED_NAMES) and not is_ours and path.is_file()


def _labels(job: Job) -> dict[str, object]:
    """Return what a classifier's configuration says of its classes."""
    labels = job.task.params.get("labels")
    if job.task.name != "hf-sequence-classification" or not isinstance(labels, list):
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {n: i for i, n in enumerate(labels)},
    }


def _copy(path: Path) -> Iterator[bytes]:
    with reading(path), path.open("rb") as stream:
        while piece := stream.read(_COPY_BYTES):
            yield piece


def _digest(stored: Stored) -> str:
    digest = hashlib.sha256()
    for piece in stored.pieces():
        digest.update(piece)
    return digest.hexdigest()


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"

"""A model in a folder of safetensors files, read piece by piece and without torch.

The format is described in `fedserver.export.weights`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcore.errors import InvalidInput
from fedcore.layout import Vector
from fedserver.export.weights import CODES, ITEM_BYTES, METADATA_KEY, Entry

INDEX_FILE: Final = "model.safetensors.index.json"
"""Says which of several files holds which tensor, as transformers writes it."""
MAX_JSON_BYTES: Final = 100_000_000
"""The format's own bound of a header."""

_PIECE_BYTES: Final = 1 << 22
_WORDS: Final = {code: word for word, code in CODES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        key: its name there.
        file: which file.
        code: its dtype, as the format calls it.
        shape: its shape.
        start: the file's byte that it begins at.
        num_bytes: how many it has.
    """

    key: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def dtype(self) -> str:
        """The dtype in the words of a layout, of a tensor that `check_float` has passed."""
        return _WORDS[self.code]

    def check_float(self) -> None:
        """Check that the values are of a type that a layout knows.

        Raises:
            InvalidInput: they are not, as quantised weights are not.
        """
        known = ITEM_BYTES.get(_WORDS.get(self.code, ""))
        if known is None or self.num_bytes != math.prod(self.shape) * known:
            raise InvalidInput(
                f"{self.file}: tensor {self.key} is {self.code}, {self.num_bytes} bytes; what is changed has to be one"
                f" of {', '.join(_WORDS)}"
            )

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield bytes `start` to `stop` of the tensor.

        Raises:
            InvalidInput: the file cannot be read, or has become shorter.
        """
        stop = self.num_bytes if stop is None else min(stop, self.num_bytes)
        with reading(self.file), self.file.open("rb") as stream:
            stream.seek(self.start + start)
            while start < stop:
                piece = stream.read(min(_PIECE_BYTES, stop - start))
                if not piece:
                    raise InvalidInput(f"{self.file}: ends within tensor {self.key}")
                start += len(piece)
                yield piece

    def rows(self, first: int, last: int) -> Vector:
        """Return rows `first` to `last` of a matrix as float32; raises like `pieces`."""
        dtype, row_bytes = self.dtype, self.num_bytes // self.shape[0]
        data = b"".join(self.pieces(first * row_bytes, last * row_bytes))
        if dtype == "bfloat16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, "<f4" if dtype == "float32" else "<f2").astype("<f4")
        return values.reshape(-1, *self.shape[1:])

    def as_entry(self, key: str) -> Entry:
        """Return the tensor as it is, for another file, under the name `key`."""
        return Entry(key, self.code, self.shape, self.num_bytes, self.pieces)


@dataclass(frozen=True)
class Base:
    """A model's folder.

    Attributes:
        folder: where it lies.
        files: for each safetensors file its tensors by name.
        is_sharded: whether an index comes with them.
        config: what `config.json` holds; empty if there is none.
    """

    folder: Path
    files: dict[str, dict[str, Stored]]
    is_sharded: bool
    config: dict[str, Any]

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All tensors by name."""
        return {key: stored for tensors in self.files.values() for key, stored in tensors.items()}


def open_base(folder: Path) -> Base:
    """Read which tensors a folder holds: those of the files that its index names, or of its only file.

    Raises:
        InvalidInput: there is no safetensors file, or several without an index, or one is damaged.
    """
    is_sharded = (folder / INDEX_FILE).is_file()
    if is_sharded:
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidInput(f"{folder / INDEX_FILE}: weight_map is missing")
        names = sorted({str(name) for name in weight_map.values()})
        if wrong := [name for name in names if Path(name).name != name]:
            raise InvalidInput(f"{folder / INDEX_FILE}: names {wrong[0][:80]!r}, which is not in the folder")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(names) > 1 and "model.safetensors" in names:
            names = ["model.safetensors"]
        if len(names) != 1:
            found = f"{len(names)} *.safetensors and no {INDEX_FILE}" if names else "no *.safetensors"
            raise InvalidInput(f"base {folder}: holds {found}; name the folder of the model's files")
    config = folder / "config.json"
    files: dict[str, dict[str, Stored]] = {}
    seen: set[str] = set()
    for name in names:
        files[name] = _tensors_of(folder / name)
        if twice := sorted(seen & files[name].keys()):
            raise InvalidInput(f"{folder / name}: tensor {twice[0]} is in another file too")
        seen |= files[name].keys()
    return Base(folder, files, is_sharded, _read_json(config) if config.is_file() else {})


def prefix_of(names: Iterable[str], base: Base) -> str:
    """Return what the names in a model have in front of those in its files: nothing, or one part.

    Where only the inner model was saved, transformers finds `encoder.…` for `bert.encoder.…`.

    Raises:
        InvalidInput: none of `names` is in the files either way, though one is in a numbered block: no new head is.
    """
    names = list(names)
    if not any(name in base.tensors for name in names):
        for part, _, rest in (name.partition(".") for name in names):
            if rest in base.tensors:
                return part + "."
        if any(number.isdecimal() for name in names for number in name.split(".")):
            raise InvalidInput(f"base {base.folder}: has no {names[0]}; it has {', '.join(list(base.tensors)[:5])}, …")
    return ""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an `OSError` within the block into `InvalidInput`: what cannot be read was named by the user."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"{file}: cannot be read: {error.strerror}") from error


def _tensors_of(file: Path) -> dict[str, Stored]:
    with reading(file), file.open("rb") as stream:
        size = file.stat().st_size
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > min(MAX_JSON_BYTES, size - 8):
            raise InvalidInput(f"{file}: no safetensors file: a header of {header_bytes} bytes in a file of {size}")
        header = _parse_json(stream.read(header_bytes), file)
    found: dict[str, Stored] = {}
    for key, row in header.items():
        if key == METADATA_KEY:
            continue
        match row:
            case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                all(type(extent) is int and extent >= 0 for extent in shape)
                and 0 <= begin <= end <= size - 8 - header_bytes
            ):
                found[key] = Stored(key, file, code, tuple(shape), 8 + header_bytes + begin, end - begin)
            case _:
                raise InvalidInput(f"{file}: damaged: tensor {key[:80]!r} has no dtype, shape or place in the file")
    return found


def _read_json(file: Path) -> dict[str, Any]:
    with reading(file), file.open("rb") as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InvalidInput(f"{file}: more than {MAX_JSON_BYTES} bytes")
    return _parse_json(data, file)


def _parse_json(data: bytes, file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file}: damaged: {error}") from error
    if not isinstance(tree, dict):
        raise InvalidInput(f"{file}: damaged: no JSON object")
    return tree

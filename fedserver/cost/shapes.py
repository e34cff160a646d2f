"""The shapes of models' weights, from the tables in `models/` or a table of the user's own."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from fedcore.errors import InvalidInput
from fedcore.names import nearest
from fedcore.params import Params, parse_params

MODELS: Final = ("llama-3.2-3b", "mistral-7b", "gemma-2-9b", "bert-base")
MAX_TABLE_BYTES: Final = 1 << 20

Extent = Annotated[int, Field(ge=1, le=1 << 32)]


class _Row(Params):
    """Something that a model has `count` times; the number of the block, from 0, stands where the path has ``*``."""

    path: str = Field(min_length=1, max_length=256)
    count: int = Field(default=1, ge=1, le=100_000)

    @model_validator(mode="after")
    def _every_path_is_its_own(self) -> Self:
        if self.path.count("*") > 1 or (self.count > 1 and "*" not in self.path):
            raise ValueError(f"{self.path!r}, {self.count} times: one * stands for the number of the block")
        return self

    def paths(self) -> Iterator[str]:
        """Return all of them."""
        return (self.path.replace("*", str(number)) for number in range(self.count))


class Linear(_Row):
    """A linear layer; `path` is the module's.

    Its role: `target` is adapted unless others are named; `head` is trained whole, whatever the rest is; `tied` shares
    its weight with another tensor.
    """

    shape: list[Extent] = Field(min_length=2, max_length=2, description="Out, in.")
    bias: bool = False
    role: Literal["", "target", "head", "tied"] = ""

    def sizes(self) -> dict[str, int]:
        """Return how many values weight and bias have."""
        return {"weight": math.prod(self.shape)} | ({"bias": self.shape[0]} if self.bias else {})


class Other(_Row):
    """Any other parameter; `path` is its own."""

    shape: list[Extent] = Field(max_length=8)


class Model(Params):
    """A table: every parameter of a model."""

    name: str = Field(min_length=1, max_length=64)
    hub: str = Field(default="", max_length=256, description="What the Hugging Face hub calls it.")
    linear: list[Linear] = Field(min_length=1, max_length=10_000)
    other: list[Other] = Field(default=[], max_length=10_000)

    def parameters(self) -> dict[str, int]:
        """Return the number of values of each parameter by its name; what is tied counts under its other name alone."""
        linear = {
            f"{path}.{name}": size
            for row in self.linear
            if row.role != "tied"
            for path in row.paths()
            for name, size in row.sizes().items()
        }
        return linear | {path: math.prod(row.shape) for row in self.other for path in row.paths()}


class Matrix(NamedTuple):
    """An adapted linear layer: m × n = out × in."""

    path: str
    m: int
    n: int


@dataclass(frozen=True)
class Shapes:
    """What of a model is trained.

    Attributes:
        model: its name.
        matrices: the adapted linear layers.
        heads: number of values of each tensor that is trained whole beside them.
        whole: number of values of each parameter that is trained where nothing is adapted.
    """

    model: str
    matrices: tuple[Matrix, ...]
    heads: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def max_rank(self) -> int:
        """The rank that no matrix is too small for."""
        return min(min(matrix.m, matrix.n) for matrix in self.matrices)


def find_model(name: str) -> Model:
    """Return the table of that name, by our name or the hub's, or the one in the file ``….toml``.

    Raises:
        InvalidInput: there is none, or it is no such table.
    """
    if name.endswith(".toml"):
        return _parse(name, _read(Path(name)))
    for known in MODELS:
        model = _parse(known, files("fedserver.cost").joinpath(f"models/{known}.toml").read_bytes())
        if name.lower() in (known, model.hub.lower()):
            return model
    guess = nearest(name.lower(), MODELS)
    hint = f"did you mean {guess!r}? " if guess else ""
    raise InvalidInput(f"model {name[:80]!r}: {hint}known: {', '.join(MODELS)}, or a table of your own, FILE.toml")


def shapes_of(
    model: Model,
    targets: Sequence[str] = (),
    *,
    heads: bool = True,
    beside: Sequence[str] = (),
    alone: Sequence[str] = "*",
) -> Shapes:
    """Return what is trained of `model`.

    Args:
        model: its table.
        targets: shell patterns for the paths of linear layers or their last part, as in a job file; none: the table's.
        heads: whether the table's heads are trained too, except those that `targets` match.
        beside: shell patterns for names of parameters that are trained whole beside the adapted layers.
        alone: the same, where nothing is adapted.

    Raises:
        InvalidInput: a pattern matches nothing, a layer that is tied, or a parameter of an adapted layer.
    """
    rows = [(row, path) for row in model.linear for path in row.paths()]
    unmatched = [pattern for pattern in targets if not any(_matches(path, [pattern]) for _, path in rows)]
    chosen = [(row, path) for row, path in rows if (_matches(path, targets) if targets else row.role == "target")]
    if unmatched or not chosen:
        known = ", ".join(row.path for row in model.linear[:20])
        what = f"targets {unmatched}: match no linear layer" if unmatched else "no layer is adapted unless it is named"
        raise InvalidInput(f"{what}; {model.name} has: {known}")
    if tied := [path for row, path in chosen if row.role == "tied"]:
        raise InvalidInput(f"targets {list(targets)}: match {tied[0]}, whose weight is another tensor's too")
    adapted = {path for _, path in chosen}
    parameters = model.parameters()
    of_heads = [path + ".*" for row, path in rows if heads and row.role == "head" and path not in adapted]
    whole = _named(parameters, [*of_heads, *beside], model)
    if doubled := [name for name in whole if name.rpartition(".")[0] in adapted]:
        raise InvalidInput(f"trainable {list(beside)}: match {doubled[0]}, of a layer that is adapted")
    return Shapes(
        model=model.name,
        matrices=tuple(Matrix(path, *row.shape) for row, path in chosen),
        heads=tuple(whole.values()),
        whole=tuple(_named(parameters, alone, model).values()),
    )


def _named(parameters: Mapping[str, int], patterns: Sequence[str], model: Model) -> dict[str, int]:
    if unmatched := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in parameters)]:
        known = ", ".join([*(f"{row.path}.weight" for row in model.linear), *(row.path for row in model.other)][:20])
        raise InvalidInput(f"trainable {unmatched}: match no parameter; {model.name} has: {known}")
    return {name: size for name, size in parameters.items() if any(fnmatchcase(name, each) for each in patterns)}


def _matches(path: str, targets: Iterable[str]) -> bool:
    last = path.rpartition(".")[2]
    return any(fnmatchcase(path, pattern) or fnmatchcase(last, pattern) for pattern in targets)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_TABLE_BYTES:
        raise InvalidInput(f"{path}: more than {MAX_TABLE_BYTES} bytes")
    return data


def _parse(source: str, data: bytes) -> Model:
    try:
        tree = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{source}: not TOML: {error}") from error
    return parse_params(Model, tree, source)

"""Which part of the global state one client trains and sends for one version.

Nearly always that is all that moves. It is less where a client has a lower rank than the others, and where factors are
trained in turn. What is sent of a tensor is its leading block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

import numpy as np

from fedcore.adapters import ADAPTER_GROUP, ALTERNATING, LORA_PARAMS, FullParams
from fedcore.errors import InvalidInput
from fedcore.jobfile import AdapterSection
from fedcore.layout import BASIS_GROUP, Layout, TensorSpec
from fedcore.params import parse_params
from fedcore.part import Part

_RANK_AXES: Final = {".lora_A.weight": (0,), ".lora_B.weight": (1,), ".lora_R.weight": (0, 1)}
"""Of the tensors of an adapted module, the axes that are as long as the rank."""


@dataclass(frozen=True)
class Sending:
    """What the `[adapter]` section of a job says of it.

    Attributes:
        rank: of the global state; 0 for an adapter without ranks.
        ranks: by pattern of client names, the lower ranks.
        alternates: whether B is trained from even versions, and A from odd ones.
    """

    rank: int = 0
    ranks: tuple[tuple[str, int], ...] = ()
    alternates: bool = False
    _made: dict[tuple[str, int, str], Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(adapter: AdapterSection) -> Sending:
        """Return what a job's section says; an adapter that is not known here sends everything.

        Raises:
            InvalidInput: a parameter is unknown or out of bounds, or a client's rank is above the rank.
        """
        if adapter.name not in LORA_PARAMS:
            if adapter.name == "full":
                parse_params(FullParams, adapter.params, "adapter")
            return Sending()
        params = parse_params(LORA_PARAMS[adapter.name], adapter.params, "adapter")
        for pattern, rank in params.ranks.items():
            if not 1 <= rank <= params.rank:
                raise InvalidInput(f"adapter.ranks.{pattern}: {rank}, from 1 to the job's rank of {params.rank}")
        return Sending(params.rank, tuple(params.ranks.items()), adapter.name in ALTERNATING)

    def rank_of(self, client: str) -> int:
        """Return a client's rank: the lowest of the patterns that its name matches."""
        return min([self.rank, *(rank for pattern, rank in self.ranks if fnmatchcase(client, pattern))])

    def narrowed(self, whole: Layout, client: str) -> Layout:
        """Return the layout of what `client` holds of `whole`, the job's."""
        rank = self.rank_of(client)
        return whole if rank == self.rank else self._cut(whole, rank, "")

    def layout(self, whole: Layout, client: str, version: int) -> Layout:
        """Return the layout of what `client` sends of `whole`, the job's, when it has trained from `version`."""
        rank = self.rank_of(client)
        resting = "" if not self.alternates else ".lora_A.weight" if version % 2 == 0 else ".lora_B.weight"
        return whole.moving if rank == self.rank and not resting else self._cut(whole.moving, rank, resting)

    def _cut(self, layout: Layout, rank: int, resting: str) -> Layout:
        key = layout.digest, rank, resting
        if key not in self._made:
            self._made[key] = Layout.of(
                (tensor.group, tensor.name, _cut_shape(tensor, rank), tensor.dtype)
                for tensor in layout.tensors
                if not (resting and tensor.group == ADAPTER_GROUP and tensor.name.endswith(resting))
            )
        return self._made[key]


def spread(parts: Iterable[Part], sent: Layout, whole: Layout) -> Iterable[Part]:
    """Return what a client has sent as parts of the whole vector, 0 where it has sent nothing.

    Args:
        parts: the values of `sent`.
        sent: from `Sending.layout`.
        whole: what moves of the job's layout.
    """
    return parts if sent.digest == whole.digest else _spread(parts, sent, whole)


def _spread(parts: Iterable[Part], sent: Layout, whole: Layout) -> Iterator[Part]:
    values = sent.unflatten(np.concatenate([part.dense() for part in parts]))
    for tensor in whole.tensors:
        given = values.get((tensor.group, tensor.name))
        if given is None:
            yield Part(tensor.offset, tensor.num_values, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
        elif given.shape == tensor.shape:
            yield Part(tensor.offset, tensor.num_values, None, given.ravel())
        else:
            indices = np.arange(tensor.num_values).reshape(tensor.shape)[tuple(map(slice, given.shape))]
            yield Part(tensor.offset, tensor.num_values, indices.ravel(), given.ravel())


def rank_axes(tensor: TensorSpec) -> tuple[int, ...]:
    """Return the axes of a tensor that are as long as the adapter's rank."""
    if tensor.group not in (ADAPTER_GROUP, BASIS_GROUP):
        return ()
    return next((axes for end, axes in _RANK_AXES.items() if tensor.name.endswith(end)), ())


def _cut_shape(tensor: TensorSpec, rank: int) -> tuple[int, ...]:
    axes = rank_axes(tensor)
    return tuple(min(size, rank) if axis in axes else size for axis, size in enumerate(tensor.shape))

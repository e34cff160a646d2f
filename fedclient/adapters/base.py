"""The contract of an adapter.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import get_type_hints

import numpy as np
import torch
from torch import nn

from fedcore.errors import LayoutError
from fedcore.layout import Layout, Vector
from fedcore.params import Params, parse_params

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class AdaptedModel:
    """A model together with the ordered part of its parameters that is trained and travels.

    Everything else in the model is frozen. Not thread-safe.

    Args:
        module: the model, ready to be called.
        trained: (group, name, parameter) in the order of the flat vector.

    Raises:
        LayoutError: nothing is to be trained, or a name or type does not fit a layout.
    """

    def __init__(self, module: nn.Module, trained: Iterable[tuple[str, str, nn.Parameter]]) -> None:
        self.module = module
        rows = list(trained)
        for _, name, parameter in rows:
            if parameter.dtype not in _DTYPES:
                known = ", ".join(_DTYPES.values())
                raise LayoutError(f"tensor {name}: {parameter.dtype} cannot be trained, known: {known}")
        self.parameters = [parameter for _, _, parameter in rows]
        self.layout = Layout.of((group, name, tuple(p.shape), _DTYPES[p.dtype]) for group, name, p in rows)
        chosen = {id(parameter) for parameter in self.parameters}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def read(self) -> Vector:
        """Return a copy of the trained parameters as one float32 vector of D values."""
        with torch.no_grad():
            values = [parameter.detach().to("cpu", torch.float32).numpy() for parameter in self.parameters]
        return self.layout.flatten({(t.group, t.name): v for t, v in zip(self.layout.tensors, values, strict=True)})

    def write(self, flat_D: Vector) -> None:
        """Set the trained parameters from one vector of D values; a parameter of fewer bits is rounded.

        Raises:
            LayoutError: the vector has another length.
        """
        tensors = self.layout.unflatten(flat_D)
        with torch.no_grad():
            for tensor, parameter in zip(self.layout.tensors, self.parameters, strict=True):
                parameter.copy_(torch.from_numpy(np.array(tensors[tensor.group, tensor.name], dtype=np.float32)))


class Adapter(ABC):
    """Chooses, and may add, the weights of a model that are trained.

    A subclass names its parameters by annotating `params` with its own `Params` class::

        class MyAdapter(Adapter):
            params: MyParams

    Args:
        params: the job's `[adapter]` keys other than the name.

    Raises:
        InvalidInput: a parameter is unknown or out of bounds.
    """

    params: Params

    def __init__(self, params: Mapping[str, object]) -> None:
        self.params = parse_params(get_type_hints(type(self))["params"], params, "adapter")

    @abstractmethod
    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """Adapt `model` in place, without changing what it computes so far.

        The same model, parameters and seed give the same layout and the same values on every machine:
        whatever is drawn is drawn from `seed`, never from torch's global generator.

        Raises:
            InvalidInput: the model has nothing that this adapter could train.
        """

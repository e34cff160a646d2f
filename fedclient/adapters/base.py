"""The contract of an adapter.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from fedclient.adapters.targets import Target
from fedcore.errors import LayoutError
from fedcore.layout import BASIS_GROUP, Layout, Vector
from fedcore.params import Params, parse_params

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class AdaptedModel:
    """A model together with the ordered part of its parameters that is trained and travels.

    Everything else in the model is frozen. Not thread-safe.

    Args:
        module: the model, ready to be called.
        trained: (group, name, parameter) in the order of the flat vector.
        basis: (name, buffer): what the start of the job sets for good.
        adapted: weights from whose gradients the job starts, each as outputs × inputs.

    Attributes:
        parameters: what is trained.
        layout: of these and, behind them, of the basis.

    Raises:
        LayoutError: nothing is to be trained, or a name or type does not fit a layout.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Iterable[tuple[str, str, nn.Parameter]],
        basis: Iterable[tuple[str, Tensor]] = (),
        adapted: Iterable[Target] = (),
    ) -> None:
        self.module = module
        self._adapted = list(adapted)
        self._basis = dict(basis)
        rows = list(trained)
        for _, name, parameter in rows:
            if parameter.dtype not in _DTYPES:
                known = ", ".join(_DTYPES.values())
                raise LayoutError(f"tensor {name}: {parameter.dtype} cannot be trained, known: {known}")
        self.parameters = [parameter for _, _, parameter in rows]
        self.layout = Layout.of(
            [
                *((group, name, tuple(p.shape), _DTYPES[p.dtype]) for group, name, p in rows),
                *((BASIS_GROUP, name, tuple(buffer.shape), "float32") for name, buffer in self._basis.items()),
            ]
        )
        chosen = {id(parameter) for parameter in self.parameters}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def read(self) -> Vector:
        """Return a copy of the trained parameters as one float32 vector of D values."""
        with torch.no_grad():
            values = [parameter.detach().to("cpu", torch.float32).numpy() for parameter in self.parameters]
        moving = self.layout.moving
        return moving.flatten({(t.group, t.name): v for t, v in zip(moving.tensors, values, strict=True)})

    @property
    def starts_from_gradients(self) -> bool:
        """Whether the job's start gives the basis; otherwise it is as it was attached."""
        return bool(self._adapted)

    def read_all(self) -> Vector:
        """Return a copy of the trained parameters and, behind them, of the basis."""
        basis = [buffer.detach().to("cpu", torch.float32).numpy().ravel() for buffer in self._basis.values()]
        return np.concatenate([self.read(), *basis])

    def write(self, flat_D: Vector) -> None:
        """Set the trained parameters from one vector of D values; a parameter of fewer bits is rounded.

        Raises:
            LayoutError: the vector has another length.
        """
        moving = self.layout.moving
        tensors = moving.unflatten(flat_D)
        with torch.no_grad():
            for tensor, parameter in zip(moving.tensors, self.parameters, strict=True):
                parameter.copy_(torch.from_numpy(np.array(tensors[tensor.group, tensor.name], dtype=np.float32)))

    def write_basis(self, basis: Vector) -> None:
        """Set the basis from the values that come last in the layout.

        Raises:
            LayoutError: the vector has another length.
        """
        if basis.shape != (self.layout.num_basis_values,):
            raise LayoutError(f"basis of shape {basis.shape}, the layout says ({self.layout.num_basis_values},)")
        start = 0
        with torch.no_grad():
            for buffer in self._basis.values():
                values = np.array(basis[start : start + buffer.numel()], dtype=np.float32).reshape(buffer.shape)
                buffer.copy_(torch.from_numpy(values))
                start += buffer.numel()

    @contextmanager
    def measuring(self) -> Iterator[Callable[[], Vector]]:
        """Let gradients by the adapted weights add up within the block, and by nothing else.

        What it yields returns them: matrix after matrix, outputs × inputs, in the order of the layout.
        """
        weights: list[Any] = [target.layer.weight for target in self._adapted]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None

        def found() -> Vector:
            gradients = []
            for target, weight in zip(self._adapted, weights, strict=True):
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                gradient = gradient.detach().to("cpu", torch.float32)
                gradients.append((gradient.T if target.is_transposed else gradient).numpy().ravel())
            return np.concatenate(gradients)

        try:
            yield found
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
            for parameter in self.parameters:
                parameter.requires_grad_(True)


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

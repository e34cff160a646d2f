"""The contract of an adapter.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, get_type_hints, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fedclient.adapters.targets import Target
from fedcore.changes import Change
from fedcore.errors import InvalidInput, LayoutError
from fedcore.layout import BASIS_GROUP, Layout, Vector
from fedcore.params import Params, parse_params

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@runtime_checkable
class Changeable(Protocol):
    """A layer whose frozen matrix may change."""

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102

    def change_base(self, change_mn: Tensor) -> None:
        """Add this to it, which is float32 and on the layer's device."""
        ...


class AdaptedModel:
    """A model together with the ordered part of its parameters that is trained and travels.

    Everything else in the model is frozen. Not thread-safe.

    Args:
        module: the model, ready to be called.
        trained: (group, name, parameter) in the order of the flat vector.
        basis: (name, parameter): what the start of the job sets for good.
        adapted: weights from whose gradients the job starts, each as outputs × inputs.

    Attributes:
        parameters: what the next training changes.
        layout: of all that is trained and, behind it, of the basis.
        basis: what stays as the start of the job has set it, by name.

    Raises:
        LayoutError: nothing is to be trained, or a name or type does not fit a layout.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Iterable[tuple[str, str, nn.Parameter]],
        basis: Iterable[tuple[str, nn.Parameter]] = (),
        adapted: Iterable[Target] = (),
    ) -> None:
        self.module = module
        self._adapted = list(adapted)
        self.basis = dict(basis)
        rows = list(trained)
        for _, name, parameter in rows:
            if parameter.dtype not in _DTYPES:
                known = ", ".join(_DTYPES.values())
                raise LayoutError(f"tensor {name}: {parameter.dtype} cannot be trained, known: {known}")
        self._trained = {(group, name): parameter for group, name, parameter in rows}
        self.parameters = list(self._trained.values())
        self.layout = Layout.of(
            [
                *((group, name, tuple(p.shape), _DTYPES[p.dtype]) for group, name, p in rows),
                *((BASIS_GROUP, name, tuple(factor.shape), "float32") for name, factor in self.basis.items()),
            ]
        )
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.train_only(self.layout.moving)

    def train_only(self, layout: Layout) -> None:
        """Let the next training change the tensors that `layout` names and nothing else."""
        for parameter in self._trained.values():
            parameter.requires_grad_(False)
        self.parameters = [self._trained[tensor.group, tensor.name] for tensor in layout.tensors]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def narrow(self, layout: Layout) -> None:
        """Keep of each tensor the leading block that has the shape in `layout`; what is written later is cut likewise.

        Args:
            layout: as `self.layout`, which stays as it is, but for shapes that are smaller.
        """
        for tensor in layout.tensors:
            basis = tensor.group == BASIS_GROUP
            parameter = self.basis[tensor.name] if basis else self._trained[tensor.group, tensor.name]
            parameter.data = _leading(parameter.data, tensor.shape).clone()

    def read(self, layout: Layout | None = None) -> Vector:
        """Return a copy of the trained parameters as one float32 vector, of D values unless `layout` names fewer."""
        layout = self.layout.moving if layout is None else layout
        with torch.no_grad():
            return layout.flatten(
                {
                    (t.group, t.name): self._trained[t.group, t.name].detach().to("cpu", torch.float32).numpy()
                    for t in layout.tensors
                }
            )

    @property
    def starts_from_gradients(self) -> bool:
        """Whether the job's start gives the basis; otherwise it is as it was attached."""
        return bool(self._adapted)

    def read_all(self) -> Vector:
        """Return a copy of the trained parameters and, behind them, of the basis."""
        return np.concatenate([self.read(), self.read_basis()]) if self.basis else self.read()

    def read_basis(self) -> Vector:
        """Return a copy of the basis, the values that come last in the layout; empty if there is none."""
        basis = [factor.detach().to("cpu", torch.float32).numpy().ravel() for factor in self.basis.values()]
        return np.concatenate(basis) if basis else np.empty(0, dtype=np.float32)

    def write(self, flat_D: Vector) -> None:
        """Set the trained parameters from one vector of D values; a parameter of fewer bits is rounded.

        Raises:
            LayoutError: the vector has another length.
        """
        moving = self.layout.moving
        tensors = moving.unflatten(flat_D)
        with torch.no_grad():
            for key, parameter in self._trained.items():
                values = torch.from_numpy(np.array(tensors[key], dtype=np.float32))
                parameter.copy_(_leading(values, tuple(parameter.shape)))

    def write_basis(self, basis: Vector) -> None:
        """Set the basis from the values that come last in the layout.

        Raises:
            LayoutError: the vector has another length.
        """
        if basis.shape != (self.layout.num_basis_values,):
            raise LayoutError(f"basis of shape {basis.shape}, the layout says ({self.layout.num_basis_values},)")
        start = self.layout.moving.num_values
        with torch.no_grad():
            for tensor in self.layout.tensors[len(self.layout.moving.tensors) :]:
                first, factor = tensor.offset - start, self.basis[tensor.name]
                values = np.array(basis[first : first + tensor.num_values], dtype=np.float32).reshape(tensor.shape)
                factor.copy_(_leading(torch.from_numpy(values), tuple(factor.shape)))

    def change_base(self, change: Change) -> None:
        """Add to the frozen matrix of an adapted module.

        Raises:
            InvalidInput: its layer does not do that (`Changeable`).
        """
        layer = self.module.get_submodule(change.module)
        if not isinstance(layer, Changeable):
            raise InvalidInput(f"{change.module}: a {type(layer).__name__} keeps its frozen matrix as it is")
        if change.b_mr.size:
            device = next(layer.parameters()).device
            # Copies: what comes from the wire is read-only.
            b, a = (
                None if factor is None else torch.from_numpy(np.array(factor, dtype=np.float32)).to(device)
                for factor in (change.b_mr, change.a_rn)
            )
            assert b is not None
            with torch.no_grad():
                layer.change_base(b if a is None else b @ a)

    @contextmanager
    def measuring(self) -> Iterator[Callable[[], Vector]]:
        """Let gradients by the adapted weights add up within the block, and by nothing else.

        What it yields returns them: matrix after matrix, outputs × inputs, in the order of the layout. They add up in
        float32 in main memory, whatever the model is in, and each leaves the device as soon as it is there.
        """
        sizes = [target.num_outputs * target.num_inputs for target in self._adapted]
        gradients = np.zeros(sum(sizes), dtype=np.float32)
        sums = np.split(gradients, np.cumsum(sizes)[:-1])

        def adds(target: Target, total: Vector) -> Callable[[Tensor], None]:
            def add(weight: Tensor) -> None:
                assert weight.grad is not None
                gradient = weight.grad.detach().to("cpu", torch.float32).numpy()
                total[:] += (gradient.T if target.is_transposed else gradient).ravel()
                weight.grad = None

            return add

        weights: list[Any] = [target.layer.weight for target in self._adapted]
        hooks = []
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
            for target, weight, total in zip(self._adapted, weights, sums, strict=True):
                weight.requires_grad_(True)
                hooks.append(weight.register_post_accumulate_grad_hook(adds(target, total)))
            yield lambda: gradients
        finally:
            for hook in hooks:
                hook.remove()
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
            for parameter in self.parameters:
                parameter.requires_grad_(True)


def _leading(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values[tuple(map(slice, shape))]


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

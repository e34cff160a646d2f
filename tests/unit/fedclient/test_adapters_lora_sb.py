"""LoRA-SB and FFA-LoRA on real torch models, against autograd of the dense weights and dense algebra."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedclient.adapters.base import AdaptedModel
from fedclient.adapters.lora import FfaLora
from fedclient.adapters.lora_sb import LoraSb
from fedclient.trainer import LocalWorker, Stopped, Work
from fedcore.adapters import basis_modules, gradient_layout
from fedcore.errors import InvalidInput, LayoutError
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout, Vector
from fedcore.rng import derive_seed
from fedserver.rounds.start import GradientStart, gradient_start

SHARD = {"shard": "0", "num_shards": "5"}
NUM_CLASSES = 7


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the same network on every call: a linear layer and one whose weight lies transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        transposed: nn.Module = Conv1D(10, 12)  # type: ignore[no-untyped-call]
        last = nn.Linear(10, NUM_CLASSES)
        return nn.Sequential(OrderedDict(first=nn.Linear(9, 12), act=nn.Tanh(), second=transposed, third=last)).to(
            dtype
        )


def examples(number: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(number, 9, generator=generator)
    return inputs, torch.randint(NUM_CLASSES, (number,), generator=generator)


def summed_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs).float(), targets, reduction="sum")


def dense_gradient(model: nn.Module, path: str) -> npt.NDArray[np.float64]:
    layer: Any = model.get_submodule(path)
    gradient: npt.NDArray[np.float64] = layer.weight.grad.double().numpy()
    return gradient.T if path == "second" else gradient


def dense_gradients(dtype: torch.dtype = torch.float32) -> dict[str, npt.NDArray[np.float64]]:
    """Return the gradients by the dense weights, outputs × inputs, in one pass over all examples."""
    model = make_model(dtype)
    inputs, targets = examples()
    summed_loss(model, inputs.to(dtype), targets).backward()  # type: ignore[no-untyped-call]
    return {path: dense_gradient(model, path) for path in ("first", "second", "third")}


def measured(model: AdaptedModel, dtype: torch.dtype = torch.float32, batch: int = 6) -> Vector:
    """Return what the adapted model adds up over batches; the last one is smaller."""
    inputs, targets = examples()
    with model.measuring() as found:
        for rows in torch.split(torch.arange(len(inputs)), batch):
            summed_loss(model.module, inputs[rows].to(dtype), targets[rows]).backward()  # type: ignore[no-untyped-call]
        return found()


def begin(model: AdaptedModel, gradients: Vector, step: float = 0.05) -> None:
    """Start as a job with one client does."""
    start = GradientStart(LoraSb({"rank": 4, "step": step}).params)
    frame = start.uplink.encode(gradients, np.random.default_rng(0), gradient_layout(model.layout).sizes)
    values_D, basis = start.factors(model.layout, model.read(), lambda: iter([memoryview(frame)]))
    model.write(values_D)
    model.write_basis(basis)


def triples(model: AdaptedModel) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]:
    """Return B, R and A of each layer in float64."""
    tensors = {name: value.astype(np.float64) for (_, name), value in model.layout.unflatten(model.read_all()).items()}
    return {
        path: (
            tensors[f"{path}.lora_B.weight"],
            tensors[f"{path}.lora_R.weight"],
            tensors[f"{path}.lora_A.weight"],
        )
        for path in basis_modules(model.layout)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_the_gradient_by_the_dense_weights(dtype: torch.dtype) -> None:
    model = LoraSb({"rank": 4}).attach(make_model(dtype), 1)
    found = gradient_layout(model.layout).unflatten(measured(model, dtype))
    expected = dense_gradients(dtype)
    assert [name for _, name in found] == list(expected)
    for (_, name), gradient_mn in found.items():
        assert gradient_mn.shape == expected[name].shape
        error = np.linalg.norm(gradient_mn - expected[name]) / np.linalg.norm(expected[name])
        assert error < (1e-5 if dtype is torch.float32 else 2e-2), name


def test_gradients_of_batches_add_up_in_float32_whatever_the_model_is_in() -> None:
    model = LoraSb({"rank": 4}).attach(make_model(torch.bfloat16), 1)
    one_by_one = measured(model, torch.bfloat16, batch=1)
    # Each example's gradient is a bfloat16; hardly any sum of twenty is one.
    as_bfloat16 = torch.from_numpy(one_by_one).bfloat16().float().numpy()
    assert np.mean(as_bfloat16 != one_by_one) > 0.5


def test_measuring_leaves_weights_and_what_is_trained_as_they_were() -> None:
    model = LoraSb({"rank": 4}).attach(make_model(), 1)
    before = {name: value.detach().clone() for name, value in model.module.named_parameters()}
    trained = [name for name, value in model.module.named_parameters() if value.requires_grad]
    first = measured(model)
    assert first.any()
    assert measured(model).tobytes() == first.tobytes(), "something was left over"
    assert [name for name, value in model.module.named_parameters() if value.requires_grad] == trained
    assert trained == ["first.lora_R.weight", "second.lora_R.weight", "third.lora_R.weight"]
    for name, value in model.module.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_the_start_is_the_truncation_of_the_sign_of_the_gradient() -> None:
    model = LoraSb({"rank": 4}).attach(make_model(), 1)
    begin(model, measured(model), 0.05)
    expected = dense_gradients()
    for path, (b_mr, r_rr, a_rn) in triples(model).items():
        step_mn = -0.05 * np.sign(expected[path])
        u, s, vt = np.linalg.svd(step_mn, full_matrices=False)
        assert np.abs(b_mr @ r_rr @ a_rn - (u[:, :4] * s[:4]) @ vt[:4]).max() < 1e-6, path
        assert np.abs(b_mr.T @ b_mr - np.eye(4)).max() <= 1e-6
        assert np.abs(a_rn @ a_rn.T - np.eye(4)).max() <= 1e-6


def test_the_gradient_of_r_is_the_dense_gradient_seen_through_the_factors() -> None:
    model = LoraSb({"rank": 4}).attach(make_model(), 1)
    begin(model, measured(model))
    inputs, targets = examples()
    summed_loss(model.module, inputs, targets).backward()  # type: ignore[no-untyped-call]
    merged = make_model()
    for path, (b_mr, r_rr, a_rn) in triples(model).items():
        update = torch.from_numpy(b_mr @ r_rr @ a_rn).float()
        dense: Any = merged.get_submodule(path)
        with torch.no_grad():
            dense.weight.add_(update.T if path == "second" else update)
    summed_loss(merged, inputs, targets).backward()  # type: ignore[no-untyped-call]
    for path, (b_mr, _, a_rn) in triples(model).items():
        layer: Any = model.module.get_submodule(path)
        expected = b_mr.T @ dense_gradient(merged, path) @ a_rn.T
        assert np.abs(layer.lora_R.weight.grad.numpy() - expected).max() < 1e-5, path
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad is None
    torch.testing.assert_close(model.module(inputs), merged(inputs), rtol=0, atol=1e-5)


def test_a_layer_without_gradient_is_named() -> None:
    model = LoraSb({"rank": 4}).attach(make_model(), 1)
    gradients = measured(model)
    first = 9 * 12
    gradients[first : first + 120] = 0
    with pytest.raises(Exception, match="layer second: gradient sum is 0 everywhere") as raised:
        begin(model, gradients)
    assert getattr(raised.value, "code", "") == "job-failed"


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"adapter\.rank 8: above 7, the most that third"):
        LoraSb({"rank": 8}).attach(make_model(), 1)


def test_a_quantised_layer_has_no_gradient_to_start_from() -> None:
    model = make_model()
    model.first.weight = nn.Parameter(torch.zeros(12, 9, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]
    with pytest.raises(InvalidInput, match="first is quantised"):
        LoraSb({"rank": 4}).attach(model, 1)


def test_ffa_lora_trains_b_between_a_common_a() -> None:
    one, two, other = (FfaLora({"rank": 4}).attach(make_model(), seed) for seed in (1, 1, 2))
    assert {tensor.name.rpartition("lora_")[2] for tensor in one.layout.moving.tensors} == {"B.weight"}
    assert one.read_all().tobytes() == two.read_all().tobytes()
    assert one.read_all().tobytes() != other.read_all().tobytes()
    by_layer = [value for (_, name), value in one.layout.unflatten(one.read_all()).items() if "lora_A" in name]
    assert not np.array_equal(by_layer[1][:, :7], by_layer[0][:, :7]), "each layer draws its own"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("adapter", "w.lora_R.weight", (2, 2))], "R (2, 2), A () and B () are not"),
        (
            [
                ("adapter", "w.lora_R.weight", (2, 2)),
                ("basis", "w.lora_A.weight", (2, 5)),
                ("basis", "w.lora_B.weight", (5, 3)),
            ],
            "are not (r, r), (r, n) and (m, r)",
        ),
        (
            [
                ("adapter", "w.lora_R.weight", (2, 2)),
                ("basis", "w.lora_A.weight", (2, 5)),
                ("basis", "w.lora_B.weight", (5, 2)),
                ("basis", "v.lora_B.weight", (5, 2)),
            ],
            "v.lora_B.weight of the basis belongs to no R",
        ),
        ([("adapter", "w", (2, 2))], "no tensor is an R"),
    ],
)
def test_a_layout_that_is_no_lora_sb_adapter_is_refused(
    rows: list[tuple[str, str, tuple[int, ...]]], message: str
) -> None:
    layout = Layout.of((*row, "float32") for row in rows)
    with pytest.raises(LayoutError) as raised:
        basis_modules(layout)
    assert message in str(raised.value)


# -- the worker --------------------------------------------------------------------------------------------------------


def make_job(**adapter: object) -> Job:
    return parse_job(
        {
            "job": {"name": "test", "rounds": 2, "seed": 3},
            "task": {"name": "digits"},
            "adapter": {"name": "lora-sb", "rank": 4, "dropout": 0.5, **adapter},
            "training": {"batch_size": 16},
            "schedule": {"cohort": 2},
        },
        "test",
    )


def make_work(job: Job | None = None) -> Work:
    return Work("job-1", job or make_job(), 0, "anna", derive_seed(3, "gradient", "anna", 0))


def test_a_gradient_is_the_same_again_and_takes_as_many_examples_as_there_are() -> None:
    worker, work = LocalWorker(SHARD, "cpu"), make_work()
    _, base_D = worker.initialise(work)
    one = worker.gradient(work, base_D, 40)
    worker.train(work, base_D)
    assert worker.gradient(work, base_D, 40).values.tobytes() == one.values.tobytes()
    assert one.num_examples == 40
    everything = worker.gradient(work, base_D, 1_000_000)
    assert 40 < everything.num_examples < 1_000
    assert np.linalg.norm(everything.values) > np.linalg.norm(one.values)


def test_a_gradient_can_be_stopped() -> None:
    worker, work = LocalWorker(SHARD, "cpu"), make_work()
    _, base_D = worker.initialise(work)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        worker.gradient(work, base_D, 40, stop=stop)
    assert worker.gradient(work, base_D, 40).values.any(), "and the model is as it was"


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    worker, work = LocalWorker(SHARD, "cpu"), make_work()
    layout, base_D = worker.initialise(work)
    worker.set_basis(work, np.full(layout.num_basis_values, 1e30, np.float32))
    with pytest.raises(InvalidInput, match="is not finite"):
        worker.gradient(work, base_D + np.float32(1e30), 40)


@pytest.mark.parametrize("change", [lambda basis: basis[:-1], lambda basis: np.append(basis, np.float32(0))])
def test_a_basis_of_another_length_is_refused(change: Callable[[Vector], Vector]) -> None:
    worker, work = LocalWorker(SHARD, "cpu"), make_work()
    layout, _ = worker.initialise(work)
    with pytest.raises(LayoutError, match=f"the layout says \\({layout.num_basis_values},\\)"):
        worker.set_basis(work, change(np.zeros(layout.num_basis_values, np.float32)))


def test_only_jobs_with_lora_sb_start_from_gradients() -> None:
    assert gradient_start(make_job()) is not None
    assert gradient_start(parse_job(make_job().model_dump(mode="json") | {"adapter": {"name": "lora"}}, "x")) is None
    with pytest.raises(InvalidInput, match=r"adapter\.alpha"):
        gradient_start(make_job(alpha=3.0))

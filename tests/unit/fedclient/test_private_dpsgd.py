"""DP-SGD: what a step adds up, by how much an example changes it, and what noise comes on top."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fedclient import dpsgd
from fedclient.adapters.base import AdaptedModel
from fedclient.adapters.full import Full
from fedclient.clipping import CannotHide
from fedclient.tasks.base import Split, Task
from fedcore.errors import InvalidInput
from tests.support.private import (
    ADAPTER_PARAMS,
    Points,
    adapted,
    digits_task,
    draws_of,
    expected_sum,
    flat,
    kept,
    one_by_one,
    points,
    points_task,
    run_of,
    seeded,
    step_of,
)


def of_examples(task: Task, model: AdaptedModel, data: Split) -> list[Tensor]:
    sums = dpsgd._Sums(task, model, data, 8)
    model.module.train()
    with dpsgd._telling_apart(sums):
        return [each.detach().clone() for each in sums.of_examples(torch.arange(len(data)))]


# -- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTER_PARAMS)
def test_gradients_of_examples_are_those_of_single_backward_passes(adapter: str) -> None:
    task = digits_task()
    data = task.load().train
    some = Split(data.inputs[:9], data.targets[:9])
    model = adapted(task, adapter, ADAPTER_PARAMS[adapter])
    found = of_examples(task, model, some)
    found_ND = torch.cat([each.flatten(1).double() for each in found], dim=1)
    torch.testing.assert_close(found_ND, one_by_one(task, model, some), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTER_PARAMS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_step_adds_up_examples_clipped_over_all_that_is_trained(adapter: str, batch_size: int) -> None:
    task = digits_task()
    data = task.load().train
    some = Split(data.inputs[:11], data.targets[:11])
    model = adapted(task, adapter, ADAPTER_PARAMS[adapter])
    examples_ND = one_by_one(task, model, some)
    clip = float(examples_ND.norm(dim=1).median())  # half of them are above
    found_D = step_of(task, model, some, clip, batch_size)
    torch.testing.assert_close(found_D, expected_sum(examples_ND, clip), rtol=1e-3, atol=1e-4 * clip)


@pytest.mark.parametrize("clip", [1e-6, 0.3, 1.0, 1e6])
def test_no_clipped_gradient_is_above_the_clip(clip: float) -> None:
    generator = torch.Generator().manual_seed(5)
    size = torch.logspace(-12, 12, 400, dtype=torch.float64).float()
    gradients = [torch.randn(400, *shape, generator=generator) for shape in ((30, 7), (11,), (), (2, 3, 4))]
    gradients = [each * size.reshape(-1, *[1] * (each.dim() - 1)) for each in gradients]
    found = dpsgd.clip_examples(gradients, clip)
    norms_N = torch.cat([each.reshape(400, -1).double() for each in found], dim=1).norm(dim=1)
    before_N = torch.cat([each.reshape(400, -1).double() for each in gradients], dim=1).norm(dim=1)
    assert norms_N.max() <= clip * (1 + 1e-6)
    assert torch.allclose(norms_N, before_N.clamp(max=clip), rtol=1e-6)
    short = (before_N <= clip).nonzero().flatten()
    for each, was in zip(found, gradients, strict=True):
        assert torch.equal(each[short], was[short]), "what is short enough stays as it is"


def test_an_example_that_is_replaced_or_removed_changes_the_sum_by_as_much_as_it_may() -> None:
    task, data, clip = points_task(), points(12), 0.05
    model = adapted(task, "full", {})
    whole_D = step_of(task, model, data, clip)
    for row in range(len(data)):
        inputs, targets = data.inputs.clone(), data.targets.clone()
        inputs[row], targets[row] = -40 * inputs[row], (targets[row] + 1) % 3
        replaced_D = step_of(task, model, Split(inputs, targets), clip)
        assert (whole_D - replaced_D).norm() <= 2 * clip * (1 + 1e-4)
        rest = torch.arange(len(data)) != row
        removed_D = step_of(task, model, Split(data.inputs[rest], data.targets[rest]), clip)
        assert (whole_D - removed_D).norm() <= clip * (1 + 1e-4)
        assert (whole_D - removed_D).norm() >= 0.9 * clip, "and each of these is clipped"


def test_a_gradient_that_is_not_finite_counts_as_zero_and_the_others_as_ever() -> None:
    task, data = points_task(), points(9)
    model = adapted(task, "full", {})
    inputs = data.inputs.clone()
    inputs[4], inputs[7] = torch.nan, torch.inf
    rest = torch.tensor([row not in {4, 7} for row in range(9)])
    others_ND = one_by_one(task, model, Split(data.inputs[rest], data.targets[rest]))
    found_D = step_of(task, model, Split(inputs, data.targets), 0.3)
    torch.testing.assert_close(found_D, expected_sum(others_ND, 0.3), rtol=1e-4, atol=1e-5)


def test_how_many_are_worked_through_at_once_changes_nothing() -> None:
    task = digits_task()
    data = task.load().train
    model = adapted(task, "lora", ADAPTER_PARAMS["lora"])
    found = []
    for at_once in (1, 7, 64, 1000):
        with kept(model):
            run = run_of(batch_size=at_once)
            dpsgd.train(task, model, data, run, draws_of(), sampling=0.3, steps=3, clip=0.5, noise_multiplier=1.0)
            found.append(flat(model.parameters))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)
    assert (found[0] - flat(model.parameters)).abs().max() > 1e-3


# -- plain training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTER_PARAMS)
@pytest.mark.parametrize("keys", [{"optimizer": "sgd"}, {"optimizer": "adamw", "max_grad_norm": 0.1}])
def test_without_clip_and_noise_it_is_plain_training_to_the_last_bit(adapter: str, keys: dict[str, Any]) -> None:
    task = digits_task()
    data = task.load().train
    one, two = (adapted(task, adapter, ADAPTER_PARAMS[adapter]) for _ in range(2))
    run = run_of(batch_size=16, **keys)
    dpsgd.train(task, one, data, run, draws_of(), sampling=0.3, steps=4, clip=math.inf, noise_multiplier=0.0)

    draws, trained = draws_of(), two.parameters
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(trained, lr=0.1)
        if keys["optimizer"] == "sgd"
        else torch.optim.AdamW(trained, 0.1, weight_decay=0)
    )
    two.module.train()
    for _ in range(4):
        batch = [row for row, u in enumerate(draws.random(len(data))) if u < 0.3]
        optimizer.zero_grad()
        for start in range(0, len(batch), 16):
            rows = batch[start : start + 16]
            outputs = two.module(data.inputs[rows])
            losses = [nn.functional.cross_entropy(outputs[i], data.targets[row]) for i, row in enumerate(rows)]
            sum(losses, torch.tensor(0.0)).backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad /= len(data) * 0.3
        if "max_grad_norm" in keys:
            nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
    assert one.read().tobytes() == two.read().tobytes()


# -- noise and sampling ----------------------------------------------------------------------------------------------


def noise_of(task: Task, model: AdaptedModel, steps: int, secret: int = 1, **keys: Any) -> Tensor:
    """Return the gradients of `steps` steps on which no example has any influence: steps × D."""
    found: list[Tensor] = []
    data = Split(torch.zeros(50, 5), torch.zeros(50, dtype=torch.int64))
    how = {"sampling": 0.1, "clip": 0.7, "noise_multiplier": 1.5, **keys}
    with kept(model), torch.no_grad():
        for step in range(steps):
            before = flat(model.parameters)
            with torch.enable_grad():
                run = run_of(learning_rate=1.0)
                dpsgd.train(task, model, data, run, draws_of(1000 * secret + step), steps=1, **how)
            found.append(before - flat(model.parameters))
    return torch.stack(found)


class Unmoved(Points):
    """No example has any influence."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 30))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.0 * outputs.sum()


def test_noise_has_the_variance_that_is_accounted_for() -> None:
    """Chi-square with 14,700 degrees of freedom; a right program fails with probability 1e-9 (two-sided)."""
    task = Unmoved({}, {}, 1)
    model = Full({}).attach(seeded(task.build_model), 1)
    values = noise_of(task, model, 10).numpy()
    std = 0.7 * 1.5 / (50 * 0.1)
    total = float((values / std).ravel() @ (values / std).ravel())
    low, high = stats.chi2(values.size).ppf([0.5e-9, 1 - 0.5e-9])
    assert low < total < high
    assert abs(values.mean()) < stats.norm.isf(0.5e-9) * std / math.sqrt(values.size)


def test_noise_is_independent_across_values_steps_and_secrets() -> None:
    """Correlations of 1,470 pairs; a right program fails with probability below 1e-9 for each of the comparisons."""
    task = Unmoved({}, {}, 1)
    model = Full({}).attach(seeded(task.build_model), 1)
    one, two, three = noise_of(task, model, 3).numpy()
    other = noise_of(task, model, 1, secret=2).numpy()[0]
    assert one.size == 1470
    bound = stats.norm.isf(1e-10) / math.sqrt(one.size) * 1.1
    half = one.size // 2
    pairs = [
        (one, two),
        (one, three),
        (one, other),
        (one[:half], one[half:]),
        (one[:-1], one[1:]),
        (one[::2], one[1::2]),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < bound * math.sqrt(one.size / len(a))
    assert len(np.unique(one)) == one.size


def test_noise_comes_once_for_a_step_however_many_parts_it_has() -> None:
    """As above: chi-square, 1e-9."""
    task = Unmoved({}, {}, 1)
    model = Full({}).attach(seeded(task.build_model), 1)
    data = Split(torch.zeros(50, 5), torch.zeros(50, dtype=torch.int64))
    found_D = step_of(task, model, data, 0.7, 3, noise_multiplier=1.5) / (0.7 * 1.5)
    low, high = stats.chi2(len(found_D)).ppf([0.5e-9, 1 - 0.5e-9])
    assert low < float(found_D @ found_D) < high


def test_a_step_without_examples_has_noise_all_the_same_and_counts() -> None:
    task, data = points_task(), points(3)
    ticks: list[float] = []
    model = adapted(task, "full", {})
    before = flat(model.parameters)
    sampling = 1e-9
    assert not len(dpsgd.poisson(draws_of(), 3, sampling))
    run = run_of(ticks, learning_rate=1e-9)
    dpsgd.train(task, model, data, run, draws_of(), sampling=sampling, steps=2, clip=1.0, noise_multiplier=1.0)
    assert ((flat(model.parameters) - before) != 0).all()
    assert ticks == [0.5, 1.0]


def test_batches_are_poisson_batches() -> None:
    """Sizes of 4,000 batches against the binomial distribution, and each example's share; each fails with 1e-9."""
    draws, number, sampling, batches = draws_of(), 30, 0.2, 4000
    drawn = np.zeros((batches, number), dtype=bool)
    for batch in range(batches):
        rows = dpsgd.poisson(draws, number, sampling).numpy()
        assert (np.diff(rows) > 0).all()
        drawn[batch, rows] = True
    sizes = np.bincount(drawn.sum(axis=1), minlength=number + 1)
    probability = stats.binom(number, sampling).pmf(np.arange(number + 1))
    wanted = [probability[:2].sum(), *probability[2:11], probability[11:].sum()]
    found = [sizes[:2].sum(), *sizes[2:11], sizes[11:].sum()]
    assert stats.chisquare(found, np.array(wanted) * batches).pvalue > 1e-9
    shares = drawn.sum(axis=0)
    assert stats.binom(batches, sampling).cdf([shares.min(), shares.max()]).tolist() == pytest.approx(
        [0.5, 0.5], abs=0.5 - 1e-9 / number
    )
    together = np.corrcoef(drawn.T)[np.triu_indices(number, 1)]
    assert np.abs(together).max() < stats.norm.isf(1e-9 / together.size / 2) / math.sqrt(batches) * 1.1


def test_the_divisor_is_what_is_expected_and_not_what_was_drawn() -> None:
    task, data = points_task(), points(20)
    model = adapted(task, "full", {})
    rows = dpsgd.poisson(draws_of(), 20, 0.3)
    assert len(rows) != 6
    drawn = Split(data.inputs[rows], data.targets[rows])
    found_D = step_of(task, model, data, 0.2, sampling=0.3)
    torch.testing.assert_close(found_D, expected_sum(one_by_one(task, model, drawn), 0.2), rtol=1e-3, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Adds to each place what belongs to it, for all examples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, 4)
        self.scores = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores((x[:, :, None] * self.places(torch.arange(5)[None])).sum(dim=1))
        return scores


class BatchMean(nn.Module):
    """Shows each example the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(x - x.mean(dim=0))
        return scores


class AnotherAxis(nn.Module):
    """A layer sees examples along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x.T[..., None]).sum(dim=0)
        return scores


class Behind(nn.Module):
    """One of two uses of a weight passes the layer by."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x) + x @ self.inner.weight.T
        return scores


class Masks(nn.Module):
    """A layer that Opacus does not know, and that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.dropout(x, 1e-9, self.training), self.weight)


class Folded(nn.Module):
    """Makes two outputs of each example."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


def refused(module: nn.Module, number: int = 12, **keys: Any) -> str:
    task = points_task()
    model = Full({}).attach(module, 1)
    with pytest.raises(InvalidInput) as caught:
        step_of(task, model, points(number), 1.0, **keys)
    assert_bare(model)
    return str(caught.value)


def assert_bare(model: AdaptedModel) -> None:
    """Check that nothing is left of how single examples were looked at."""
    plain = set(vars(nn.Parameter(torch.zeros(1))))
    for parameter in model.module.parameters():
        assert set(vars(parameter)) == plain
    for module in model.module.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not [name for name in vars(module) if "sample" in name or "activations" in name]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.SyncBatchNorm(5)])
def test_layers_that_mix_examples_are_refused_by_name(norm: nn.Module) -> None:
    message = refused(nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 3)))
    assert message.startswith(f"1: {type(norm).__name__} mixes the examples of a batch")
    assert "layer or group normalisation" in message


def test_a_model_that_mixes_examples_in_its_own_way_is_refused() -> None:
    assert "the model or the loss mixes the examples of a batch" in refused(seeded(BatchMean))


def test_a_parameter_without_gradients_of_single_examples_is_named_with_advice() -> None:
    message = refused(seeded(Positions))
    assert message.startswith("places.weight: gradients of single examples cannot be told apart; ")
    assert "adapter.trainable" in message
    assert "training.batch_size = 1" in message


def test_examples_along_another_axis_are_seen_whatever_the_size_of_a_batch() -> None:
    assert "inner.weight: gradients of single examples cannot be told apart" in refused(
        seeded(AnotherAxis), batch_size=5
    )


def test_a_layer_that_cannot_be_run_again_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    message = refused(seeded(Masks))
    assert message.startswith("gradients of single examples cannot be computed, the log says why; train an adapter")
    assert "vmap" in caplog.text


def test_a_model_whose_outputs_are_not_one_for_each_example_is_refused() -> None:
    assert "one output for each example" in refused(nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), Folded()))


def test_gradients_that_leave_something_out_are_refused() -> None:
    assert "inner.weight: gradients of single examples do not add up" in refused(seeded(Behind))


@pytest.mark.parametrize("make", [Positions, AnotherAxis, Behind, BatchMean, Masks])
def test_what_is_advised_works(make: type[nn.Module]) -> None:
    task, data = points_task(), points(12)
    model = Full({}).attach(seeded(make), 1)
    found_D = step_of(task, model, data, 0.1, batch_size=1)
    torch.testing.assert_close(found_D, expected_sum(one_by_one(task, model, data), 0.1), rtol=1e-3, atol=1e-5)


def test_without_examples_it_is_refused() -> None:
    with pytest.raises(InvalidInput, match="there are no training examples"):
        step_of(points_task(), adapted(points_task(), "full", {}), points(0), 1.0)


def test_without_opacus_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(dpsgd, "find_spec", lambda name: None if name == "opacus" else there(name))
    task = points_task()
    model = adapted(task, "full", {})
    with pytest.raises(CannotHide, match=r"need opacus: pip install 'roundtable\[privacy\]'"):
        step_of(task, model, points(12), 1.0)
    assert step_of(task, model, points(12), 1.0, batch_size=1).any(), "single examples need none"
    assert step_of(task, model, points(12), math.inf).any()


def test_nothing_is_left_in_the_model_afterwards() -> None:
    task, data = points_task(), points(12)
    model = adapted(task, "full", {})
    before = one_by_one(task, model, data)
    step_of(task, model, data, 0.1)
    assert_bare(model)
    assert torch.equal(one_by_one(task, model, data), before)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    run = replace(run_of(), tick=stop)
    how = {"sampling": 1.0, "clip": 1.0, "noise_multiplier": 0.0}
    with pytest.raises(KeyboardInterrupt):
        dpsgd.train(task, model, data, run, draws_of(), steps=2, **how)
    assert_bare(model)

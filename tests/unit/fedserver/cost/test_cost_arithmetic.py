"""What methods send, against the formulas and figures of the papers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.adapters import ADAPTERS
from fedclient.tasks.digits.network import make_network
from fedcodec import build_pipeline
from fedcore.errors import InvalidInput
from fedcore.layout import MAX_VALUES
from fedcore.methods import METHODS, find_method
from fedserver.cost.cost import Cost, cost_of
from fedserver.cost.shapes import Linear, Model, Shapes, find_model, shapes_of

DIGITS = Path(__file__).parents[4] / "examples" / "shapes-of-digits.toml"
Formula = Callable[[int, int, int, int], int]

# Up and down for one m × n matrix, rank r, K clients, as the papers write them; in RoLoRA both factors go down. RoLoRA:
# the rounds that train B.
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "full": (lambda m, n, r, K: m * n, lambda m, n, r, K: m * n),
    "fedit": (lambda m, n, r, K: r * (m + n), lambda m, n, r, K: r * (m + n)),
    "ffa-lora": (lambda m, n, r, K: r * m, lambda m, n, r, K: r * m),
    "rolora": (lambda m, n, r, K: r * m, lambda m, n, r, K: r * (m + n)),
    "flora": (lambda m, n, r, K: r * (m + n), lambda m, n, r, K: K * r * (m + n)),
    "fedex-lora": (lambda m, n, r, K: r * (m + n), lambda m, n, r, K: r * (m + n) + (K - 1) * r * (m + n)),
    "flexlora": (lambda m, n, r, K: r * (m + n), lambda m, n, r, K: r * (m + n)),
    "hetlora": (lambda m, n, r, K: r * (m + n), lambda m, n, r, K: r * (m + n)),
    "lora-fair": (lambda m, n, r, K: r * (m + n), lambda m, n, r, K: r * (m + n)),
    "fed-sb": (lambda m, n, r, K: r * r, lambda m, n, r, K: r * r),
}


def cost(model: str, method: str, rank: int, clients: int = 1) -> Cost:
    return cost_of(find_method(method), shapes_of(find_model(model)), rank, clients)


def one_matrix(m: int, n: int) -> Shapes:
    return shapes_of(Model(name="one", linear=[Linear(path="layer", shape=[m, n], role="target")]))


# -- figures of the Fed-SB paper (Singhal et al., 2025, figure 1), recounted ----------------------------------------


@pytest.mark.parametrize(
    ("model", "matrices", "lora", "clients", "fed_sb", "ratio"),
    [
        ("llama-3.2-3b", 196, 48_627_712, 5, (2_822_400, 5_017_600, 7_840_000), 31.0),
        ("mistral-7b", 224, 83_886_080, 25, (3_225_600, 5_734_400, 8_960_000), 234.1),
        ("gemma-2-9b", 294, 108_036_096, 25, (4_233_600, 7_526_400, 11_760_000), 229.7),
    ],
)
def test_language_models_cost_what_the_paper_counts(
    model: str, matrices: int, lora: int, clients: int, fed_sb: tuple[int, int, int], ratio: float
) -> None:
    assert len(shapes_of(find_model(model)).matrices) == matrices
    counted = [cost(model, "fed-sb", rank, clients) for rank in (120, 160, 200)]
    assert tuple(each.up.parameters for each in counted) == fed_sb
    assert tuple(each.down.parameters for each in counted) == fed_sb
    assert [each.up.bytes for each in counted] == [4 * parameters for parameters in fed_sb]
    fedit = cost(model, "fedit", 32, clients)
    assert (fedit.up.parameters, fedit.down.parameters) == (lora, lora)
    assert fedit.up.all_parameters == clients * lora
    for method in ("flora", "fedex-lora"):
        stacked = cost(model, method, 32, clients)
        assert (stacked.up.parameters, stacked.down.parameters) == (lora, clients * lora)
        assert round(stacked.down.parameters / counted[-1].down.parameters, 1) == ratio


def test_downloads_of_a_stack_in_millions() -> None:
    models = {"llama-3.2-3b": 5, "mistral-7b": 25, "gemma-2-9b": 25}
    millions = [round(cost(model, "flora", 32, K).down.parameters / 1e6, 2) for model, K in models.items()]
    assert millions == [243.14, 2097.15, 2700.90]


def test_bert_costs_what_the_paper_counts_and_every_round_sends_its_head() -> None:
    assert shapes_of(find_model("bert-base")).heads == (3 * 768, 3)
    assert [cost("bert-base", "fed-sb", rank).up.parameters for rank in (32, 48, 64)] == [26_883, 57_603, 100_611]
    assert cost("bert-base", "fedit", 32, 3).up.parameters == 1_181_955
    assert cost("bert-base", "fedit", 32, 3).up.all_parameters == 3_545_865
    assert cost("bert-base", "ffa-lora", 32).up.parameters == 592_131
    # The paper's 3,545,865 has the head thrice; the server sends one.
    assert cost("bert-base", "flora", 32, 3).down.parameters == 3_545_865 - 2 * 2_307


def test_ffa_sends_every_b_where_the_paper_counts_half_of_both_factors() -> None:
    sent = cost("llama-3.2-3b", "ffa-lora", 32).up.parameters
    assert sent == 24_772_608
    assert cost("llama-3.2-3b", "fedit", 32).up.parameters // 2 == 24_313_856


def test_lora_sb_trains_27_to_90_times_fewer() -> None:
    lora, sb = cost("llama-3.2-3b", "fedit", 32), cost("llama-3.2-3b", "fed-sb", 96)
    assert round(lora.up.parameters / sb.up.parameters, 1) == 26.9


# -- formulas ---------------------------------------------------------------------------------------------------------


@given(m=st.integers(1, 5000), n=st.integers(1, 5000), clients=st.integers(1, 50), data=st.data())
def test_every_method_sends_what_its_formula_says(m: int, n: int, clients: int, data: st.DataObject) -> None:
    assert set(FORMULAS) == set(METHODS)
    r = data.draw(st.integers(1, min(m, n)))
    for name, (up, down) in FORMULAS.items():
        found = cost_of(METHODS[name], one_matrix(m, n), r, clients)
        assert (found.up.turns[0], found.down.turns[0]) == (up(m, n, r, clients), down(m, n, r, clients))
        assert found.up.parameters == max(found.up.turns)
        for traffic in (found.up, found.down):
            assert traffic.all_bytes == traffic.bytes * clients == 4 * traffic.all_parameters


def test_rolora_sends_one_factor_in_turn_and_both_together_are_lora() -> None:
    found = cost("gemma-2-9b", "rolora", 32)
    assert sum(found.up.turns) == found.down.parameters == cost("gemma-2-9b", "fedit", 32).up.parameters
    assert found.up.turns[0] == cost("gemma-2-9b", "ffa-lora", 32).up.parameters


@pytest.mark.parametrize("name", METHODS)
def test_one_client_costs_what_each_of_many_does_but_where_others_are_sent_on(name: str) -> None:
    one, many = (cost("bert-base", name, 16, clients) for clients in (1, 200))
    assert one.up.parameters == many.up.parameters
    assert (one.down.parameters < many.down.parameters) == (name in {"flora", "fedex-lora"})
    assert METHODS[name].changes_base == (name in {"flora", "fedex-lora"})


def test_a_matrix_of_4096_in_half_precision() -> None:
    def kib(name: str, rank: int) -> tuple[float, float]:
        found = cost_of(METHODS[name], one_matrix(4096, 4096), rank, 10, bytes_per_value=2)
        return found.up.bytes / 1024, found.down.bytes / 1024

    assert kib("fedit", 16) == (256, 256)
    assert kib("ffa-lora", 16) == (128, 128)
    assert kib("flora", 16) == (256, 2560)
    assert kib("fedex-lora", 16) == (256, 2560)
    assert kib("fed-sb", 200) == (78.125, 78.125)


def test_only_fed_sb_has_a_set_up_and_it_stands_apart() -> None:
    found = cost_of(METHODS["fed-sb"], one_matrix(70, 30), 5, 4)
    assert found.setup_down.parameters == 5 * (70 + 30) + 5 * 5
    assert (found.setup_up.parameters, found.setup_up.bytes) == (70 * 30, 4 * 70 * 30)
    assert found.setup_vote_bytes_up == 263  # 2100 bits
    for name in set(METHODS) - {"fed-sb"}:
        other = cost("bert-base", name, 8)
        assert (other.setup_up.bytes, other.setup_down.bytes, other.setup_vote_bytes_up) == (0, 0, 0)


def test_rank_above_what_a_layer_can_have_is_refused_with_the_layer() -> None:
    for name in set(METHODS) - {"full"}:
        cost_of(METHODS[name], one_matrix(10, 128), 10, 1)
        with pytest.raises(InvalidInput, match="rank 11: layer is 10 × 128, so at most 10"):
            cost_of(METHODS[name], one_matrix(10, 128), 11, 1)


def test_method_that_is_unknown_names_the_nearest_and_all() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean 'fed-sb'.* known: full, fedit"):
        find_method("fedsb")


# -- against what really travels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "params"), [("fedit", {"rank": 16, "targets": ["hidden*"]}), ("full", {})])
@pytest.mark.parametrize(
    "stages",
    [
        ["raw"],
        ["bf16"],
        ["int8"],
        ["per-tensor", "int8"],
        ["top-k"],
        ["per-tensor", "top-k", "kmeans", "rice"],
        ["zstd"],
    ],
    ids="-".join,
)
def test_frames_of_a_real_adapter_have_the_size_that_is_said(
    method: str, params: dict[str, object], stages: list[str]
) -> None:
    pipeline = build_pipeline([{"codec": name} for name in stages])
    layout = ADAPTERS.get(METHODS[method].adapter)(params).attach(make_network(), 7).layout
    shapes = shapes_of(find_model(str(DIGITS)), ["hidden*"])
    said = cost_of(find_method(method), shapes, 16, 5, pipelines=(pipeline, pipeline)).up
    assert said.parameters == layout.num_values
    rng = np.random.default_rng(3)
    sizes = [tensor.num_values for tensor in layout.tensors]
    values = (rng.standard_normal(layout.num_values) * 1e-2).astype(np.float32)
    sent = {len(pipeline.encode(some, rng, sizes)) for some in (values, np.zeros_like(values))}
    assert said.max_frame_bytes is not None
    assert max(sent) <= said.max_frame_bytes
    assert (said.frame_bytes is not None) == (stages[-1] in {"raw", "bf16", "int8"})
    if said.frame_bytes is not None:
        assert sent == {said.frame_bytes}


def test_more_values_than_a_frame_can_hold_have_no_frame() -> None:
    raw = build_pipeline([{"codec": "raw"}])
    found = cost_of(METHODS["flora"], one_matrix(2**20, 2**20), 2**11, 17, pipelines=(raw, raw))
    assert found.down.parameters > MAX_VALUES > found.up.parameters
    assert (found.down.max_frame_bytes, found.down.frame_bytes) == (None, None)
    assert found.up.frame_bytes is not None

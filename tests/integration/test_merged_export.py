"""A merged model is one that transformers loads, and that computes what was trained."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedclient.adapters import ADAPTERS
from fedclient.adapters.base import AdaptedModel
from fedcore.errors import InvalidInput
from fedserver.export import Format
from fedserver.export.merged import CONV1D_LAYERS, CONV1D_MODELS
from tests.support.exports import export
from tests.support.text_models import save_bert, save_gpt2, save_llama

TOKENS = torch.arange(3, 63).reshape(2, 30)
LM = {"name": "hf-causal-lm", "model": "org/small"}
MOODS = {"name": "hf-sequence-classification", "model": "org/small", "labels": ["bad", "so", "good"]}
SAVE = {"llama": save_llama, "gpt2": save_gpt2, "bert": save_bert}
ALL_GPT2 = ["c_attn", "c_proj", "c_fc"]


class Case(NamedTuple):
    model: str
    adapter: dict[str, Any]


CASES = {
    "llama, lora": Case("llama", {"name": "lora", "rank": 4, "alpha": 6.0, "targets": ["*_proj"]}),
    "llama, lora on the output, and norms": Case(
        "llama", {"name": "lora", "rank": 4, "targets": ["lm_head", "q_proj"], "trainable": ["*norm*"]}
    ),
    "llama, ffa-lora": Case("llama", {"name": "ffa-lora", "rank": 3, "targets": ["*_proj"]}),
    "llama, lora-sb": Case("llama", {"name": "lora-sb", "rank": 4, "targets": ["*_proj"], "trainable": ["lm_head.*"]}),
    "llama, full": Case("llama", {"name": "full"}),
    "gpt2, transposed and tied": Case("gpt2", {"name": "lora", "rank": 4, "targets": ALL_GPT2}),
    "gpt2, lora-sb": Case("gpt2", {"name": "lora-sb", "rank": 4, "targets": ["c_proj"], "trainable": ["*ln_f*"]}),
    "gpt2, full": Case("gpt2", {"name": "full"}),
    "bert without its head, saved without a prefix": Case(
        "bert", {"name": "lora", "rank": 4, "targets": ["query", "*.dense"], "trainable": ["classifier.*"]}
    ),
    "bert, head alone": Case("bert", {"name": "full", "trainable": ["classifier.*"]}),
    "bert, full": Case("bert", {"name": "full"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name, save in SAVE.items():
        save(root / name)
    return root


def load(folder: Path, model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a folder as the task of this model does."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        loaded: nn.Module = (
            AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=3)
            if model == "bert"
            else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        )
    return loaded.eval()


def train(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """Return the adapted model with values far from those it began with."""
    params = {key: value for key, value in case.adapter.items() if key != "name"}
    model = ADAPTERS.get(case.adapter["name"])(params).attach(load(folder, case.model, dtype), 1)
    rng, layout = np.random.default_rng(0), model.layout
    if model.starts_from_gradients:
        model.write_basis(rng.normal(0, 0.3, layout.num_basis_values).astype(np.float32))
    model.write(model.read() + rng.normal(0, 0.1, layout.moving.num_values).astype(np.float32))
    model.module.eval()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(TOKENS).logits
    return result.float()


def merge(model: AdaptedModel, case: Case, base: Path, out: Path, **options: Any) -> Path:
    task = MOODS if case.model == "bert" else LM
    return export(model, case.adapter, out, task, form=Format.MERGED, base=base, **options).folder


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_transformers_loads_the_merged_model_and_computes_the_same(case: Case, bases: Path, tmp_path: Path) -> None:
    base = bases / case.model
    trained = train(base, case)
    out = merge(trained, case, base, tmp_path / "out")
    ours = logits(trained.module)
    torch.testing.assert_close(logits(load(out, case.model)), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(load(base, case.model)), ours, atol=1e-2)
    assert (
        AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == AutoTokenizer.from_pretrained(base)("abc").input_ids
    )
    if case.model == "bert":
        assert AutoModelForSequenceClassification.from_pretrained(out).config.id2label == {0: "bad", 1: "so", 2: "good"}


def test_what_was_not_trained_is_copied_bit_for_bit_and_nothing_is_lost(bases: Path, tmp_path: Path) -> None:
    case = Case("llama", {"name": "lora", "rank": 4, "targets": ["q_proj"]})
    out = merge(train(bases / "llama", case), case, bases / "llama", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (bases / "llama", out))
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["job_id"] == "job-1"


def test_shards_stay_shards_and_what_is_new_joins_the_last(bases: Path, tmp_path: Path) -> None:
    case = CASES["bert without its head, saved without a prefix"]
    sharded = tmp_path / "sharded"
    inner: Any = load(bases / "bert", "bert")
    inner.bert.save_pretrained(sharded, max_shard_size="30KB")
    names = {path.name for path in sharded.glob("*.safetensors")}
    assert len(names) > 2
    trained = train(sharded, case)
    out = merge(trained, case, sharded, tmp_path / "out")
    assert {path.name for path in out.glob("*.safetensors")} == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["classifier.weight"] == max(names)
    assert index["metadata"]["total_size"] == sum(
        4 * value.numel() for name in names for value in load_file(out / name).values()
    )
    torch.testing.assert_close(logits(load(out, "bert")), logits(trained.module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, bases: Path, tmp_path: Path
) -> None:
    case = Case("gpt2", {"name": "lora", "rank": 4, "alpha": 6.0, "targets": ALL_GPT2, "trainable": ["*ln_f*"]})
    base = tmp_path / "half"
    whole: Any = load(bases / "gpt2", "gpt2")
    whole.to(dtype).save_pretrained(base)
    half_ulp = 2**-8 if dtype is torch.bfloat16 else 2**-11
    trained = train(base, case)  # in float32, as a job without bf16 does
    out = merge(trained, case, base, tmp_path / "out")
    stored = load_file(base / "model.safetensors")
    values = {name: torch.from_numpy(v) for (_, name), v in trained.layout.unflatten(trained.read()).items()}
    for name, value in load_file(out / "model.safetensors").items():
        assert value.dtype is dtype
        path = name.removesuffix(".weight")
        if f"{path}.lora_A.weight" in values:
            update = (values[f"{path}.lora_B.weight"] @ values[f"{path}.lora_A.weight"]).T
            expected = stored[name].float() + 1.5 * update
            torch.testing.assert_close(value.float(), expected, rtol=half_ulp, atol=1e-6)
        else:
            assert torch.equal(value, values[name].to(dtype) if name in values else stored[name])


def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path: Path) -> None:
    side, count = 1024, 12
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))
    (tmp_path / "base").mkdir()
    save_file({f"{i}.weight": torch.zeros(side, side) for i in range(count)}, tmp_path / "base" / "model.safetensors")
    adapted = ADAPTERS.get("lora")({"rank": 2}).attach(model, 1)
    case = Case("none", {"name": "lora", "rank": 2})
    tracemalloc.start()
    merge(adapted, case, tmp_path / "base", tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 4 * side**2 < count * 4 * side**2


# -- what does not fit -----------------------------------------------------------------------------------------------


def small_base(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def adapted(trainable: list[str] | None = None, *, targets: list[str] | None = None) -> tuple[AdaptedModel, Case]:
    keys: dict[str, Any] = {"rank": 2, "targets": targets or ["block.0.c_proj"], "trainable": trainable or []}
    block = nn.ModuleDict({"c_proj": nn.Linear(4, 4, bias=False), "up": nn.Linear(4, 6)})
    model = nn.ModuleDict({"block": nn.ModuleList([block]), "head": nn.Linear(4, 3)})
    return ADAPTERS.get("lora")(keys).attach(model, 1), Case("none", {"name": "lora", **keys})


@pytest.mark.parametrize(
    ("tensors", "trainable", "message"),
    [
        ({"other__weight": torch.zeros(4, 4)}, [], r"has no block\.0\.c_proj\.weight; it has other\.weight"),
        ({"block__0__up__weight": torch.zeros(6, 4)}, [], r"has no block\.0\.c_proj\.weight; it has block\.0\.up"),
        ({"block__0__c_proj__weight": torch.zeros(4, 5)}, [], r"has shape \(4, 5\), the job's is \(4, 4\)"),
        ({"block__0__c_proj__weight": torch.zeros(4, 4, dtype=torch.int8)}, [], "is I8, 16 bytes; .* one of F32, F16"),
        ({"block__0__c_proj__weight": torch.zeros(4, 4)}, [], "config.json with model_type is missing"),
    ],
)
def test_base_that_does_not_fit_is_refused_and_nothing_is_left(
    tensors: dict[str, torch.Tensor], trainable: list[str], message: str, tmp_path: Path
) -> None:
    model, case = adapted(trainable)
    base = small_base(tmp_path / "base", **tensors)
    with pytest.raises(InvalidInput, match=message):
        merge(model, case, base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_trained_tensor_under_another_name_is_not_taken_for_a_new_head(tmp_path: Path) -> None:
    model, case = adapted(["head.*"], targets=["up"])
    up = torch.zeros(6, 4)
    with pytest.raises(InvalidInput, match=r"has no head\.weight, which the job trained but head\.gamma"):
        merge(
            model,
            case,
            small_base(tmp_path / "a", block__0__up__weight=up, head__gamma=torch.ones(3)),
            tmp_path / "out",
        )
    model, case = adapted(["*c_proj*"], targets=["up"])
    with pytest.raises(InvalidInput, match=r"has no block\.0\.c_proj\.weight, which the job trained"):
        merge(model, case, small_base(tmp_path / "b", block__0__up__weight=up), tmp_path / "out")


def test_second_copy_of_a_trained_weight_is_refused(bases: Path, tmp_path: Path) -> None:
    case = Case("gpt2", {"name": "full", "trainable": ["*wte*", "lm_head.*"]})
    trained = train(bases / "gpt2", case)
    base = tmp_path / "twins"
    whole: Any = load(bases / "gpt2", "gpt2")
    whole.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=r"lm_head\.weight holds the same values as transformer\.wte\.weight"):
        merge(trained, case, base, tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    out = load_file(merge(trained, case, base, tmp_path / "out") / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], tensors["lm_head.weight"])
    assert not torch.equal(out["transformer.wte.weight"], tensors["lm_head.weight"])


def test_value_that_the_bases_dtype_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    model, case = adapted(targets=["up"])
    model.write(np.full(model.layout.num_values, 1e3, dtype=np.float32))
    base = small_base(tmp_path / "base", block__0__up__weight=torch.zeros(6, 4, dtype=torch.float16))
    with pytest.raises(InvalidInput, match=r"block\.0\.up\.weight: value 1\.6e\+07 does not fit its dtype float16"):
        merge(model, case, base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:4], "no safetensors file"),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "a header of 1099511627776 bytes"),
        (lambda data: data[:20] + b"\xff" + data[21:], "damaged"),
        (lambda data: data[:-8], r"no dtype, shape or place in the file"),
    ],
)
def test_damaged_base_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    model, case = adapted(targets=["up"])
    base = small_base(tmp_path / "base", block__0__up__weight=torch.zeros(6, 4))
    file = base / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InvalidInput, match=message) as raised:
        merge(model, case, base, tmp_path / "out")
    assert str(file) in str(raised.value)


def test_folder_is_replaced_only_if_a_merge_wrote_all_of_it(bases: Path, tmp_path: Path) -> None:
    case = Case("llama", {"name": "lora", "rank": 4, "targets": ["q_proj"]})
    trained, base, out = train(bases / "llama", case), bases / "llama", tmp_path / "out"
    merge(trained, case, base, out)
    export(trained, case.adapter, out, LM, force=True)
    assert not (out / "tokenizer.json").exists()
    merge(trained, case, base, out, force=True)
    assert (out / "tokenizer.json").exists()
    (out / "tokenizer_of_mine.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"holds tokenizer_of_mine\.json, which no export wrote"):
        merge(trained, case, base, out, force=True)
    with pytest.raises(InvalidInput, match="is the base model's own folder"):
        merge(trained, case, out, out, force=True)


def test_format_that_does_not_fit_is_refused(bases: Path, tmp_path: Path) -> None:
    case = CASES["llama, full"]
    trained = train(bases / "llama", case)
    with pytest.raises(InvalidInput, match="name the folder of the base model's safetensors files with --base"):
        export(trained, case.adapter, tmp_path / "out", form=Format.MERGED)
    with pytest.raises(InvalidInput, match="adapter full is not low-rank"):
        export(trained, case.adapter, tmp_path / "out", form=Format.PEFT)
    with pytest.raises(InvalidInput, match="--base goes with format merged or peft"):
        export(trained, case.adapter, tmp_path / "out", base=bases / "llama")
    with pytest.raises(InvalidInput, match=r"holds no \*\.safetensors"):
        merge(trained, case, tmp_path, tmp_path / "out")


def test_layers_that_lie_transposed_are_those_of_transformers() -> None:
    import transformers

    models = Path(transformers.__file__).parent / "models"
    users = {file.parent.name for file in models.glob("*/modeling_*.py") if "Conv1D(" in file.read_text()}
    uses = {"openai": "openai-gpt"}
    known = {uses.get(name, name) for name in users if "pytorch_utils import Conv1D" in _source(models / name)}
    assert known == CONV1D_MODELS
    words = {
        line.partition("=")[0].strip().removeprefix("self.")
        for name in users
        for line in _source(models / name).splitlines()
        if "= Conv1D(" in line
    }
    assert words == CONV1D_LAYERS


def _source(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("modeling_*.py")))


# -- adapters of a part of a module ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_part_of_a_module_is_completed_from_the_base(bases: Path, tmp_path: Path) -> None:
    case = Case("bert", {"name": "lora", "rank": 2, "targets": ["query"], "trainable": ["*.LayerNorm.bias"]})
    trained = train(bases / "bert", case)
    with pytest.raises(InvalidInput, match=r"only the bias was trained, and peft saves whole modules: name the"):
        export(trained, case.adapter, tmp_path / "out", MOODS)
    out = export(trained, case.adapter, tmp_path / "out", MOODS, base=bases / "bert").folder
    loaded = PeftModel.from_pretrained(load(bases / "bert", "bert"), out)
    torch.testing.assert_close(logits(loaded.eval()), logits(trained.module), rtol=0, atol=1e-5)


def test_module_that_peft_cannot_tell_from_another_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    keys: dict[str, Any] = {"rank": 2, "targets": ["1.0"], "trainable": ["0.*"]}
    trained = ADAPTERS.get("lora")(keys).attach(model, 1)
    with pytest.raises(InvalidInput, match=r"peft takes 1\.0 for 0, which was trained whole: choose --format weights"):
        export(trained, {"name": "lora", **keys}, tmp_path / "out")
    folder = export(trained, {"name": "lora", **keys}, tmp_path / "out", form=Format.WEIGHTS).folder
    assert load_file(folder / "model.safetensors").keys() == {
        "1.0.lora_A.weight",
        "1.0.lora_B.weight",
        "0.weight",
        "0.bias",
    }

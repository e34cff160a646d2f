"""The tasks on Hugging Face models, with small real architectures that really train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel
from fedclient.adapters.full import Full
from fedclient.adapters.lora import Lora
from fedclient.device import supports_bf16
from fedclient.tasks.base import Split, TrainingRun
from fedclient.tasks.hf import task as hf_task
from fedclient.tasks.hf.causal_lm import HfCausalLm
from fedclient.tasks.hf.classification import HfSequenceClassification
from fedclient.tasks.hf.encoding import IGNORED, PADDING
from fedclient.tasks.hf.models import load_tokenizer
from fedclient.tasks.hf.task import HfTask, OutOfMemory
from fedcore.errors import ConfigError, InvalidInput
from fedcore.jobfile import TrainingSection
from tests.support.text_models import mood_rows, save_bert, save_gpt2, save_llama, write_jsonl

LM = {"model": "org/small", "max_length": 32}
CLASSES = {**LM, "labels": ["bad", "good"]}
MODELS = {"llama": save_llama, "gpt2": save_gpt2, "bert": save_bert}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads get in each other's way on work as small as this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for name, make in MODELS.items():
        make(root / name)
    write_jsonl(root / "rows.jsonl", mood_rows(60))
    return root


def lm(folder: Path, model: str = "llama", data: dict[str, str] | None = None, **params: Any) -> HfCausalLm:
    options = {"model": str(folder / model), "path": str(folder / "rows.jsonl"), **(data or {})}
    return HfCausalLm({**LM, **params}, options, 5)


def classifier(
    folder: Path, model: str = "bert", data: dict[str, str] | None = None, **params: Any
) -> HfSequenceClassification:
    options = {"model": str(folder / model), "path": str(folder / "rows.jsonl"), **(data or {})}
    return HfSequenceClassification({**CLASSES, **params}, options, 5)


def build(task: HfTask, adapter: dict[str, object] | None = None) -> AdaptedModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = task.build_model()
    return Full({}).attach(model, 1) if adapter is None else Lora(adapter).attach(model, 1)


def train(task: HfTask, model: AdaptedModel, data: Split, **keys: Any) -> dict[str, float]:
    settings = TrainingSection(**{"local_epochs": 3, "batch_size": 8, "learning_rate": 0.01, **keys})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        return task.train(model, data, TrainingRun(settings, torch.Generator().manual_seed(2), lambda _: None))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "targets"), [("llama", ["*_proj"]), ("gpt2", ["c_attn", "c_fc", "c_proj"])])
def test_language_model_learns_with_lora(folder: Path, model: str, targets: list[str]) -> None:
    task = lm(folder, model)
    data = task.load()
    adapted = build(task, {"rank": 4, "targets": targets})
    before = task.evaluate(adapted.module, data.held_out)
    metrics = train(task, adapted, data.train)
    after = task.evaluate(adapted.module, data.held_out)
    assert set(after) == {"loss", "accuracy", "perplexity"}
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert metrics["train_loss"] < before["loss"]
    assert after["loss"] < before["loss"] - 0.3


@pytest.mark.parametrize(
    ("model", "targets"), [("bert", ["query", "value", "*.dense"]), ("gpt2", ["c_attn"]), ("llama", ["*_proj"])]
)
def test_classifier_learns_with_lora(folder: Path, model: str, targets: list[str]) -> None:
    task = classifier(folder, model)
    data = task.load()
    adapted = build(task, {"rank": 4, "targets": targets})
    before = task.evaluate(adapted.module, data.train)
    assert set(train(task, adapted, data.train, local_epochs=16, learning_rate=0.005)) == {"train_loss"}
    after = task.evaluate(adapted.module, data.train)
    assert after["loss"] < before["loss"] - 0.1
    assert after["accuracy"] > 0.8
    config: Any = adapted.module.config
    assert config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("make", [lm, classifier])
def test_parts_of_a_batch_add_up_to_the_whole(folder: Path, make: Any) -> None:
    def trained(**params: Any) -> Tensor:
        task = make(folder, "llama", **params)  # without dropout, whose masks follow the parts
        model = build(task, {"rank": 4, "targets": ["*_proj"]})
        start_D = model.read()
        train(task, model, task.load().train, local_epochs=1, optimizer="sgd", learning_rate=0.1)
        return torch.from_numpy(model.read() - start_D)

    whole = trained()
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(trained(gradient_accumulation=3), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(trained(gradient_checkpointing=True), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [lm, classifier])
def test_gradients_add_up_over_the_examples_asked_for(folder: Path, make: Any) -> None:
    def gradients(samples: int, **params: Any) -> tuple[int, Tensor]:
        task = make(folder, "llama", **params)
        model = build(task)
        run = TrainingRun(TrainingSection(batch_size=16), torch.Generator().manual_seed(2), lambda _: None)
        done = task.add_gradients(model, task.load().train, run, samples)
        return done, torch.cat([p.grad.flatten() for p in model.parameters if p.grad is not None])

    done, whole = gradients(1000)
    assert done == len(make(folder, "llama").load().train)
    assert gradients(20)[0] == 20
    torch.testing.assert_close(gradients(1000, gradient_accumulation=5)[1], whole, rtol=0, atol=1e-4)
    task = make(folder, "llama")
    data, model = task.load().train, build(task)
    batches = torch.split(torch.randperm(len(data), generator=torch.Generator().manual_seed(2)), 16)
    values = [task.evaluate(model.module, Split(data.inputs[rows], data.targets[rows])) for rows in batches]
    before = sum(value["loss"] * len(rows) for value, rows in zip(values, batches, strict=True))
    with torch.no_grad():
        for parameter, step in zip(
            model.parameters, torch.split(whole, [p.numel() for p in model.parameters]), strict=True
        ):
            parameter.sub_(1e-3 / whole.norm() * step.view_as(parameter))
    values = [task.evaluate(model.module, Split(data.inputs[rows], data.targets[rows])) for rows in batches]
    after = sum(value["loss"] * len(rows) for value, rows in zip(values, batches, strict=True))
    assert after - before == pytest.approx(-1e-3 * whole.norm().item(), rel=0.15)  # the slope along the gradient


def test_checkpointing_is_on(folder: Path) -> None:
    model: Any = build(lm(folder, gradient_checkpointing=True)).module
    assert model.is_activation_checkpointing
    assert not model.config.use_cache


def test_bf16_holds_the_base_in_half_the_bytes_and_trains_in_float32(folder: Path) -> None:
    task = lm(folder, bf16=True)
    data = task.load()
    adapted = build(task, {"rank": 4, "targets": ["*_proj"]})
    frozen = {p.dtype for p in adapted.module.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in adapted.parameters} == {torch.float32}
    if not supports_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not compute in bfloat16")
    before = task.evaluate(adapted.module, data.train)["loss"]
    train(task, adapted, data.train)
    assert task.evaluate(adapted.module, data.train)["loss"] < before - 0.3


def test_cpu_without_bf16_is_an_error_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_task, "supports_bf16", lambda device: False)
    task = lm(folder, bf16=True)
    data = task.load().train
    with pytest.raises(ConfigError, match=r"task\.bf16: cpu does not compute in bfloat16; leave it out"):
        train(task, build(task), data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_quantisation_without_cuda_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.quantisation '4bit': needs a CUDA device, and this client has none"):
        lm(folder, quantisation="4bit").build_model()


def test_out_of_memory_advises(folder: Path) -> None:
    class Greedy(nn.Module):
        def forward(self, **batch: Tensor) -> Tensor:
            return torch.empty(1 << 50)

    task = lm(folder, gradient_accumulation=2)
    data = task.load().train
    greedy: Any = Greedy()
    greedy.config = build(task).module.config
    with pytest.raises(OutOfMemory, match=r"evaluation of at most 32 tokens: .*gradient_accumulation above 2.*bf16"):
        task.evaluate(greedy, data)
    greedy.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(OutOfMemory, match=r"a step of 8 examples .*gradient_checkpointing = true"):
        train(task, AdaptedModel(greedy, [("model", "weight", greedy.weight)]), data)


def test_other_failures_are_not_called_out_of_memory(folder: Path) -> None:
    task = lm(folder)
    data = task.load().train
    with pytest.raises(IndexError):
        task.evaluate(build(task).module, Split(data.inputs + 1000, data.targets))


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lm, classifier])
def test_evaluation_in_small_batches_is_the_same(folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(folder)
    model, data = build(task).module, task.load().train
    whole = task.evaluate(model, data)
    monkeypatch.setattr(hf_task, "EVALUATION_VALUES", 1)
    assert task.evaluate(model, data) == pytest.approx(whole, rel=1e-5)


def test_loss_is_that_of_transformers(folder: Path) -> None:
    task = lm(folder)
    model: Any = build(task).module
    data = task.load().train
    ids = data.inputs[0][data.inputs[0] != PADDING].long()[None]
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=ids).loss.item()
    ours = task.evaluate(model, Split(data.inputs[:1], data.targets[:1]))
    assert ours["loss"] == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing(folder: Path) -> None:
    task = classifier(folder)
    model, data = build(task).module, task.load().train
    with torch.no_grad():
        data.inputs[:3, 5:] = PADDING
        for parameter in model.parameters():
            parameter.mul_(5)  # so that what is attended to matters
    alone = [task.evaluate(model, Split(data.inputs[i : i + 1], data.targets[i : i + 1]))["loss"] for i in range(6)]
    together = task.evaluate(model, Split(data.inputs[:6], data.targets[:6]))["loss"]
    assert together == pytest.approx(sum(alone) / 6, rel=1e-5)


# -- data ------------------------------------------------------------------------------------------------------------


def texts(task: HfTask, split: Split) -> list[str]:
    tokenizer = load_tokenizer(Path(str(task.options.model)))
    return [tokenizer.decode(row[row != PADDING].tolist()) for row in split.inputs]


def test_text_becomes_tokens_with_an_end_and_long_text_is_split_or_cut(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "abcdefghij"}])
    data = {"path": str(file), "held_out": "0"}
    split = lm(folder, data=data, max_length=4).load().train
    assert texts(lm(folder), split) == ["abcd", "efgh", "ij<end>"]
    assert split.inputs[2].tolist()[3] == PADDING
    assert split.targets[2].tolist()[3] == IGNORED
    assert texts(lm(folder), lm(folder, data=data, max_length=4, long_text="cut").load().train) == ["abcd"]


def test_completion_alone_is_learned(folder: Path) -> None:
    task = lm(folder, text="{place}: ", completion="{label}", max_length=20)
    split = task.load().train
    for row, targets in zip(split.inputs, split.targets, strict=True):
        learned = targets != IGNORED
        tokenizer = load_tokenizer(folder / "llama")
        assert tokenizer.decode(row[learned].tolist()) in {"good<end>", "bad<end>"}
        assert tokenizer.decode(row[~learned & (row != PADDING)].tolist()).startswith("town ")


def test_template_puts_columns_into_text_and_values_are_not_templates(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"a": "{b}", "b": "2"}])
    task = lm(folder, text="{a}{b}", data={"path": str(file), "held_out": "0"})
    assert texts(task, task.load().train) == ["{b}2<end>"]


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "iid"},
        {"kind": "dirichlet", "column": "label", "alpha": 5.0},
        {"kind": "column", "column": "place"},
        {"kind": "files"},
    ],
    ids=lambda partition: str(partition["kind"]),
)
def test_shards_are_disjoint_complete_and_the_same_every_time(
    folder: Path, partition: dict[str, Any], tmp_path: Path
) -> None:
    rows = mood_rows(40)
    for number in range(4):
        write_jsonl(tmp_path / f"{number}.jsonl", rows[number::4])

    def load(shard: int) -> tuple[list[str], list[str]]:
        data = {"path": str(tmp_path), "shard": str(shard), "num_shards": "3", "held_out": "0.2"}
        task = classifier(folder, data=data, partition=partition)
        own = task.load()
        assert 0 < len(own.held_out) <= len(own.train)
        return texts(task, own.train), texts(task, own.held_out)

    shards = [load(shard) for shard in range(3)]
    assert sorted(text for parts in shards for part in parts for text in part) == sorted(row["text"] for row in rows)
    assert shards[1] == load(1)


def test_without_shards_all_rows_are_this_clients(folder: Path) -> None:
    data = classifier(folder, data={"held_out": "0"}).load()
    assert (len(data.train), len(data.held_out)) == (60, 0)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/models/x", "../x", "./x", "a/../b", "a/b/c", "~/x", "C:\\x", "https://x/y", ""])
def test_job_cannot_name_a_place(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"task\.model: a job names a model as NAME or OWNER/NAME"):
        HfCausalLm({"model": name}, {"path": "x"}, 1)


def test_name_that_is_a_folder_here_is_not_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(folder)
    task = HfCausalLm({"model": "llama"}, {"path": "rows.jsonl"}, 1)
    with pytest.raises(ConfigError, match="model llama: is not on this machine; say where it lies with --data model="):
        task.build_model()


def test_weights_that_are_not_safetensors_are_not_read(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors; other formats can hold code"):
        lm(tmp_path.parent, tmp_path.name, {"path": str(folder / "rows.jsonl")}).build_model()


def test_model_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"mine"')
    auto = '{"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},'
    (tmp_path / "config.json").write_text(auto + config.lstrip()[1:])
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        lm(tmp_path.parent, tmp_path.name, {"path": str(folder / "rows.jsonl")}).build_model()
    assert not (tmp_path / "ran").exists()


def test_encoder_is_no_language_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"bert: is no causal language model: .* missing"):
        lm(folder, "bert").build_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"data: .*say where the rows are: either path or dataset"),
        ({"path": "x", "dataset": "y"}, "either path or dataset"),
        ({"path": "x", "shard": "1"}, "shard and num_shards go together"),
        ({"path": "x", "shard": "2", "num_shards": "2"}, "shard 2 does not exist: shards are 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        HfCausalLm(LM, options, 1)


def test_other_things_that_do_not_fit_name_the_value_and_the_bound(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"task\.max_length 257: org/small takes at most 256 tokens"):
        lm(folder, max_length=257).build_model()
    with pytest.raises(InvalidInput, match=r"a label is none of task\.labels, bad, fine"):
        classifier(folder, labels=["bad", "fine"]).load()
    with pytest.raises(InvalidInput, match=r"1 files are too few for 2 shards"):
        lm(folder, partition={"kind": "files"}, data={"shard": "0", "num_shards": "2"}).load()
    with pytest.raises(ConfigError, match=r"no model lies in .*absent: config\.json is missing"):
        lm(folder, "absent").build_model()
    empty = write_jsonl(tmp_path / "x.jsonl", [{"text": ""}])
    with pytest.raises(InvalidInput, match="1 rows, 0 of them held out, leave nothing to train on"):
        lm(folder, data={"path": str(empty)}).load()

"""One way to train a large model, in a process of its own: `python -m benchmarks.large_model_steps WAY ...`.

Prints one JSON object. The peak of memory is that of the device as torch counts it, from the model being there; on the
processor, that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks import processes
from benchmarks.codecs import SEED, spread
from benchmarks.large_model import GRADIENTS, parse
from benchmarks.processes import MIB
from fedclient.adapters.base import AdaptedModel
from fedclient.adapters.lora import Lora
from fedclient.adapters.lora_sb import LoraSb
from fedclient.device import describe_device, select_device, supports_bf16
from fedclient.tasks.base import Split, TrainingRun
from fedclient.tasks.hf.causal_lm import HfCausalLm
from fedcore.adapters import ADAPTER_GROUP
from fedcore.jobfile import TrainingSection
from fedserver.cost.shapes import Model, find_model, shapes_of


def config_of(table: Model, head_dim: int, length: int) -> Any:
    """Return the configuration of a model of Llama's architecture with the shapes of `table`.

    Raises:
        SystemExit: it has other parameters than Llama has.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = {row.path.rpartition(".")[2]: row for row in table.linear}
    if missing := {"q_proj", "k_proj", "gate_proj", "lm_head"} - rows.keys():
        raise SystemExit(f"{table.name} is not of Llama's architecture: no {min(missing)}")
    config = LlamaConfig(
        vocab_size=rows["lm_head"].shape[0],
        hidden_size=rows["lm_head"].shape[1],
        intermediate_size=rows["gate_proj"].shape[0],
        num_hidden_layers=rows["q_proj"].count,
        num_attention_heads=rows["q_proj"].shape[0] // head_dim,
        num_key_value_heads=rows["k_proj"].shape[0] // head_dim,
        head_dim=head_dim,
        tie_word_embeddings=rows["lm_head"].role == "tied",
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.device("meta"):
        made = {name: value.numel() for name, value in LlamaForCausalLM(config).named_parameters()}
    if made != table.parameters():
        other = min(made.items() ^ table.parameters().items())
        raise SystemExit(f"{table.name} is not of Llama's architecture, or not with heads of {head_dim}: {other}")
    return config


def adapt(model: nn.Module, way: str, rank: int, lora_rank: int, targets: list[str]) -> AdaptedModel:
    """Adapt the model in place."""
    if way == "lora":
        return Lora({"rank": lora_rank, "targets": targets}).attach(model, SEED)
    if way == "peft":
        from peft import LoraConfig, get_peft_model

        peft: nn.Module = get_peft_model(model, LoraConfig(r=lora_rank, target_modules=targets, task_type="CAUSAL_LM"))
        trained = [(ADAPTER_GROUP, name, each) for name, each in peft.named_parameters() if each.requires_grad]
        return AdaptedModel(peft, trained)
    adapted = LoraSb({"rank": rank, "targets": targets}).attach(model, SEED)
    with torch.no_grad():
        for factor in adapted.basis.values():
            long, short = max(factor.shape), min(factor.shape)
            orthonormal = torch.linalg.qr(torch.randn(long, short, device=factor.device)).Q
            factor.copy_(orthonormal if factor.shape[0] == long else orthonormal.T)
    return adapted


def build(options: argparse.Namespace, way: str, device: torch.device) -> AdaptedModel:
    """Return the adapted model, with random weights, on the device."""
    from transformers import AutoModelForCausalLM

    maker: Any = AutoModelForCausalLM
    table = find_model(options.model)
    dtype = torch.bfloat16 if supports_bf16(device) else torch.float32
    with device:
        model = maker.from_config(config_of(table, options.head_dim, options.length), dtype=dtype)
    if options.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    targets = sorted({matrix.path.rpartition(".")[2] for matrix in shapes_of(table, heads=False).matrices})
    return adapt(model, way, options.rank, options.lora_rank, targets)


class Bench:
    """What is measured, on one adapted model."""

    def __init__(self, options: argparse.Namespace, way: str) -> None:
        self.options, self.device = options, select_device(options.device)
        self.adapted = build(options, way, self.device)
        bf16 = supports_bf16(self.device)
        params = {"model": "random", "max_length": options.length, "bf16": bf16}
        self.task = HfCausalLm(params, {"path": "."}, SEED)  # nothing is read there

    def now_s(self) -> float:
        """Return the time when the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step_figures(self) -> dict[str, Any]:
        """Return the seconds of each step, between the loop's ticks, and of reading what was trained."""
        ticks, reads = [], []
        options = self.options
        data = self._samples(options.batch * (options.warm_up + options.steps))
        self.task.train(self.adapted, data, self._run(lambda _: ticks.append(self.now_s())))
        for _ in range(options.repeats + 1):
            began_s = self.now_s()
            self.adapted.read()
            reads.append(self.now_s() - began_s)
        steps_s = [after - before for before, after in pairwise(ticks)]
        return {"steps_s": steps_s[options.warm_up - 1 :], "reads_s": reads[1:]}

    def gradient_figures(self) -> dict[str, Any]:
        """Return the seconds of a sum of gradients."""
        seconds, options = [], self.options
        for number in (options.batch, *(options.samples,) * options.repeats):  # the first one does not count
            data, began_s = self._samples(number), self.now_s()
            with self.adapted.measuring():
                self.task.add_gradients(self.adapted, data, self._run(lambda _: None), number)
            seconds.append(self.now_s() - began_s)
        return {"gradients_s": spread(seconds[1:], 3)}

    def _samples(self, number: int) -> Split:
        config: Any = self.adapted.module.config
        ids_NT = torch.randint(config.vocab_size, (number, self.options.length), device=self.device)
        return Split(ids_NT.int(), ids_NT)

    def _run(self, tick: Callable[[float], None]) -> TrainingRun:
        settings = TrainingSection(batch_size=self.options.batch)
        return TrainingRun(settings, torch.Generator().manual_seed(SEED), tick)


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, and memory in MiB."""
    torch.set_num_threads(options.threads)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    bench = Bench(options, way)
    is_cuda = bench.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device) if is_cuda else processes.rss_bytes(os.getpid())
    found = bench.gradient_figures() if way == GRADIENTS else bench.step_figures()
    peak = torch.cuda.max_memory_allocated(bench.device) if is_cuda else processes.peak_bytes(os.getpid())
    return {
        "device": describe_device(bench.device),
        "cuda": torch.version.cuda or "none",
        "dtype": "bfloat16" if supports_bf16(bench.device) else "float32",
        "parameters": sum(find_model(options.model).parameters().values()),
        "trained": bench.adapted.layout.moving.num_values,
        **found,
        "before_mib": round(before / MIB, 1),
        "peak_mib": round(peak / MIB, 1),
        "host_peak_mib": round(processes.peak_bytes(os.getpid()) / MIB, 1),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], parse(sys.argv[2:]))) + "\n")

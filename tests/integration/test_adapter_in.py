"""A second job goes on from what a first one exported, whatever is killed between; and from what peft itself wrote."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedclient.adapters.lora import Lora
from fedclient.basedigest import base_digest
from fedcore.adapters import PEFT_PREFIX
from fedcore.errors import InvalidInput, JobFailed
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout
from fedserver.initial.adapter import GivenValues
from fedserver.initial.folder import open_adapter
from fedserver.initial.tensors import TensorFile
from fedsim.simulation import make_clients, simulate
from tests.support.adapters import factors, write_adapter
from tests.support.processes import Deployment, deployed, run
from tests.support.text_models import mood_rows, save_llama, write_jsonl

CLIENTS = 2
# peft still asks transformers under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("given")) as deployment:
        yield deployment


def job_file(folder: Path, name: str, adapter: str, *, rounds: int = 2, seed: int = 7, **params: Any) -> Path:
    keys = {"name": adapter, "rank": 4, "alpha": 12.0, "targets": ["hidden*"], **params}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
    file = folder / f"{name}.toml"
    file.write_text(
        f'[job]\nname = "{name}"\nrounds = {rounds}\nseed = {seed}\n[task]\nname = "digits"\n[adapter]\n'
        + "\n".join(lines)
        + f"\n[training]\nlearning_rate = 0.01\n[schedule]\ncohort = {CLIENTS}\nquorum = {CLIENTS}\ndeadline_s = 120\n"
    )
    return file


def fedserver(deployment: Deployment, *arguments: str | Path, expect: int = 0) -> str:
    done = run("fedserver", *arguments, "--folder", deployment.state)
    assert done.wait() == expect, done.story()
    return (done.err if expect else done.out)[-1]


def weights(folder: Path) -> dict[str, bytes]:
    found = load_file(folder / "adapter_model.safetensors")
    assert all(values.dtype == np.float32 for values in found.values())
    return {name: values.tobytes() for name, values in found.items()}


@pytest.mark.parametrize(("adapter", "seed"), [("lora", 7), ("ffa-lora", 8)])
def test_an_exported_adapter_is_a_start_bit_for_bit_whatever_is_killed(
    deployment: Deployment, tmp_path: Path, adapter: str, seed: int
) -> None:
    first = job_file(tmp_path, f"first-{adapter}", adapter)
    started = deployment.start_digits_clients(CLIENTS)
    deployment.finish(fedserver(deployment, "submit", first))
    fedserver(deployment, "export", f"first-{adapter}", "--out", tmp_path / "out")
    for client in started:
        client.stop()

    # Nobody is there to make version 0 when the server dies.
    second = job_file(tmp_path, f"second-{adapter}", adapter, seed=seed)
    job_id = fedserver(deployment, "submit", second, "--adapter", tmp_path / "out")
    deployment.server.kill()
    (tmp_path / "out").rename(tmp_path / "moved")
    deployment.start_server()
    deployment.start_digits_clients(CLIENTS)
    history = deployment.finish(job_id)
    for version, folder in ((0, tmp_path / "zero"), (2, tmp_path / "two")):
        fedserver(deployment, "export", job_id, "--version", str(version), "--out", folder)
    assert weights(tmp_path / "zero") == weights(tmp_path / "moved")
    assert weights(tmp_path / "two") != weights(tmp_path / "moved")
    card = (tmp_path / "zero" / "README.md").read_text(encoding="utf-8")
    assert deployment.status(job_id)["adapter_sha256"] in card
    for client in deployment.clients.values():
        client.stop()

    # With the same seed clients hold the same examples out: what training began with is what training had ended with.
    last = deployment.history(f"first-{adapter}")[-1]
    assert (history[0]["evaluation"] == last["evaluation"]) == (seed == 7)
    simulated = run(
        *("fedsim", "run", second, "--adapter", tmp_path / "moved", "--clients", str(CLIENTS)),
        *("--out", tmp_path / "sim", "--no-pooled", "--json"),
    )
    assert simulated.wait() == 0, simulated.story()
    assert json.loads(simulated.out[-1])["model_sha256"] == history[-1]["sha256"]


@pytest.mark.parametrize(
    ("adapter", "params", "text"),
    [
        ("lora", {"rank": 8}, "adapter_config.json: r 4: the job's adapter.rank is 8"),
        ("lora", {"alpha": 8.0}, "adapter_config.json: lora_alpha 12"),
        ("lora-sb", {"alpha": None}, "adapter.name 'lora-sb': a job cannot start from a PEFT adapter"),
    ],
)
def test_an_adapter_that_is_not_the_jobs_is_refused_before_anything_is_sent(
    tmp_path: Path, adapter: str, params: dict[str, Any], text: str
) -> None:
    folder = write_adapter(tmp_path / "adapter", factors(rank=4), r=4, lora_alpha=12)
    file = job_file(tmp_path, "refused", adapter, **params)
    # There is no such state folder: what is wrong with the adapter is told first.
    done = run("fedserver", "submit", file, "--adapter", folder, "--folder", tmp_path / "none")
    assert done.wait() == 3, done.story()
    assert text in done.err[-1]


# -- what peft wrote -------------------------------------------------------------------------------------------------


def peft_folder(base: Path, folder: Path, **config: Any) -> Any:
    """Save an adapter of peft's own for `base` into `folder`, far from where it began, and return the adapted model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def llama_job(adapter: str = "lora") -> Job:
    return parse_job(
        {
            "job": {"name": "llama", "rounds": 1, "seed": 2},
            "task": {"name": "hf-causal-lm", "model": "small", "max_length": 32},
            "adapter": {"name": adapter, "rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
            "schedule": {"cohort": 1},
        },
        "llama",
    )


def test_what_peft_wrote_means_the_same_here_and_is_version_0(tmp_path: Path) -> None:
    base, folder = save_llama(tmp_path / "model"), tmp_path / "adapter"
    theirs = peft_folder(base, folder)
    expected = load_file(folder / "adapter_model.safetensors")
    job = llama_job()

    ours = Lora(job.adapter.params).attach(AutoModelForCausalLM.from_pretrained(base), 1)
    values_D = ours.read_all()
    with open_adapter(folder, job) as found:
        GivenValues(TensorFile(found.weights), ours.layout).fill(values_D, 0)
        data = {"model": str(base), "path": str(write_jsonl(tmp_path / "rows.jsonl", mood_rows(12)))}
        simulated = asyncio.run(simulate(job, make_clients(job, 1, data), adapter=found))
    ours.write(values_D)
    tokens = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        difference = (ours.module.eval()(tokens).logits - theirs(tokens).logits).abs().max().item()
        effect = (theirs(tokens).logits - theirs.unload()(tokens).logits).abs().max().item()
    assert difference < 1e-5 < 1e-2 < effect

    state = b"".join(
        expected[PEFT_PREFIX + tensor.name].tobytes() for tensor in Layout.from_json(simulated.layout).tensors
    )
    assert simulated.history[0]["sha256"] == hashlib.sha256(state).hexdigest()
    assert simulated.history[1]["sha256"] != simulated.history[0]["sha256"]
    assert simulated.status["base_digest"] == base_digest(base)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"use_dora": True}, "use_dora true"),
        ({"use_rslora": True}, "use_rslora true"),
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern {"),
        ({"bias": "lora_only"}, 'bias "lora_only"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa"'),
    ],
)
def test_what_peft_wrote_and_no_job_can_do_is_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    peft_folder(save_llama(tmp_path / "model"), tmp_path / "adapter", **config)
    with pytest.raises(InvalidInput) as caught, open_adapter(tmp_path / "adapter", llama_job()):
        pass
    assert text in str(caught.value)


def test_layers_that_the_job_does_not_adapt_end_it(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "model")
    peft_folder(base, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    data = {"model": str(base), "path": str(write_jsonl(tmp_path / "rows.jsonl", mood_rows(12)))}
    job = llama_job()
    with open_adapter(tmp_path / "adapter", job) as found, pytest.raises(JobFailed) as caught:
        asyncio.run(simulate(job, make_clients(job, 1, data), adapter=found))
    for text in ("missing: model.layers.0.self_attn.v_proj.lora_A.weight", "not in the job's model", "k_proj"):
        assert text in str(caught.value)

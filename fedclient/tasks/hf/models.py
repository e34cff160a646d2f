"""Finds and loads models and tokenizers: safetensors only, and never code that comes with them."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch

from fedcore.errors import ConfigError

Quantisation = Literal["none", "4bit"]
Head = Literal["causal-lm", "sequence-classification"]

# A hub has more than these in a repository: weights in other formats, which can hold code, and folders of variants.
_DOWNLOADED: Final = ["*.safetensors", "*.json", "*.txt", "*.model"]

_log: Final = logging.getLogger(__name__)


def locate(name: str, revision: str | None, path: Path | None, *, download: bool) -> Path:
    """Return the folder that holds model `name`.

    What a job names is looked up among downloaded models alone; it is never taken for a path.

    Args:
        name: the model as the job names it.
        revision: of a downloaded model.
        path: where the client's owner says that the model lies; then nothing is looked up.
        download: whether the owner allows to fetch it from the hub.

    Raises:
        ConfigError: it is not there, or holds what is not loaded.
    """
    if find_spec("transformers") is None:
        raise ConfigError("tasks on Hugging Face models need transformers: pip install 'roundtable[hf]'")
    folder = _snapshot(name, revision, download) if path is None else path
    if not (folder / "config.json").is_file():
        adapter = ", but a PEFT adapter" if (folder / "adapter_config.json").is_file() else ""
        raise ConfigError(f"model {name}: no model lies in {folder}{adapter}: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model {name}: {folder} has no *.safetensors; other formats can hold code and are not read")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of the model in `folder`.

    Raises:
        ConfigError: there is none, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def load_model(folder: Path, head: Head, *, bf16: bool, quantisation: Quantisation, **config: Any) -> Any:
    """Return the model in `folder`, on the CPU unless it is quantised.

    A head that the folder does not hold is drawn from torch's global generator; anything else must be there.

    Args:
        folder: from `locate`.
        head: what the model is to give.
        bf16: whether weights are bfloat16; else float32.
        quantisation: ``4bit`` packs the weights of linear layers into NF4 (Dettmers et al., QLoRA, 2023).
        config: what is set in the model's configuration.

    Raises:
        ConfigError: it cannot be loaded, lacks weights, or cannot be quantised here.
    """
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = torch.bfloat16 if bf16 else torch.float32
    loader: Any = (
        transformers.AutoModelForCausalLM if head == "causal-lm" else transformers.AutoModelForSequenceClassification
    )
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **_quantised(quantisation, dtype),
            **config,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{folder}: cannot be loaded for {head}: {error}") from error
    missing = sorted(report["missing_keys"])
    if head == "causal-lm" and missing:
        raise ConfigError(
            f"{folder}: is no causal language model: {missing[0]} and {len(missing) - 1} more are missing"
        )
    if missing:
        _log.info("weights drawn from the job's seed", extra={"model": str(folder), "weights": missing})
    model.config.use_cache = False
    return model


def _quantised(quantisation: Quantisation, dtype: torch.dtype) -> dict[str, Any]:
    if quantisation == "none":
        return {}
    if not torch.cuda.is_available():
        raise ConfigError(f"task.quantisation {quantisation!r}: needs a CUDA device, and this client has none")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"task.quantisation {quantisation!r}: needs bitsandbytes: pip install 'roundtable[quantisation]'"
        )
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": how, "device_map": {"": torch.cuda.current_device()}}


def _snapshot(name: str, revision: str | None, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_DOWNLOADED,
            ignore_patterns=["*/*"],
            local_files_only=not download,
        )
    except (OSError, ValueError) as error:
        hint = "" if download else "; say where it lies with --data model=PATH, or allow --data download=true"
        raise ConfigError(f"model {name}: is not on this machine{hint}: {error}") from error
    return Path(found)

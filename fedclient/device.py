"""Where a client computes."""

from __future__ import annotations

import torch

from fedcore.errors import ConfigError


def select_device(name: str) -> torch.device:
    """Return the device called `name`.

    Args:
        name: ``"auto"`` takes CUDA where there is any, else the CPU; otherwise ``"cpu"``, ``"cuda"`` or
            ``"cuda:1"``.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, colon, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not index.isdecimal())):
        raise ConfigError(f"device {name[:80]!r}: known: auto, cpu, cuda, cuda:0, cuda:1 …")
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= found:
        raise ConfigError(f"device {name!r}: this machine has {found} usable CUDA devices")
    return torch.device("cuda", int(index or 0))


def describe_device(device: torch.device) -> str:
    """Return one line for logs and status: ``cpu (1 thread)``, ``cuda:0 NVIDIA H200``."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' if threads > 1 else ''})"


def supports_bf16(device: torch.device) -> bool:
    """Return whether `device` computes in bfloat16; a CPU without the instructions would take minutes for seconds."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public name for it

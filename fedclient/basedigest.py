"""One digest for the weights of a base model: two that differ in a single bit have different digests.

No torch at import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedcore.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE_BYTES: Final = 1 << 24
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own bound
# As safetensors calls them; a type that is not here goes by torch's name.
_DTYPES: Final = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}


def base_digest(model: nn.Module | Path) -> str:
    """Return SHA-256 (hex) over names, shapes, dtypes and bytes of all weights, whatever their order.

    Reads piece by piece: no more than 16 MiB beside the model, wherever that lies.

    Args:
        model: a model before an adapter is attached: its parameters and what buffers it saves, a weight with two names
            counted under the first; or a safetensors file or a folder of such, in any number of files. Both give the
            same digest where `save_pretrained` or `save_file` wrote the model. A file is hashed once in a process, and
            again when its size or its time of change differ.

    Raises:
        InvalidInput: there is no safetensors file, one is damaged, or two hold a tensor of one name.
    """
    if isinstance(model, Path):
        return _of_files(model)
    return _of_weights(weights_of(model))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model saves, by name: the very parameters and buffers, no copies."""
    from torch import Tensor

    # A module may save other things too, which are no weights.
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def frozen_digest(weights: Mapping[str, Tensor], moving: Iterable[Tensor]) -> str | None:
    """Return the digest of those of a base's weights that stay as they are; None: every parameter is trained.

    Without frozen parameters the buffers alone, which each client keeps for itself, make no base.

    Args:
        weights: of the model before an adapter was attached, from `weights_of`.
        moving: what is trained, or set by the start of the job: that comes from the server.
    """
    from torch import nn

    left_out = {id(tensor) for tensor in moving}
    frozen = {name: tensor for name, tensor in weights.items() if id(tensor) not in left_out}
    return _of_weights(frozen) if any(isinstance(tensor, nn.Parameter) for tensor in frozen.values()) else None


def _of_weights(weights: Mapping[str, Tensor]) -> str:
    tensors: dict[str, str] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in weights.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        dtype = _DTYPES.get(str(tensor.dtype), str(tensor.dtype))
        tensors[name] = _of_tensor(dtype, list(tensor.shape), _pieces_of(tensor))
    return _together(tensors)


def _of_files(path: Path) -> str:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path}: holds no *.safetensors")
    tensors: dict[str, str] = {}
    for file in files:
        try:
            stat = file.stat()
            found = _of_file(file.absolute(), stat.st_size, stat.st_mtime_ns)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{file}: cannot be read as safetensors: {error}") from error
        if twice := sorted(found.keys() & tensors):
            raise InvalidInput(f"{file}: tensor {twice[0]} is in another file of {path} too")
        tensors |= found
    return _together(tensors)


@lru_cache(maxsize=1024)
def _of_file(file: Path, size: int, mtime_ns: int) -> Mapping[str, str]:
    """Return a digest for each tensor of a file; `size` and `mtime_ns` are there for the cache."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
        header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        tensors: dict[str, str] = {}
        for name, row in header.items():
            start, end = (8 + header_bytes + offset for offset in row["data_offsets"])
            if not 8 + header_bytes <= start <= end <= size:
                raise ValueError(f"tensor {name} ends at byte {end} of {size}")
            stream.seek(start)
            pieces = (stream.read(min(_PIECE_BYTES, end - at)) for at in range(start, end, _PIECE_BYTES))
            tensors[name] = _of_tensor(row["dtype"], row["shape"], pieces)
    return tensors


def _pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the tensor's values in row-major order, as they lie in memory."""
    import torch

    flat = tensor.detach().reshape(-1)
    step = _PIECE_BYTES // flat.element_size()
    for start in range(0, len(flat), step):
        yield flat[start : start + step].contiguous().cpu().view(torch.uint8).numpy().data


def _of_tensor(dtype: str, shape: list[int], pieces: Iterator[bytes | memoryview]) -> str:
    digest = hashlib.sha256(json.dumps([dtype, shape]).encode() + b"\n")
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _together(tensors: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()

"""Opens a PEFT adapter's folder for the operator's commands."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedserver.export.base import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from fedserver.initial.adapter import MAX_ADAPTER_BYTES, MAX_CONFIG_BYTES, GivenAdapter, check_adapter


class OpenAdapter(NamedTuple):
    """What a folder holds; `weights` is mapped, and its SHA-256 is `given.digest`."""

    given: GivenAdapter
    weights: memoryview


@contextmanager
def open_adapter(folder: Path, job: Job) -> Iterator[OpenAdapter]:
    """Map the weights in `folder` for the block, once they are known to fit the job.

    Raises:
        InvalidInput: the folder holds no PEFT adapter, or one that the job cannot start from.
    """
    config = folder / ADAPTER_CONFIG_FILE
    weights = folder / ADAPTER_FILE
    try:
        with config.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        with weights.open("rb") as file:
            size = file.seek(0, 2)
            if not 0 < size <= MAX_ADAPTER_BYTES:
                raise InvalidInput(f"{weights}: {size} bytes, expected 1 to {MAX_ADAPTER_BYTES}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        hint = "; adapter_model.bin can hold code and is not read" if (folder / "adapter_model.bin").exists() else ""
        missing = config if not config.is_file() else weights
        raise InvalidInput(f"{folder}: no PEFT adapter: {missing.name}: {error.strerror}{hint}") from error
    with mapped, memoryview(mapped) as view:
        try:
            check_adapter(job, text, view)
        except InvalidInput as error:
            raise InvalidInput("\n".join(f"{folder}: {line}" for line in str(error).splitlines())) from error
        yield OpenAdapter(GivenAdapter(text, hashlib.sha256(view).hexdigest()), view)

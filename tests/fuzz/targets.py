"""Every fuzz target: one for each reader of bytes that a peer, a person or a damaged disk may have changed."""

from __future__ import annotations

from typing import Final

from tests.fuzz import (
    adapter_targets,
    export_targets,
    identity_targets,
    job_targets,
    privacy_targets,
    state_targets,
    upload_targets,
    wire_targets,
)
from tests.fuzz.target import Target

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for module in (
        wire_targets,
        upload_targets,
        state_targets,
        job_targets,
        privacy_targets,
        identity_targets,
        adapter_targets,
        export_targets,
    )
    for target in module.TARGETS
}

"""What the server takes of a private job's updates, over real connections: no longer than its noise is made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import UpdateResult
from fedcore.jobfile import Job, parse_job
from fedcore.messages import WorkKind
from fedsim.transport import InProcessTransport
from tests.support.player import LAYOUT, playing
from tests.support.server import running_server, small_job

SERVER = {"mechanism": "dp-fedavg", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}


def make_job(privacy: dict[str, Any]) -> Job:
    tree = small_job(max_retries=0).model_dump(mode="json")
    return parse_job({**tree, "aggregator": {"max_examples": 1}, "privacy": privacy}, "job")


@pytest.mark.parametrize(
    ("privacy", "length", "changes", "result"),
    [
        (SERVER, 1.0, {}, UpdateResult.ACCEPTED),
        (SERVER, 1.001, {}, UpdateResult.OUT_OF_BOUNDS),
        ({**SERVER, "noise": "local"}, 30.0, {}, UpdateResult.ACCEPTED),
        (SERVER, 1.0, {"within_clip": 1}, UpdateResult.MALFORMED),
        ({**SERVER, "noise_multiplier": 0.05, "adaptive": {}}, 1.0, {}, UpdateResult.MALFORMED),
        ({**SERVER, "noise_multiplier": 0.05, "adaptive": {}}, 1.0, {"within_clip": 0}, UpdateResult.ACCEPTED),
    ],
)
async def test_updates_are_held_to_the_clip(
    tmp_path: Path, privacy: dict[str, Any], length: float, changes: dict[str, Any], result: UpdateResult
) -> None:
    async with running_server(tmp_path) as server:
        await server.federation.submit(make_job(privacy).to_json())
        identity = await server.enrol("ann")
        async with playing(InProcessTransport(server.federation, "ann"), identity.signing_key) as player:
            while (work := await player.next_work()).kind is not WorkKind.TRAIN:
                await player.answer(work)
            values = np.full(LAYOUT.num_values, length / LAYOUT.num_values**0.5, dtype=np.float32)
            state = await player.answer(work, values, num_examples=1, metrics={}, **changes)
            assert state.result is result, state.text

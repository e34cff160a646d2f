"""What an update hides by its draws: who knows the job, its seed and the values still cannot repeat them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.guard import Guard
from fedclient.ledger import MemoryLedger
from fedclient.residuals import MemoryResiduals
from fedclient.trainer import Evaluation, Trained, Work
from fedclient.updates import UpdateMaker
from fedcodec import build_pipeline
from fedcore.jobfile import parse_job
from fedcore.layout import Layout, Vector
from fedcore.messages import Assignment, UpdateHeader, WorkKind
from fedcore.rng import stream
from tests.support.workers import PlainWorker

LAYOUT = Layout.of([("adapter", "a", (2000,), "float32")])
VALUES = np.random.default_rng(0).uniform(-1, 1, 2000).astype(np.float32)
BASE = build_pipeline([{"codec": "raw"}]).encode(np.zeros(2000, np.float32), stream(0))
RQM = [{"codec": "rqm"}]
NOISE = [{"codec": "clip"}, {"codec": "gaussian-noise"}]
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(2)]


class Worker(PlainWorker):
    """Trains to the same difference every time."""

    def __init__(self, delta_D: Vector) -> None:
        self._delta_D = delta_D

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        return LAYOUT, self._delta_D

    def layout(self, work: Work) -> Layout:
        return LAYOUT

    def train(self, work: Work, base_D: Vector, **options: Any) -> Trained:
        return Trained(self._delta_D, 10, {}, None)

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        return Evaluation(0, {})

    def forget(self, job_id: str) -> None:
        pass


def sent(
    stages: list[dict[str, Any]], *, key: int = 0, seed: int = 5, delta_D: Vector = VALUES
) -> tuple[bytes, UpdateHeader]:
    tree = {"job": {"name": "j", "rounds": 9}, "task": {"name": "toy"}, "schedule": {"cohort": 1}}
    job = parse_job({**tree, "compression": {"uplink": stages}}, "test").to_json()
    maker = UpdateMaker(Worker(delta_D), KEYS[key], "fed", "c1", MemoryResiduals(), Guard(MemoryLedger()))
    work = Assignment("cd" * 16, "ab" * 16, job, 0, WorkKind.TRAIN, seed, LAYOUT.digest, "0" * 64, len(BASE), 60.0)
    update = maker.update(work, memoryview(BASE), lambda part: None, threading.Event())
    return bytes(update.frame[:]), UpdateHeader.from_bytes(update.header)


def test_an_update_that_is_made_twice_is_the_same_twice() -> None:
    for stages in (RQM, NOISE):
        assert sent(stages)[0] == sent(stages)[0]


def test_draws_follow_from_the_clients_key_its_work_and_its_values() -> None:
    nearly = VALUES.copy()
    nearly[0] = np.nextafter(nearly[0], np.float32(0))
    for stages in (RQM, NOISE):
        frames = {
            sent(stages)[0],
            sent(stages, key=1)[0],
            sent(stages, seed=6)[0],
            sent(stages, delta_D=nearly)[0],
        }
        assert len(frames) == 4


def test_the_same_values_through_other_stages_are_hidden_by_other_draws() -> None:
    """Else two jobs, or one more with a little more noise, would take the noise out: 2 y - y' is the update."""
    kinds: list[list[dict[str, Any]]] = [
        [{"codec": "clip", "norm": 1e9}, {"codec": "gaussian-noise", "std": std}] for std in (0.01, 0.02)
    ]
    one, two = (build_pipeline(stages).decode(sent(stages)[0], LAYOUT.sizes) for stages in kinds)
    taken_out = np.linalg.norm(2 * one - two - VALUES) / np.sqrt(VALUES.size)
    assert taken_out == pytest.approx(np.hypot(0.02, 0.02), rel=0.1)
    rows = [np.frombuffer(sent([{"codec": "rqm", "extension": x}])[0], np.uint8)[-900:] for x in (1.0, 1.1)]
    assert np.mean(rows[0] == rows[1]) < 0.2


def test_the_seed_that_the_server_knows_is_not_enough_to_draw_the_same() -> None:
    for stages in (RQM, NOISE):
        assert sent(stages)[0] != build_pipeline(stages).encode(VALUES, stream(5, "encode"), LAYOUT.sizes)
    # What hides nothing does follow from it: the server, or who audits it, can say what a client must have sent.
    int8 = [{"codec": "int8"}]
    assert sent(int8)[0] == build_pipeline(int8).encode(VALUES, stream(5, "encode"), LAYOUT.sizes)


def test_the_error_of_an_update_that_hides_is_not_told() -> None:
    assert sent(RQM)[1].encoding_error is None
    assert sent(NOISE)[1].encoding_error is None
    assert sent([{"codec": "int8"}])[1].encoding_error is not None

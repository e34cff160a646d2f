"""Audits of what hides a client as a whole, by whoever adds the noise: the server, the clients together, or each alone.

One client's update is far longer than the clip, or nothing; the others send nothing. A sound mechanism fails an audit
here with a chance of 10⁻⁶; the draws are fixed, so that it does not by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedclient import clipping
from fedcore.draws import PrivateDraws
from fedcore.jobfile import Job
from fedcore.messages import UpdateHeader, WorkKind
from fedcore.privacy import DpFedAvg
from fedprivacy.audit import audit
from fedprivacy.events import Adjacency
from fedprivacy.jobs import Accounting
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.noise import next_clip, noise_of
from fedserver.state.records import AttemptRecord, VersionRecord
from tests.support.audits import Plant, claim_of, halve_the_noise, private_job

Array = npt.NDArray[np.float64]

DELTA = 0.01
CLIP = 0.5
CLIENTS = 3
AT_ONCE = 50_000
TRIALS = 200_000
ALONG = np.array([0.6, -0.8, 0.0])
FAR = 10 * CLIP * ALONG
NOTHING = 0 * ALONG
LATEST = VersionRecord("job", 1, "", "", b"", "", None, 3, 3, 0, 0, 0.0)


def fedavg(noise: str, **keys: Any) -> Job:
    return private_job("dp-fedavg", 1e-3, clip=CLIP, noise_multiplier=1.0, noise=noise, unsafe_seed=1, **keys)


HEADER = UpdateHeader(
    update_id="0" * 32,
    federation="north",
    assignment_id="0" * 32,
    job_id="0" * 32,
    version=1,
    kind=WorkKind.TRAIN,
    layout_digest="0" * 64,
    frame_digest="0" * 64,
    frame_bytes=1,
    num_examples=1,
)


def attempt_of(draws: PrivateDraws, within: bool | None = None) -> Attempt:
    """Return a sealed attempt with an update of each client; the first one's norm was within the clip, or was not."""
    number = int.from_bytes(draws.bytes(6), "little")  # what the job's unsafe draws follow from
    record = AttemptRecord("job", 1, number, WorkKind.TRAIN, 0.0, 1.0)
    first = HEADER.model_copy(update={"within_clip": within})
    rest = HEADER.model_copy(update={"within_clip": None if within is None else True})
    return Attempt(record, 0.0, None, headers={"anna": first, "berta": rest, "carla": rest})


def along(noisy_n: npt.NDArray[np.floating[Any]]) -> Array:
    found: Array = noisy_n.reshape(-1, ALONG.size).astype(np.float64) @ ALONG
    return found


def copies(update_D: Array) -> npt.NDArray[np.float32]:
    """Return many copies of what the client clips; noise comes on each value by itself."""
    return np.tile(clipping.clipped(update_D.astype(np.float32), CLIP), AT_ONCE)


def by_the_server(job: Job, update_D: Array, draws: PrivateDraws) -> Array:
    noise = noise_of(Accounting.of(job), attempt_of(draws), LATEST, start=False)
    assert noise is not None
    (mean,) = noise.on_mean([copies(update_D) / np.float32(CLIENTS)])
    return along(mean)


def on_the_servers_sum(job: Job, update_D: Array, draws: PrivateDraws) -> Array:
    noise = noise_of(Accounting.of(job), attempt_of(draws), LATEST, start=False)
    assert noise is not None
    total = copies(update_D).astype(np.float64)
    noise.on_sum(total)
    return along(total)


def by_clients(job: Job, update_D: Array, draws: PrivateDraws) -> Array:
    """Return sums over the clients, or what the first one sends where each hides itself."""
    assert isinstance(job.privacy, DpFedAvg)
    std = clipping.noise_of_a_client(job, job.privacy.multiplier, CLIP)
    total = clipping.noised(copies(update_D), std, draws).astype(np.float64)
    for _ in range(CLIENTS - 1 if job.privacy.noise == "clients" else 0):
        total += clipping.noised(copies(NOTHING), std, draws)
    return along(total)


def skip_the_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping, "clipped", lambda values_D, clip: values_D)


@pytest.mark.parametrize("bug", [None, halve_the_noise, skip_the_clip])
@pytest.mark.parametrize(
    ("noise", "release"),
    [("server", by_the_server), ("server", on_the_servers_sum), ("clients", by_clients), ("local", by_clients)],
)
def test_clients_are_told_by_as_much_as_claimed_and_bugs_are_caught(
    noise: str, release: Any, bug: Plant | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fedavg(noise)
    claimed = claim_of(job, DELTA, clients=CLIENTS)
    if bug is not None:
        bug(monkeypatch)
    found = audit(
        lambda update_D, draws: release(job, update_D, draws), FAR, NOTHING, DELTA, trials=TRIALS, secret=b"audit"
    )
    assert found.epsilon > 2 * claimed if bug else 0.75 * claimed < found.epsilon <= claimed


@pytest.mark.parametrize("bug", [None, halve_the_noise, skip_the_clip])
def test_an_update_with_its_vote_on_the_clip_tells_as_much_as_claimed(
    bug: Plant | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both together, as likelihoods weigh them: a client is replaced by one with the opposite, shorter update."""
    job = fedavg("server", adaptive={"count_std": 1.0, "rate": 0.2})
    accounting = Accounting.of(job)
    claimed = claim_of(job, 0.05, clients=CLIENTS, adjacency=Adjacency.REPLACE)
    if bug is not None:
        bug(monkeypatch)

    def release(case: tuple[Array, bool], draws: PrivateDraws) -> float:
        update_D, within = case
        attempt = attempt_of(draws, within)
        noise, clip = noise_of(accounting, attempt, LATEST, start=False), next_clip(accounting, attempt, LATEST)
        assert noise is not None
        assert clip is not None
        clipped_D = clipping.clipped(update_D.astype(np.float32), CLIP)
        (mean_D,) = noise.on_mean([clipped_D / np.float32(CLIENTS)])
        votes = -np.log(clip / CLIP) / 0.2 * CLIENTS
        std = CLIP * (1 / (1 - 1 / 4)) ** 0.5
        return float(along(mean_D)[0] * CLIENTS * 2 * CLIP / std**2 - votes)

    first, second = (FAR, False), (-0.999 * CLIP * ALONG, True)
    lower = audit(release, first, second, 0.05, trials=6000, secret=b"audit").epsilon
    assert lower > 1.1 * claimed if bug else 0.5 * claimed < lower <= claimed

"""Whole Fed-SB jobs: the server's engine, the client's runner and torch, on virtual time; what they hold is looked at.

Shape legend: B is m × r, R r × r, A r × n; D values of what moves.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import fedsim.simulation
from fedclient.tasks.digits.network import load_base
from fedclient.tasks.digits.task import Digits
from fedclient.trainer import Gradient, LocalWorker, Trained, Work
from fedclient.updates import RAW
from fedcodec import build_pipeline
from fedcore.adapters import basis_modules, gradient_layout
from fedcore.errors import JobFailed, Unreachable
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout, Vector
from fedcore.messages import Piece, UpdateHeader, UploadState, WorkKind
from fedcore.rng import derive_seed
from fedsim.pooled import measure
from fedsim.simulation import Simulated, SimulatedClient, make_clients, simulate
from fedsim.transport import InProcessTransport

RANK = 6
STEP = 0.02
SEED = 5

Dense = npt.NDArray[np.float64]


def make_job(rounds: int = 3, cohort: int = 3, **sections: dict[str, Any]) -> Job:
    tree: dict[str, Any] = {
        "job": {"name": "sb", "rounds": rounds, "seed": SEED},
        "task": {"name": "digits"},
        "adapter": {"name": "lora-sb", "rank": RANK, "step": STEP, "samples": 48},
        "training": {"batch_size": 32, "learning_rate": 0.05},
        "schedule": {"cohort": cohort, "quorum": cohort},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_job(tree, "sb")


@dataclass
class Seen:
    """What passed between the parts: by client or by version."""

    workers: list[LocalWorker] = field(default_factory=list)
    gradients: dict[str, Vector] = field(default_factory=dict)
    started_D: dict[int, Vector] = field(default_factory=dict)  # noqa: N815 - shape suffix
    deltas: dict[int, list[tuple[int, Vector]]] = field(default_factory=dict)
    frames: list[tuple[WorkKind, bytes]] = field(default_factory=list)

    def of(self, kind: WorkKind) -> list[bytes]:
        return [frame for each, frame in self.frames if each is kind]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Look on while the real worker and transport do what they do."""
    seen = Seen()

    class Worker(LocalWorker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            seen.workers.append(self)

        def gradient(self, work: Work, *arguments: Any, **options: Any) -> Gradient:
            found = super().gradient(work, *arguments, **options)
            seen.gradients[work.client] = found.values.copy()
            return found

        def train(self, work: Work, base_D: Vector, **options: Any) -> Trained:
            trained = super().train(work, base_D, **options)
            seen.started_D[work.version] = base_D.copy()
            seen.deltas.setdefault(work.version, []).append((trained.num_examples, trained.delta_D.copy()))
            return trained

    class Transport(InProcessTransport):
        async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
            seen.frames.append((UpdateHeader.from_bytes(header).kind, bytes(frame)))
            return await super().send_update(header, signature, frame)

    monkeypatch.setattr(fedsim.simulation, "LocalWorker", Worker)
    monkeypatch.setattr(fedsim.simulation, "InProcessTransport", Transport)
    return seen


def run(job: Job, clients: Sequence[SimulatedClient] | int = 3) -> Simulated:
    return asyncio.run(simulate(job, make_clients(job, clients, {}) if isinstance(clients, int) else clients))


def parts(layout: Layout, state: bytes | Vector) -> dict[str, tuple[Dense, Dense, Dense]]:
    """Return B, R, A of each layer."""
    values_D = np.frombuffer(state, "<f4") if isinstance(state, bytes) else state
    tensors = {name: value.astype(np.float64) for (_, name), value in layout.unflatten(values_D).items()}
    return {
        path: (
            tensors[f"{path}.lora_B.weight"],
            tensors[f"{path}.lora_R.weight"],
            tensors[f"{path}.lora_A.weight"],
        )
        for path in basis_modules(layout)
    }


def layout_of(simulated: Simulated) -> Layout:
    return Layout.from_json(simulated.layout)


def check_start(simulated: Simulated, signs: Callable[[str], Dense]) -> None:
    """Compare B R A with the best approximation of −η sign: the error is what the other singular values hold."""
    for path, (b_mr, r_rr, a_rn) in parts(layout_of(simulated), simulated.state).items():
        step_mn = -STEP * signs(path)
        values = np.linalg.svd(step_mn, compute_uv=False)
        error = np.linalg.norm(b_mr @ r_rr @ a_rn - step_mn)
        assert error == pytest.approx(np.linalg.norm(values[RANK:]), rel=1e-5), path
        assert np.diag(r_rr) == pytest.approx(values[:RANK], rel=1e-5), path
        assert np.count_nonzero(r_rr - np.diag(np.diag(r_rr))) == 0


def test_the_start_is_made_of_the_sum_of_all_clients_gradients(seen: Seen) -> None:
    simulated = run(make_job(rounds=1))
    assert len(seen.gradients) == 3
    total = np.sum([values.astype(np.float64) for values in seen.gradients.values()], axis=0)
    sums = {name: value for (_, name), value in gradient_layout(layout_of(simulated)).unflatten(total).items()}
    check_start(simulated, lambda path: np.sign(sums[path]).astype(np.float64))
    row = simulated.history[1]
    assert (row["num_updates"], row["num_examples"]) == (3, 3 * 48)
    assert simulated.history[0]["evaluation"]["accuracy"] < 0.4, "clients that send gradients measure version 0 too"


def test_with_votes_each_client_sends_one_bit_a_value_and_the_majority_counts(seen: Seen) -> None:
    simulated = run(make_job(rounds=1, adapter={"votes": True}))
    gradients = gradient_layout(layout_of(simulated))
    frames = seen.of(WorkKind.GRADIENT)
    assert {len(frame) for frame in frames} == {len(frames[0])}
    assert len(frames[0]) <= gradients.num_values / 8 + 100
    sign = build_pipeline([{"codec": "sign", "scale": 1.0}])
    votes = np.array([sign.decode(frame, gradients.sizes) for frame in frames])
    assert set(np.unique(votes)) == {-1.0, 1.0}
    found = np.array(list(seen.gradients.values()))
    # What a client votes is the sign of its gradient; where that is 0, anything.
    assert all(any(np.all((vote == np.sign(own)) | (own == 0)) for own in found) for vote in votes)
    assert len({vote[(found == 0).all(axis=0)].tobytes() for vote in votes}) == 3, "drawn by everybody alike"
    majority = {name: value for (_, name), value in gradients.unflatten(np.sign(votes.sum(axis=0))).items()}
    check_start(simulated, lambda path: majority[path].astype(np.float64))


def test_all_clients_hold_the_servers_basis_bit_for_bit_to_the_end(seen: Seen) -> None:
    simulated = run(make_job(rounds=4))
    held = {
        worker._built[simulated.job_id].model.read_all()[-_basis_values(simulated) :].tobytes()
        for worker in seen.workers
    }
    assert len(seen.workers) == 3
    assert held == {simulated.state[-4 * _basis_values(simulated) :]}
    (basis,) = held
    assert hashlib.sha256(basis).hexdigest() == simulated.version.basis_blob
    for b_mr, _, a_rn in parts(layout_of(simulated), simulated.state).values():
        assert np.abs(b_mr.T @ b_mr - np.eye(RANK)).max() <= 1e-6
        assert np.abs(a_rn @ a_rn.T - np.eye(RANK)).max() <= 1e-6


def _basis_values(simulated: Simulated) -> int:
    return layout_of(simulated).num_basis_values


def test_the_mean_of_r_is_the_mean_of_what_the_clients_computed(seen: Seen) -> None:
    simulated = run(make_job(rounds=3, task={"partition": {"kind": "dirichlet", "alpha": 0.5}}))
    layout = layout_of(simulated)
    basis = np.frombuffer(simulated.state, "<f4")[layout.moving.num_values :]
    weights = np.array([number for number, _ in seen.deltas[2]], dtype=np.float64)
    assert len(set(weights)) > 1, "weights must differ to be seen"
    sent = [parts(layout, np.concatenate([seen.started_D[2] + delta_D, basis])) for _, delta_D in seen.deltas[2]]
    for path, (b_mr, r_rr, a_rn) in parts(layout, simulated.state).items():
        products = [b @ r @ a for b, r, a in (each[path] for each in sent)]
        mean = np.average(products, axis=0, weights=weights)
        assert np.abs(b_mr @ r_rr @ a_rn - mean).max() <= 1e-6 * np.abs(mean).max(), path
        assert np.abs(products[0] - products[1]).max() > 1e-3, "the clients agree anyway"


def test_what_a_round_moves_depends_on_the_rank_alone(seen: Seen) -> None:
    for number in (2, 8):
        run(make_job(rounds=2, cohort=number), number)
    frames = seen.of(WorkKind.TRAIN)
    assert len(frames) == 2 + 8
    num_values = 3 * RANK**2
    assert {len(frame) for frame in frames} == {RAW.max_frame_bytes(num_values)}
    assert RAW.max_frame_bytes(num_values) - 4 * num_values < 20


def test_the_order_of_the_clients_does_not_matter() -> None:
    job = make_job()
    clients = make_clients(job, 3, {})
    assert run(job, clients).state == run(job, clients[::-1]).state


def test_the_step_scales_r_alone() -> None:
    small, large = (run(make_job(rounds=1, adapter={"step": step})) for step in (0.01, 0.04))
    cut = layout_of(small).moving.num_values
    small_D, large_D = (np.frombuffer(each.state, "<f4") for each in (small, large))
    assert small_D[cut:].tobytes() == large_D[cut:].tobytes()
    assert large_D[:cut] == pytest.approx(4 * small_D[:cut], rel=1e-6)


class Reparametrised(nn.Module):
    """`base(x) + B R A x`, written once more."""

    def __init__(self, base: nn.Linear, b_mr: Dense, r_rr: Dense, a_rn: Dense) -> None:
        super().__init__()
        self.base = base
        self.a_rn, self.b_mr = (torch.from_numpy(each).float() for each in (a_rn, b_mr))
        self.r_rr = nn.Parameter(torch.from_numpy(r_rr).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(x) + x @ self.a_rn.T @ self.r_rr.T @ self.b_mr.T
        return output


def test_one_client_is_training_in_one_place_with_the_same_seed() -> None:
    job = make_job(rounds=2, cohort=1)
    simulated = run(job, 1)
    data = Digits(job.task.params, {"shard": "0", "num_shards": "1"}, SEED).load().train

    def order(kind: str, version: int) -> torch.Tensor:
        seed = derive_seed(derive_seed(SEED, kind, "client-1", version), "batches")
        return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))

    start = run(make_job(rounds=1, cohort=1), 1)
    base = load_base()
    rows = order("gradient", 0)[:48]
    nn.functional.cross_entropy(base(data.inputs[rows]), data.targets[rows], reduction="sum").backward()  # type: ignore[no-untyped-call]
    for path, (b_mr, r_rr, a_rn) in parts(layout_of(start), start.state).items():
        linear: Any = base.get_submodule(path)
        step_mn = -STEP * np.sign(linear.weight.grad.double().numpy())
        u, s, vt = np.linalg.svd(step_mn)
        best_mn = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        assert np.linalg.norm(b_mr @ r_rr @ a_rn - best_mn) < 1e-5 * np.linalg.norm(best_mn), path
        setattr(base, path, Reparametrised(linear, b_mr, r_rr, a_rn))
    squares = [parameter for name, parameter in base.named_parameters() if name.endswith("r_rr")]
    optimizer = torch.optim.AdamW(squares, lr=0.05, weight_decay=0.0)
    for batch in torch.split(order("train", 1), 32):
        loss = nn.functional.cross_entropy(base(data.inputs[batch]), data.targets[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for path, (b_mr, r_rr, a_rn) in parts(layout_of(simulated), simulated.state).items():
        layer: Any = base.get_submodule(path)
        expected = (layer.b_mr @ layer.r_rr.detach() @ layer.a_rn).double().numpy()
        error = np.linalg.norm(b_mr @ r_rr @ a_rn - expected) / np.linalg.norm(expected)
        assert error < 1e-6, f"{path}: {error}"


def test_the_pooled_bound_starts_and_trains() -> None:
    job = make_job(rounds=6)
    bounds = measure(job, [client.data for client in make_clients(job, 3, {})])
    assert bounds.pooled["accuracy"] > bounds.base["accuracy"] + 0.1


def test_one_round_is_the_start_alone_and_more_of_them_train() -> None:
    one, more = run(make_job(rounds=1)), run(make_job(rounds=5))
    assert [row["version"] for row in more.history] == list(range(6))
    assert more.history[1]["sha256"] == one.history[1]["sha256"]
    assert more.history[-1]["evaluation"]["loss"] < more.history[1]["evaluation"]["loss"]


# -- servers that send another basis ---------------------------------------------------------------------------------


def spoiled(basis: bytes, how: str) -> bytes:
    return {"altered": basis[:-1] + bytes([basis[-1] ^ 1]), "longer": basis + bytes(4), "shorter": basis[:-4]}[how]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("altered", "the basis has digest"),
        ("longer", "the basis goes on after"),
        ("shorter", "gave up at the deadline"),
    ],
)
def test_a_basis_that_is_not_what_was_announced_is_not_trained_with(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seen: Seen
) -> None:
    class Transport(InProcessTransport):
        async def download(
            self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME
        ) -> AsyncIterator[bytes]:
            chunks = super().download(job_id, version, offset, piece)
            if piece is not Piece.BASIS or self.client != "client-2":
                async for chunk in chunks:
                    yield chunk
                return
            whole = spoiled(
                b"".join([chunk async for chunk in super().download(job_id, version, 0, piece=Piece.BASIS)]),
                how,
            )
            yield whole[offset:]
            raise Unreachable("broken off")

    monkeypatch.setattr(fedsim.simulation, "InProcessTransport", Transport)
    with caplog.at_level(logging.WARNING):
        run(make_job(rounds=2, schedule={"quorum": 2, "deadline_s": 100.0}))
    declined = [record for record in caplog.records if record.getMessage() == "declined"]
    assert {record.__dict__["client"] for record in declined} == {"client-2"}
    assert reason in declined[0].__dict__["reason"]
    assert len(seen.deltas[1]) == 2


def test_a_gradient_of_nothing_but_zeros_ends_the_job_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalWorker.gradient

    def nothing(self: LocalWorker, *arguments: Any, **options: Any) -> Gradient:
        found = real(self, *arguments, **options)
        return Gradient(np.zeros_like(found.values), found.num_examples)

    monkeypatch.setattr(LocalWorker, "gradient", nothing)
    with pytest.raises(JobFailed, match=r"failed: layer hidden1: gradient sum is 0 everywhere: it has no direction"):
        run(make_job())

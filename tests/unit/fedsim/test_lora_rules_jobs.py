"""Whole jobs of rules over factors, of factors in turn and of unequal ranks: what all hold is compared with dense sums.

Shape legend: B is m × r, A r × n.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

import fedserver.rounds.closing
import fedsim.simulation
from fedclient.adapters.base import AdaptedModel
from fedclient.adapters.lora import LoraLinear
from fedclient.tasks.digits.network import load_base
from fedclient.trainer import LocalWorker, Trained, Work
from fedcore.changes import Change, changed_modules
from fedcore.errors import InvalidInput, JobFailed, StorageFailed
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout, Vector
from fedcore.messages import Piece, UpdateHeader, UploadState, WorkKind
from fedcore.methods import METHODS
from fedserver.export import Exportable, Format, export_version
from fedsim.pooled import measure
from fedsim.simulation import Simulated, make_clients, simulate
from fedsim.transport import InProcessTransport

RANK = 4
SCALE = 2.0
LAYERS = ("hidden1", "hidden2")

Dense = npt.NDArray[np.float64]


def make_job(rule: str = "weighted-mean", rounds: int = 3, **sections: dict[str, Any]) -> Job:
    tree: dict[str, Any] = {
        "job": {"name": "rules", "rounds": rounds, "seed": 5},
        "task": {"name": "digits"},
        "adapter": {"name": "lora", "rank": RANK, "alpha": RANK * SCALE, "targets": ["hidden*"]},
        "training": {"batch_size": 32, "learning_rate": 0.02},
        "aggregator": {"rule": rule},
        "schedule": {"cohort": 3, "quorum": 3},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    if tree["adapter"]["name"] == "lora-sb":
        del tree["adapter"]["alpha"]
    return parse_job(tree, "rules")


@dataclass
class Seen:
    """By version: what each client weighs, and the matrices that its model multiplied by before and after training."""

    started_D: dict[int, Vector] = field(default_factory=dict)  # noqa: N815 - shape suffix
    deltas: dict[int, list[tuple[str, int, Vector]]] = field(default_factory=dict)
    before: dict[int, list[dict[str, Dense]]] = field(default_factory=dict)
    after: dict[int, list[tuple[int, dict[str, Dense]]]] = field(default_factory=dict)
    frames: list[tuple[str, int, bytes]] = field(default_factory=list)
    changes: list[tuple[str, int]] = field(default_factory=list)
    last: dict[str, dict[str, Dense]] = field(default_factory=dict)
    frozen: dict[str, dict[str, bytes]] = field(default_factory=dict)


def matrices(worker: LocalWorker, work: Work) -> dict[str, Dense]:
    found = {}
    for layer in LAYERS:
        module = worker._built[work.job_id].model.module.get_submodule(layer)
        if not isinstance(module, LoraLinear):
            continue
        base: Any = module.base
        b, a, w = (
            tensor.detach().numpy().astype(np.float64)
            for tensor in (module.lora_B.weight, module.lora_A.weight, base.weight)
        )
        found[layer] = w + SCALE * b @ a
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Look on while the real worker and transport do what they do."""
    seen = Seen()

    class Worker(LocalWorker):
        def train(self, work: Work, base_D: Vector, **options: Any) -> Trained:
            self._get(work).model.write(base_D)
            before = matrices(self, work)
            trained = super().train(work, base_D, **options)
            seen.started_D[work.version] = base_D.copy()
            seen.deltas.setdefault(work.version, []).append((work.client, trained.num_examples, trained.delta_D.copy()))
            if before:
                seen.before.setdefault(work.version, []).append(before)
                seen.after.setdefault(work.version, []).append((trained.num_examples, matrices(self, work)))
            return trained

        def evaluate(self, work: Work, base_D: Vector) -> Any:
            measured = super().evaluate(work, base_D)
            seen.last[work.client] = matrices(self, work)
            model: Any = self._built[work.job_id].model.module
            seen.frozen[work.client] = {
                layer: model.get_submodule(layer).base.weight.numpy().tobytes() for layer in LAYERS
            }
            return measured

    class Transport(InProcessTransport):
        async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
            read = UpdateHeader.from_bytes(header)
            if read.kind is WorkKind.TRAIN:
                seen.frames.append((self.client, read.version, bytes(frame)))
            return await super().send_update(header, signature, frame)

        async def download(self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME) -> Any:
            if piece is Piece.CHANGE:
                seen.changes.append((self.client, version))
            async for chunk in super().download(job_id, version, offset, piece):
                yield chunk

    monkeypatch.setattr(fedsim.simulation, "LocalWorker", Worker)
    monkeypatch.setattr(fedsim.simulation, "InProcessTransport", Transport)
    return seen


def run(job: Job, clients: int = 3) -> Simulated:
    return asyncio.run(simulate(job, make_clients(job, clients, {})))


def mean(of: Sequence[tuple[int, dict[str, Dense]]], layer: str) -> Dense:
    total = sum(weight for weight, _ in of)
    found: Dense = np.sum([weight / total * made[layer] for weight, made in of], axis=0)
    return found


@pytest.mark.parametrize("rule", ["flora", "fedex-lora"])
def test_an_exact_rule_leaves_everybody_with_the_mean_of_what_all_had(rule: str, seen: Seen) -> None:
    simulated = run(
        make_job(
            rule, task={"partition": {"kind": "dirichlet", "alpha": 0.5}}, adapter={"trainable": ["output.weight"]}
        )
    )
    head = next(tensor for tensor in Layout.from_json(simulated.layout).tensors if tensor.name == "output.weight")
    place = slice(head.offset, head.offset + head.num_values)
    moved = np.average(
        [delta_D[place] for _, _, delta_D in seen.deltas[1]], axis=0, weights=[n for _, n, _ in seen.deltas[1]]
    )
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(seen.started_D[2][place], seen.started_D[1][place] + moved, atol=1e-6)
    assert sorted(seen.before) == [0, 1, 2]
    weights = {weight for weight, _ in seen.after[0]}
    assert len(weights) > 1, "weights must differ to be seen"
    for version in (0, 1, 2):
        went_on = seen.before.get(version + 1) or list(seen.last.values())
        for layer in LAYERS:
            wanted = mean(seen.after[version], layer)
            spread = np.abs(seen.after[version][0][1][layer] - wanted).max()
            assert spread > 1e-3, "the clients agree anyway"
            for found in went_on:
                assert np.abs(found[layer] - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("rule", ["flexlora", "hetlora", "lora-fair"])
def test_a_rule_that_is_not_exact_leaves_everybody_with_the_same(rule: str, seen: Seen) -> None:
    simulated = run(make_job(rule))
    assert simulated.version.revision == ""
    assert not seen.changes
    for version in (1, 2):
        for layer in LAYERS:
            for found in seen.before[version]:
                np.testing.assert_array_equal(found[layer], seen.before[version][0][layer])
    assert simulated.history[-1]["evaluation"]["accuracy"] > simulated.history[0]["evaluation"]["accuracy"]


@pytest.mark.parametrize("rule", ["flora", "fedex-lora"])
def test_who_was_away_catches_up_change_by_change_and_holds_the_same_bits(rule: str, seen: Seen) -> None:
    simulated = run(make_job(rule, rounds=6, schedule={"cohort": 2, "quorum": 2}), clients=5)
    away = {name for name, _ in seen.changes}
    assert any(
        [version for name, version in seen.changes if name == client]
        != sorted(version for name, version, _ in seen.frames if name == client)
        for client in away
    ), "nobody was away"
    for client in away:
        fetched = [version for name, version in seen.changes if name == client]
        assert fetched == list(range(1, max(fetched) + 1)), "each change once, in order"
    assert len(seen.frozen) > 1
    assert len({tuple(layers.values()) for layers in seen.frozen.values()}) == 1
    assert (simulated.version.changed_since, simulated.version.version) == (1, 6)


@pytest.mark.parametrize("rule", ["flora", "fedex-lora"])
def test_changes_are_put_together_before_they_outgrow_the_matrices(
    rule: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedserver.rounds.closing, "compact_above", lambda layout: 20_000)
    simulated = run(make_job(rule, rounds=6, schedule={"cohort": 2, "quorum": 2}), clients=4)
    newest = simulated.version
    assert newest.changed_since > 1
    layout = Layout.from_json(simulated.layout)
    for version in (3, 4, 5, 6):
        went_on = seen.before.get(version) or list(seen.last.values())
        for layer in changed_modules(layout):
            wanted = mean(seen.after[version - 1], layer)
            for found in went_on:
                assert np.abs(found[layer] - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_factors_in_turn_are_sent_and_moved_in_turn(seen: Seen) -> None:
    simulated = run(make_job(adapter={"name": "rolora"}, rounds=4))
    layout = Layout.from_json(simulated.layout)
    sizes = {end: sum(t.num_values for t in layout.tensors if t.name.endswith(end)) for end in ("A.weight", "B.weight")}
    for _, version, frame in seen.frames:
        sent = 4 * sizes["B.weight" if version % 2 == 0 else "A.weight"]
        assert sent <= len(frame) < sent + 64
    for version in (0, 1, 2, 3):
        went_on = seen.before.get(version + 1) or list(seen.last.values())
        for layer in LAYERS:
            wanted = mean(seen.after[version], layer)
            for found in went_on:
                assert np.abs(found[layer] - wanted).max() < 1e-5 * np.abs(wanted).max(), (
                    "a mean of one factor is exact"
                )
    assert simulated.history[-1]["evaluation"]["loss"] < simulated.history[0]["evaluation"]["loss"]


RANKS = {"client-*": 3, "client-2": 2, "client-3": 1}


def rank_of(client: str) -> int:
    return {"client-2": 2, "client-3": 1}.get(client, 3)


@pytest.mark.parametrize("over", ["all", "contributors"])
@pytest.mark.parametrize("adapter", ["lora", "ffa-lora", "lora-sb"])
def test_clients_of_lower_rank_train_and_send_the_leading_block(adapter: str, over: str, seen: Seen) -> None:
    adapted = {"name": adapter, "rank": RANK, "targets": ["hidden*"], "ranks": RANKS}
    simulated = run(make_job(adapter=adapted, aggregator={"over": over}, rounds=2))
    layout = Layout.from_json(simulated.layout).moving
    assert sorted(client for client, *_ in seen.deltas[1]) == ["client-1", "client-2", "client-3"]
    base, found = (
        layout.unflatten(seen.started_D[1]),
        layout.unflatten(np.frombuffer(simulated.state, "<f4")[: layout.num_values]),
    )
    for tensor in layout.tensors:
        key = tensor.group, tensor.name
        total, weights = np.zeros(tensor.shape), np.zeros(tensor.shape)
        for client, weight, delta_D in seen.deltas[1]:
            rank = rank_of(client)
            cut = tuple(min(size, rank) if size == RANK else size for size in tensor.shape)
            at = sum(
                int(np.prod([min(size, rank) if size == RANK else size for size in earlier.shape]))
                for earlier in layout.tensors
                if earlier.offset < tensor.offset
            )
            block = tuple(map(slice, cut))
            total[block] += weight * delta_D[at : at + int(np.prod(cut))].reshape(cut)
            weights[block] += weight
        divisor = sum(weight for _, weight, _ in seen.deltas[1]) if over == "all" else np.maximum(weights, 1)
        np.testing.assert_allclose(found[key], base[key] + total / divisor, atol=2e-6)
        np.testing.assert_array_equal(found[key][weights == 0], base[key][weights == 0])
        assert (weights == 0).any()
        assert len(np.unique(weights)) == 4, "of none, one, two and three clients"


@pytest.mark.parametrize(
    ("how", "reason"), [("altered", "the frozen matrices have revision"), ("longer", "has more than")]
)
def test_changes_that_are_not_what_was_announced_are_not_trained_with(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seen: Seen
) -> None:
    class Transport(InProcessTransport):
        async def download(self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME) -> Any:
            whole = b"".join([chunk async for chunk in super().download(job_id, version, offset, piece)])
            if piece is Piece.CHANGE and self.client == "client-2":
                whole = whole[:-1] + bytes([whole[-1] ^ 1]) if how == "altered" else whole + bytes(1 << 20)
            yield whole

    monkeypatch.setattr(fedsim.simulation, "InProcessTransport", Transport)
    with caplog.at_level(logging.WARNING):
        run(make_job("flora", rounds=2, schedule={"quorum": 2, "deadline_s": 100.0}))
    declined = [record for record in caplog.records if record.getMessage() == "declined"]
    assert {record.__dict__["client"] for record in declined} == {"client-2"}
    assert reason in declined[0].__dict__["reason"]
    assert len(seen.deltas[1]) == 2


def test_an_update_of_other_frozen_matrices_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seen: Seen
) -> None:
    real = UpdateHeader.model_validate

    def lying(fields: Any, **options: Any) -> UpdateHeader:
        if isinstance(fields, dict) and fields.get("base_revision") and "frame_bytes" in fields:
            fields = {**fields, "base_revision": "0" * 64}
        return real(fields, **options)

    monkeypatch.setattr(UpdateHeader, "model_validate", lying)
    with caplog.at_level(logging.WARNING), pytest.raises(JobFailed):
        run(make_job("flora", rounds=2, schedule={"max_retries": 0, "deadline_s": 100.0}))
    refused = [record.__dict__ for record in caplog.records if record.__dict__.get("result") == "wrong-layout"]
    assert refused
    assert "frozen matrices of revision 000000000000" in refused[0]["text"]


@pytest.mark.parametrize("rule", ["flora", "flexlora", "hetlora"])
def test_rules_over_factors_take_updates_of_unequal_ranks(rule: str, seen: Seen) -> None:
    simulated = run(make_job(rule, adapter={"ranks": RANKS}))
    lengths = {client: len(frame) for client, version, frame in seen.frames if version == 2}
    assert lengths["client-1"] > lengths["client-2"] > lengths["client-3"]
    assert simulated.history[-1]["evaluation"]["loss"] < simulated.history[0]["evaluation"]["loss"]


def test_updates_that_were_compressed_are_merged_as_they_were_decoded(seen: Seen) -> None:
    run(make_job("fedex-lora", compression={"uplink": [{"codec": "bf16"}]}))
    for layer in LAYERS:
        wanted = mean(seen.after[1], layer)
        for found in seen.before[2]:
            away = np.abs(found[layer] - wanted).max() / np.abs(wanted).max()
            assert 1e-9 < away < 1e-2


@pytest.mark.parametrize("rule", ["flora", "fedex-lora"])
def test_an_export_has_the_changes_of_the_frozen_matrices_too(rule: str, seen: Seen, tmp_path: Path) -> None:
    job = make_job(rule)
    simulated = run(job)
    what = Exportable(
        federation="lab",
        job_id=simulated.job_id,
        job=job,
        layout=Layout.from_json(simulated.layout),
        version=3,
        state_sha256=simulated.version.state_blob,
        history=simulated.history,
        changes=simulated.changes,
    )
    with pytest.raises(InvalidInput, match=f"rule {rule} has changed frozen matrices too"):
        export_version(what, simulated.state, tmp_path / "weights", form=Format.WEIGHTS)
    export_version(what, simulated.state, tmp_path / "peft")
    loaded: Any = PeftModel.from_pretrained(cast("Any", load_base()), str(tmp_path / "peft"))
    merged: Any = loaded.merge_and_unload()
    base = tmp_path / "base"
    base.mkdir()
    save_file(load_base().state_dict(), base / "model.safetensors")
    export_version(what, simulated.state, tmp_path / "merged", form=Format.MERGED, base=base)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for layer, wanted in seen.last["client-1"].items():
        for found in (merged.get_submodule(layer).weight.detach(), stored[f"{layer}.weight"]):
            assert np.abs(found.double().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    as_it_was = load_base().state_dict()["hidden1.weight"].double().numpy()
    assert np.abs(as_it_was - seen.last["client-1"]["hidden1"]).max() > 1e-2


def test_a_change_that_breaks_off_half_way_is_taken_back_and_made_again(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first layer; of what is said to pass, so that the client is asked again for the next version."""
    real = AdaptedModel.change_base
    broken: list[str] = []

    def breaking(self: AdaptedModel, change: Change) -> None:
        if change.module == "hidden2" and not broken:
            broken.append(change.module)
            raise StorageFailed("no room for the second layer")
        real(self, change)

    monkeypatch.setattr(AdaptedModel, "change_base", breaking)
    # Who has declined is asked again for the next version when others are too few.
    simulated = run(
        make_job("fedex-lora", rounds=4, schedule={"cohort": 2, "quorum": 1, "deadline_s": 50.0}), clients=2
    )
    assert broken
    assert simulated.version.version == 4
    took_part = {client for client, version, _ in seen.frames if version >= 2}
    assert took_part == {"client-1", "client-2"}, "the client that it happened to does not come again"
    assert len({tuple(layers.values()) for layers in seen.frozen.values()}) == 1


def test_nothing_is_built_anew_for_a_first_change(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    real = LocalWorker._build_model

    def counted(self: LocalWorker, work: Work, *arguments: Any) -> Any:
        built.append(work.client)
        return real(self, work, *arguments)

    monkeypatch.setattr(LocalWorker, "_build_model", counted)
    run(make_job("flora"))
    assert sorted(built) == sorted([*["client-1", "client-2", "client-3"], built[0]]), "one of them made version 0"


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fed-sb"])
def test_every_method_has_a_pooled_bound(method: str) -> None:
    tree: dict[str, Any] = {
        "job": {"name": "pooled", "rounds": 2, "seed": 5, "method": method},
        "task": {"name": "digits"},
        "adapter": {} if method == "full" else {"rank": RANK, "targets": ["hidden*"]},
        "training": {"learning_rate": 0.01},
        "schedule": {"cohort": 2},
    }
    if method not in {"full", "fedex-lora", "lora-fair"}:
        tree["adapter"] |= {"ranks": {"*": 2}}
    job = parse_job(tree, "pooled")
    bounds = measure(job, [client.data for client in make_clients(job, 2, {})])
    assert bounds.pooled["loss"] < bounds.base["loss"]


def test_a_job_that_nobody_can_do_ends_with_what_the_last_client_said() -> None:
    job = make_job(adapter={"targets": ["hiden*"]}, schedule={"max_retries": 0, "deadline_s": 10.0})
    with pytest.raises(JobFailed, match=r"client-\d declined: adapter.targets \['hiden\*'\]: match no linear layer"):
        run(job)

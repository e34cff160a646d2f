from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from fedclient.tasks.digits.network import load_base
from fedclient.tasks.digits.pretrain import pretrain, upright_accuracy
from fedclient.tasks.digits.samples import MIN_SHARD_SAMPLES, base_samples, client_samples, deal
from fedclient.tasks.digits.shifts import SHIFTS, apply_shift
from fedclient.tasks.digits.task import Digits
from fedcore.errors import InvalidInput
from fedcore.rng import stream


def options(shard: int, num_shards: int) -> dict[str, str]:
    return {"shard": str(shard), "num_shards": str(num_shards)}


def test_samples_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, labels = datasets.load_digits(return_X_y=True)
    base, clients = base_samples(), client_samples()
    ours = np.concatenate([base.images, clients.images]).reshape(-1, 64) * 16
    ours_with_labels = np.column_stack([ours, np.concatenate([base.labels, clients.labels])])
    theirs_with_labels = np.column_stack([theirs, labels])
    assert sorted(map(tuple, ours_with_labels.tolist())) == sorted(map(tuple, theirs_with_labels.tolist()))
    assert (len(base.labels), len(clients.labels)) == (600, 1197)


@pytest.mark.parametrize("num_shards", [1, 5, 20, 100, 200])
@pytest.mark.parametrize("alpha", [None, 0.05, 0.5])
def test_every_sample_belongs_to_one_shard_and_no_shard_is_empty(num_shards: int, alpha: float | None) -> None:
    labels = client_samples().labels
    shards = deal(labels, num_shards, alpha, seed=3)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(labels)))
    assert min(map(len, shards)) >= MIN_SHARD_SAMPLES


def test_smaller_alpha_skews_labels_more() -> None:
    labels = client_samples().labels

    def largest_share(alpha: float | None) -> float:
        shards = deal(labels, 5, alpha, seed=3)
        return float(np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in shards]))

    assert largest_share(None) < largest_share(0.5) < largest_share(0.05)


def test_dealing_follows_from_the_seed() -> None:
    labels = client_samples().labels
    one, again, other = (np.concatenate(deal(labels, 5, 0.5, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="10 samples are too few for 5 shards of 4"):
        deal(np.zeros(10, dtype=np.int64), 5, None, seed=1)


@pytest.mark.parametrize("num_shards", [5, 20, 100])
def test_every_client_can_train_and_measure(num_shards: int) -> None:
    total = 0
    for shard in range(num_shards):
        data = Digits({}, options(shard, num_shards), seed=7).load()
        assert len(data.train) >= 1
        assert len(data.held_out) >= 1
        total += len(data.train) + len(data.held_out)
    assert total == 1197


def test_nothing_held_out_when_the_job_says_so() -> None:
    assert len(Digits({"held_out": 0.0}, options(0, 5), seed=7).load().held_out) == 0


def test_shifts_differ_from_each_other_and_go_around() -> None:
    images = client_samples().images[:50]
    shifted = [apply_shift(images, shard, stream(1)) for shard in range(len(SHIFTS))]
    for one, other in combinations([images, *shifted], 2):
        assert np.abs(one - other).mean() > 0.02
    np.testing.assert_array_equal(apply_shift(images, len(SHIFTS), stream(1)), shifted[0])


def test_shard_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInput, match="shard 5 does not exist: shards are 0 to 4"):
        Digits({}, options(5, 5), seed=1)


def test_missing_shard_is_asked_for() -> None:
    with pytest.raises(InvalidInput, match=r"data\.shard: is required; data\.num_shards: is required"):
        Digits({}, {}, seed=1)


def test_pretraining_again_gives_the_committed_base() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = pretrain()
    finally:
        torch.set_num_threads(threads)
    committed = load_base()
    assert upright_accuracy(committed) == pytest.approx(0.9566, abs=1e-4)
    # The bytes agree on the machine and torch that wrote the file; other ones may round sums in another order.
    assert upright_accuracy(again) == pytest.approx(upright_accuracy(committed), abs=0.01)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, committed.state_dict()[name], rtol=0, atol=0.05)

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclient.device import select_device
from fedclient.trainer import LocalWorker, Stopped, Trained, Work
from fedcore.errors import ConfigError, InvalidInput, LayoutError, UnknownPlugin
from fedcore.jobfile import Job, parse_job
from fedcore.rng import derive_seed

ROOT = Path(__file__).parents[3]
SHARD = {"shard": "0", "num_shards": "5"}


def make_job(**sections: dict[str, object]) -> Job:
    tree: dict[str, dict[str, object]] = {
        "job": {"name": "test", "rounds": 2, "seed": 3},
        "task": {"name": "digits"},
        "adapter": {"name": "lora", "rank": 4, "dropout": 0.1},
        "training": {"local_epochs": 2, "batch_size": 16},
        "schedule": {"cohort": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return parse_job(tree, "test")


def make_work(client: str = "anna", version: int = 1, job: Job | None = None) -> Work:
    job = make_job() if job is None else job
    return Work("job-1", job, version, client, derive_seed(job.job.seed, "train", client, version))


def train_once(work: Work, shard: dict[str, str] = SHARD) -> Trained:
    worker = LocalWorker(shard, "cpu")
    return worker.train(work, worker.initialise(work)[1])


def numpy_state() -> str:
    return repr(np.random.get_state(legacy=False))  # noqa: NPY002 - this is what is guarded


def digest(trained: Trained) -> str:
    return hashlib.sha256(trained.delta_D.tobytes()).hexdigest()


def test_same_work_gives_the_same_bytes_again_and_after_other_work() -> None:
    worker = LocalWorker(SHARD, "cpu")
    work = make_work()
    _, base_D = worker.initialise(work)
    first = worker.train(work, base_D)
    worker.train(make_work(version=2), base_D + first.delta_D)
    again = worker.train(work, base_D)
    assert first.delta_D.any()
    assert first.delta_D.tobytes() == again.delta_D.tobytes()
    assert (first.metrics, first.evaluation, first.num_examples) == (
        again.metrics,
        again.evaluation,
        again.num_examples,
    )


def test_fresh_process_gives_the_same_bytes() -> None:
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('test_trainer', sys.argv[1])\n"
        "test = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(test)\n"
        "print(test.digest(test.train_once(test.make_work())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, __file__], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == digest(train_once(make_work()))


def test_seed_and_shard_each_make_a_difference() -> None:
    one = digest(train_once(make_work("anna")))
    assert digest(train_once(make_work("bert"))) != one
    assert digest(train_once(make_work("anna"), {"shard": "1", "num_shards": "5"})) != one


def test_every_client_computes_the_same_version_0() -> None:
    one, two = LocalWorker(SHARD, "cpu"), LocalWorker({"shard": "4", "num_shards": "5"}, "cpu")
    two.train(make_work("bert"), two.initialise(make_work("bert"))[1])
    (layout, base_D), (other_layout, other_D) = one.initialise(make_work("anna")), two.initialise(make_work("bert"))
    assert layout.digest == other_layout.digest == two.layout(make_work("bert")).digest
    assert base_D.tobytes() == other_D.tobytes()


def test_workers_on_several_threads_do_not_disturb_each_other() -> None:
    expected = digest(train_once(make_work()))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(digest(train_once(make_work())))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_global_generators_are_left_as_they_were() -> None:
    torch_before, numpy_before, python_before = torch.get_rng_state(), numpy_state(), random.getstate()
    train_once(make_work())
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert numpy_state() == numpy_before
    assert random.getstate() == python_before


def test_delta_is_trained_minus_base_and_the_base_is_untouched() -> None:
    worker = LocalWorker(SHARD, "cpu")
    work = make_work()
    _, base_D = worker.initialise(work)
    kept = base_D.copy()
    trained = worker.train(work, base_D)
    np.testing.assert_array_equal(base_D, kept)
    assert trained.delta_D.dtype == np.float32
    assert trained.delta_D.shape == base_D.shape
    assert trained.metrics["train_loss"] > 0
    assert trained.evaluation == worker.evaluate(work, base_D)
    assert worker.evaluate(work, base_D + trained.delta_D) != trained.evaluation


def test_held_out_examples_are_not_trained_on() -> None:
    worker = LocalWorker(SHARD, "cpu")
    work = make_work()
    _, base_D = worker.initialise(work)
    everything = LocalWorker(SHARD, "cpu").train(make_work(job=make_job(task={"held_out": 0.0})), base_D)
    trained = worker.train(work, base_D)
    assert everything.evaluation is None
    assert trained.evaluation is not None
    assert trained.num_examples + trained.evaluation.num_examples == everything.num_examples


def test_progress_rises_to_one() -> None:
    worker = LocalWorker(SHARD, "cpu")
    parts: list[float] = []
    worker.train(make_work(), worker.initialise(make_work())[1], progress=parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_stop_breaks_training_off_and_later_work_is_unharmed() -> None:
    worker = LocalWorker(SHARD, "cpu")
    work = make_work()
    _, base_D = worker.initialise(work)
    stop = threading.Event()
    parts: list[float] = []

    def after_first_step(part: float) -> None:
        parts.append(part)
        stop.set()

    with pytest.raises(Stopped, match="job-1"):
        worker.train(work, base_D, progress=after_first_step, stop=stop)
    assert len(parts) == 1
    with pytest.raises(Stopped):
        worker.train(work, base_D, stop=stop)
    assert digest(worker.train(work, base_D)) == digest(train_once(work))


def test_forgotten_job_is_built_again() -> None:
    worker = LocalWorker(SHARD, "cpu")
    _, base_D = worker.initialise(make_work())
    worker.train(make_work(), base_D)
    worker.forget("job-1")
    worker.forget("never-seen")
    larger = make_work(job=make_job(adapter={"rank": 8}))
    assert worker.layout(larger).num_values == 2 * base_D.size


def test_full_adapter_and_sgd_with_clipping_train_too() -> None:
    tree = make_job().model_dump(mode="json")
    tree["adapter"] = {"name": "full"}
    tree["training"] = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
    trained = train_once(make_work(job=parse_job(tree, "test")))
    assert trained.delta_D.any()
    # Each of the steps of one pass moves the weights by at most learning rate times the clipped norm.
    num_steps = -(-trained.num_examples // 32)
    assert np.linalg.norm(trained.delta_D) <= num_steps * 0.1 * 0.5 * (1 + 1e-5)


def test_base_of_another_length_is_refused() -> None:
    worker = LocalWorker(SHARD, "cpu")
    with pytest.raises(LayoutError, match="vector of shape"):
        worker.train(make_work(), np.zeros(3, dtype=np.float32))


def test_unknown_task_and_adapter_name_the_known_ones() -> None:
    worker = LocalWorker(SHARD, "cpu")
    with pytest.raises(UnknownPlugin, match=r"unknown task 'digit'.*did you mean 'digits'"):
        worker.layout(make_work(job=make_job(task={"name": "digit"})))
    with pytest.raises(UnknownPlugin, match=r"unknown adapter 'lorra'.*did you mean 'lora'"):
        worker.layout(make_work(job=make_job(adapter={"name": "lorra"})))


def test_unknown_task_key_names_path_and_nearest_key() -> None:
    with pytest.raises(InvalidInput, match=r"task\.partiton: unknown key; did you mean 'partition'"):
        LocalWorker(SHARD, "cpu").layout(make_work(job=make_job(task={"partiton": {}})))
    with pytest.raises(InvalidInput, match=r"task\.partition\.alhpa: unknown key; did you mean 'alpha'"):
        LocalWorker(SHARD, "cpu").layout(
            make_work(job=make_job(task={"partition": {"kind": "dirichlet", "alhpa": 1.0}}))
        )


def test_device_is_described() -> None:
    assert LocalWorker(SHARD, "cpu").device_description == "cpu (1 thread)"


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:x", "cuda:99", ""])
def test_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        select_device(name)


def test_cuda_without_any_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="this machine has 0 usable CUDA devices"):
        select_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_starts_from_the_same_version_0_and_trains() -> None:
    worker = LocalWorker(SHARD, "cuda")
    work = make_work()
    _, base_D = worker.initialise(work)
    assert base_D.tobytes() == LocalWorker(SHARD, "cpu").initialise(work)[1].tobytes()
    state = torch.cuda.get_rng_state()
    assert worker.train(work, base_D).delta_D.any()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert worker.device_description.startswith("cuda:0 ")


def test_trainer_is_imported_without_torch_and_digits_without_scikit_learn() -> None:
    program = (
        "import sys, fedclient.trainer\n"
        "assert 'torch' not in sys.modules\n"
        "from fedclient.tasks.digits.task import Digits\n"
        "Digits({}, {'shard': '0', 'num_shards': '5'}, 1).load()\n"
        "assert not {'sklearn', 'scipy', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_work_differs_by_seed_alone_gives_other_batches() -> None:
    work = make_work()
    assert digest(train_once(work)) != digest(train_once(replace(work, seed=work.seed + 1)))

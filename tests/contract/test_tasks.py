"""What every task must do, the one in examples/ included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedclient.adapters.full import Full
from fedclient.tasks import TASKS
from fedclient.tasks.base import Task, TrainingRun
from fedclient.tasks.files import load_task_file
from fedcore.errors import InvalidInput
from fedcore.jobfile import TrainingSection
from fedcore.registry import Registry
from tests.support.text_models import mood_rows, save_llama, write_jsonl

OWN_TASK = Path(__file__).parents[2] / "examples" / "own_task" / "task.py"
OPTIONS = {"shard": "1", "num_shards": "3"}
PARAMS: dict[str, dict[str, object]] = {
    "hf-causal-lm": {"model": "small", "max_length": 32},
    "hf-sequence-classification": {"model": "small", "max_length": 32, "labels": ["bad", "good"]},
}

tasks: Registry[type[Task]] = Registry("task", "roundtable.no-such-group", {})
for installed in TASKS.names():
    tasks.add(installed, TASKS.get(installed))
load_task_file(OWN_TASK, tasks)


@pytest.fixture(scope="module", autouse=True)
def small_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make what the tasks on Hugging Face models need besides their shard."""
    folder = tmp_path_factory.mktemp("small")
    own_options.update(
        model=str(save_llama(folder)), path=str(write_jsonl(folder / "rows.jsonl", mood_rows(120))), held_out="0.25"
    )


own_options: dict[str, str] = {}


@pytest.fixture(params=tasks.names())
def task_type(request: pytest.FixtureRequest) -> type[Task]:
    return tasks.get(str(request.param))


def options_of(task_type: type[Task]) -> dict[str, str]:
    return {**OPTIONS, **(own_options if task_type.name in PARAMS else {})}


def make(task_type: type[Task], seed: int = 5) -> Task:
    return task_type(PARAMS.get(task_type.name, {}), options_of(task_type), seed)


def seeded_model(task: Task) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return task.build_model()


def test_every_installed_task_is_checked_here() -> None:
    assert set(TASKS.names()) <= set(tasks.names())


def test_task_carries_the_name_it_is_registered_under(task_type: type[Task]) -> None:
    assert tasks.get(task_type.name) is task_type


def test_same_seed_loads_the_same_data(task_type: type[Task]) -> None:
    one, two = make(task_type).load(), make(task_type).load()
    for first, second in ((one.train, two.train), (one.held_out, two.held_out)):
        assert len(first) > 0
        assert torch.equal(first.inputs, second.inputs)
        assert torch.equal(first.targets, second.targets)


def test_model_is_the_same_under_the_same_generator(task_type: type[Task]) -> None:
    one, two = seeded_model(make(task_type)).state_dict(), seeded_model(make(task_type)).state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_training_lowers_the_loss_and_ticks_to_the_end(task_type: type[Task]) -> None:
    task = make(task_type)
    data = task.load()
    model = Full({}).attach(seeded_model(task), 1)
    settings = TrainingSection(local_epochs=5, batch_size=32, learning_rate=0.005)
    ticks: list[float] = []
    before = task.evaluate(model.module, data.train)["loss"]
    metrics = task.train(model, data.train, TrainingRun(settings, torch.Generator().manual_seed(2), ticks.append))
    assert task.evaluate(model.module, data.train)["loss"] < before
    assert metrics["train_loss"] < before
    assert ticks == sorted(ticks)
    assert ticks[-1] == 1.0


def test_evaluation_does_not_depend_on_how_the_examples_are_ordered(task_type: type[Task]) -> None:
    task = make(task_type)
    held_out = task.load().held_out
    model = seeded_model(task)
    reverse = torch.arange(len(held_out) - 1, -1, -1)
    turned = type(held_out)(held_out.inputs[reverse], held_out.targets[reverse])
    assert task.evaluate(model, held_out) == pytest.approx(task.evaluate(model, turned), rel=1e-5)


def test_unknown_job_key_names_the_nearest(task_type: type[Task]) -> None:
    known = next(iter(type(make(task_type).params).model_fields))
    with pytest.raises(InvalidInput, match=rf"task\.{known[:-1]}: unknown key; did you mean '{known}'\? known: "):
        task_type({known[:-1]: 1}, options_of(task_type), 1)


def test_unknown_data_option_names_the_nearest(task_type: type[Task]) -> None:
    with pytest.raises(InvalidInput, match=r"data\.shrad: unknown key; did you mean 'shard'\?"):
        task_type(PARAMS.get(task_type.name, {}), {**options_of(task_type), "shrad": "1"}, 1)


def test_data_option_that_is_no_number_is_named(task_type: type[Task]) -> None:
    with pytest.raises(InvalidInput, match=r"data\.shard: .*integer.*, got 'two'"):
        task_type(PARAMS.get(task_type.name, {}), {**options_of(task_type), "shard": "two"}, 1)

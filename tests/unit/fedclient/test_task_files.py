from __future__ import annotations

from pathlib import Path

import pytest

from fedclient.tasks.base import Task
from fedclient.tasks.files import load_task_file
from fedclient.trainer import LocalWorker, Work
from fedcore.errors import ConfigError, InvalidInput
from fedcore.jobfile import load_job
from fedcore.registry import Registry

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_task"


def empty() -> Registry[type[Task]]:
    return Registry("task", "roundtable.no-such-group", {})


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_example_task_learns_through_the_worker() -> None:
    tasks = empty()
    assert load_task_file(EXAMPLE / "task.py", tasks) == "breast-cancer"
    job = load_job(EXAMPLE / "job.toml")
    worker = LocalWorker({"shard": "0", "num_shards": "3"}, "cpu", 1, tasks)
    work = Work("own", job, 0, "anna", 5)
    _, base_D = worker.initialise(work)
    for _ in range(5):
        base_D = base_D + worker.train(work, base_D).delta_D
    assert worker.evaluate(work, base_D).metrics["accuracy"] > 0.9


def test_name_that_is_taken_is_refused() -> None:
    tasks = empty()
    load_task_file(EXAMPLE / "task.py", tasks)
    with pytest.raises(InvalidInput, match="'breast-cancer' is registered already"):
        load_task_file(EXAMPLE / "task.py", tasks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "must define one complete subclass of Task, found none"),
        ("from fedclient.tasks.base import Task\n", "found none"),
        ("from fedclient.tasks.base import Task\nclass Half(Task):\n    name = 'half'\n", "found none"),
        ("def f(:\n", "cannot be loaded: invalid syntax"),
        ("import no_such_module_here\n", "cannot be loaded: No module named"),
    ],
)
def test_file_without_a_task_is_refused_with_its_path(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_task_file(path, empty())
    assert str(path) in str(caught.value)


def test_file_that_is_not_there_or_not_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_task_file(tmp_path / "absent.py", empty())
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_task_file(tmp_path / "task.txt", empty())


def test_task_without_a_valid_name_is_refused(tmp_path: Path) -> None:
    body = (
        "from fedclient.tasks.base import LocalData, Task\nfrom torch import nn\n"
        "class Mine(Task):\n{name}"
        "    def load(self) -> LocalData: ...\n    def build_model(self) -> nn.Module: ...\n"
    )
    with pytest.raises(ConfigError, match="class Mine needs a name"):
        load_task_file(write(tmp_path, body.format(name="")), empty())
    with pytest.raises(InvalidInput, match=r"task name '\.\./evil' is not valid"):
        load_task_file(write(tmp_path, body.format(name="    name = '../evil'\n")), empty())

"""A client owner's own task, kept in a Python file of its own."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedclient.tasks import TASKS
from fedcore.errors import ConfigError
from fedcore.names import check_name
from fedcore.registry import Registry

if TYPE_CHECKING:
    from types import ModuleType

    from fedclient.tasks.base import Task


def load_task_file(path: Path, tasks: Registry[type[Task]] | None = None) -> str:
    """Run the Python file at `path`, register the task class in it, and return the task's name.

    The path is given by whoever runs the client, on the command line. It never comes from a job or a server.

    Args:
        path: a file that defines exactly one named subclass of `Task`; what it imports does not count.
        tasks: where to register; None is the table that jobs are looked up in.

    Raises:
        ConfigError: the file cannot be read or imported, or defines no task or several.
        InvalidInput: the task's name is not a name, or is taken.
    """
    from fedclient.tasks.base import Task

    module = _run(path)
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, Task)
        and member.__module__ == module.__name__
        and not inspect.isabstract(member)
    ]
    if len(found) != 1:
        names = ", ".join(task.__name__ for task in found) or "none"
        raise ConfigError(f"{path}: must define one complete subclass of Task, found {names}")
    task = found[0]
    name = getattr(task, "name", None)
    if not isinstance(name, str):
        raise ConfigError(f'{path}: class {task.__name__} needs a name, such as name = "my-task"')
    (TASKS if tasks is None else tasks).add(check_name(name, "task name"), task)
    return name


def _run(path: Path) -> ModuleType:
    name = f"roundtable_task_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Type hints of the classes in it are looked up through sys.modules.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError) as error:
        del sys.modules[name]
        raise ConfigError(f"{path}: cannot be loaded: {error}") from error
    return module

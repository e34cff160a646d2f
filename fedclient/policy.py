"""What a client's owner accepts, whatever a server asks for: `policy.toml`."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from fedcore.errors import ConfigError, NotFound, StateUnusable
from fedcore.params import Params
from fedcore.privatefiles import read_private
from fedcore.validation import problems_of

POLICY_FILE: Final = "policy.toml"
DEFAULT_DELTA: Final = 1e-5

Epsilon = Annotated[float, Field(gt=0, le=1e6)]


class PrivacyPolicy(Params):
    """The table `[privacy]`: where it is, jobs without privacy are refused."""

    mechanisms: list[Literal["dp-sgd", "dp-fedavg", "rqm", "dp-lora-paper"]] = Field(
        default=["dp-sgd", "dp-fedavg", "rqm", "dp-lora-paper"], min_length=1
    )
    units: list[Literal["example", "client"]] = Field(default=["example", "client"], min_length=1)
    trusts: list[Literal["local", "distributed", "central"]] = Field(
        default=["local", "distributed", "central"], min_length=1
    )
    epsilon_per_job: Epsilon | None = None
    epsilon_in_all: Epsilon | None = None
    delta: float = Field(default=DEFAULT_DELTA, gt=0, lt=1)
    evaluation: bool = False
    unsafe_seed: bool = False

    @property
    def has_budget(self) -> bool:
        """Whether epsilon is limited."""
        return self.epsilon_per_job is not None or self.epsilon_in_all is not None


class Policy(Params):
    """The whole file; what is left out is not restricted.

    Attributes:
        tasks: names of tasks, or shell patterns.
        privacy: None: jobs without privacy are accepted, and so is every other.
    """

    tasks: list[str] = Field(default=["*"], min_length=1)
    privacy: PrivacyPolicy | None = None

    def allows_task(self, name: str) -> bool:
        """Whether jobs on this task are accepted."""
        return any(fnmatchcase(name, pattern) for pattern in self.tasks)


def policy_in(folder: Path) -> Policy:
    """Return the policy of a client's folder; one that accepts everything if there is no file.

    Raises:
        ConfigError: see `load_policy`.
    """
    path = folder / POLICY_FILE
    return load_policy(path) if path.is_symlink() or path.exists() else Policy()


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigError: it is missing, cannot be read, is not TOML, or has keys that are unknown or out of bounds; every
            problem on a line of its own.
    """
    try:
        text = read_private(path).decode("utf-8")
        tree = tomllib.loads(text)
    except (NotFound, StateUnusable) as error:
        raise ConfigError(f"policy: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return Policy.model_validate(tree, strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in problems_of(error, Policy, tree))) from error

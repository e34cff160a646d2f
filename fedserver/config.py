"""The server's settings: `server.toml` in its state folder, written by `fedserver init`, for people to edit."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator

from fedcore.addresses import check_host
from fedcore.errors import ConfigError, StateUnusable
from fedcore.params import Params
from fedcore.privatefiles import write_private
from fedcore.validation import problems_of

FILE = "server.toml"
_WILDCARDS = ("0.0.0.0", "::")  # every address of this machine
Port = Annotated[int, Field(ge=0, le=65535)]


class ServerConfig(Params):
    """Where the server listens and what it is called. Change a value when you would change what its text says."""

    host: str = Field(default="0.0.0.0", description="Address to listen on; 127.0.0.1 for this machine alone.")
    public_host: str = Field(default="localhost", description="Name or address that clients dial; tokens carry it.")
    port: Port = Field(default=8470, description="Clients and operators, mutual TLS. 0: any free port.")
    enrolment_port: Port = Field(default=8471, description="Enrolment, server TLS. 0: any free port.")
    metrics_host: str = Field(
        default="127.0.0.1", description="Where Prometheus scrapes, by plain HTTP: keep it private."
    )
    metrics_port: Port = Field(default=9464, description="0: any free port.")

    @field_validator("public_host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("host", "metrics_host")
    @classmethod
    def _can_be_listened_on(cls, value: str) -> str:
        return value if value in _WILDCARDS else check_host(value)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the settings of a state folder.

        Raises:
            StateUnusable: there is no such file; the text says how to make one.
            ConfigError: it is not TOML, or a key is unknown or out of bounds.
        """
        path = folder / FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise StateUnusable(f"{folder} is not a server's state folder; make one with `fedserver init`") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        try:
            tree = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: bad TOML, and integers of over 4300 digits
            raise ConfigError(f"{path}: not TOML: {error}") from error
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"{path}: {'; '.join(problems_of(error, cls, tree))}") from error

    def save(self, folder: Path) -> None:
        """Write the settings, each with its explanation.

        Raises:
            StorageFailed: the operating system refused.
        """
        lines: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            shown = str(value) if isinstance(value, int) else f'"{value}"'  # hosts hold no character to escape
            lines += [f"# {field.description}", f"{name} = {shown}", ""]
        write_private(folder / FILE, "\n".join(lines).encode())

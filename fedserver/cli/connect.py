"""From a state folder to the server that runs on it.

`fedserver run` leaves `running.json` in its state folder while it serves: its ports may have been chosen on the command
line or by the system. Without that file the settings say where the server would be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedcore.errors import NotFound, StateUnusable, Unreachable
from fedcore.privatefiles import read_private, remove_private, write_private

if TYPE_CHECKING:
    from fedserver.daemon import Ready
    from fedserver.rpc.operator_client import OperatorClient

_RUNNING: Final = "running.json"


def announce(folder: Path, ready: Ready) -> None:
    """Write down where the server of a folder listens.

    Raises:
        StorageFailed: the operating system refused.
    """
    write_private(folder / _RUNNING, json.dumps({"address": ready.address}).encode("ascii"))


def withdraw(folder: Path) -> None:
    """Remove what `announce` wrote.

    Raises:
        StorageFailed: the operating system refused.
    """
    remove_private(folder / _RUNNING)


@contextmanager
def operator(folder: Path) -> Iterator[OperatorClient]:
    """Connect to the server of a state folder, with the operator's certificate in it.

    Raises:
        StateUnusable: the folder was never initialised, or lacks the operator's keys.
        Unreachable: no server runs on it, and it has no port of its own.
        ConfigError: its settings are wrong.
    """
    address = _address(folder)
    try:
        ca_pem, certificate_pem, key_pem = (
            read_private(folder / "keys" / name) for name in ("ca.pem", "operator.pem", "operator.key")
        )
    except NotFound as error:
        raise StateUnusable(f"no operator's keys in {folder}: {error}; `fedserver init` makes them") from error
    from fedserver.rpc.operator_client import OperatorClient

    with OperatorClient(address, ca_pem=ca_pem, certificate_pem=certificate_pem, key_pem=key_pem) as client:
        yield client


def _address(folder: Path) -> str:
    from fedserver.config import ServerConfig

    config = ServerConfig.load(folder)  # first: it has the words for a folder that is none
    damaged = StateUnusable(f"{folder / _RUNNING} is damaged; remove it and start the server again")
    try:
        found = json.loads(read_private(folder / _RUNNING))
    except NotFound:
        if config.port == 0:
            raise Unreachable(f"no server runs on {folder}: start it with `fedserver run`") from None
        host = f"[{config.public_host}]" if ":" in config.public_host else config.public_host
        return f"{host}:{config.port}"
    except (ValueError, RecursionError) as error:
        raise damaged from error
    match found:
        case {"address": str(address)}:
            return address
    raise damaged

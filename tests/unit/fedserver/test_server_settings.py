"""The small files that tell where a server listens: `server.toml`, and `running.json` while it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import ConfigError, StateUnusable, Unreachable
from fedserver.cli import connect
from fedserver.config import FILE, ServerConfig

DEEP = "[" * 3000


@pytest.mark.parametrize(
    "config",
    [
        ServerConfig(),
        ServerConfig(host="::", public_host="fe80::1%eth0", port=0),
        ServerConfig(public_host="a.example"),
    ],
)
def test_settings_are_read_back_as_they_were_written(tmp_path: Path, config: ServerConfig) -> None:
    config.save(tmp_path)
    assert ServerConfig.load(tmp_path) == config


@pytest.mark.parametrize(
    "text", ["port = 1\nport = 2", f"port = {DEEP}", f"port = {'9' * 5000}", "port = -1", 'host = "a b"', "prot = 1"]
)
def test_wrong_settings_are_named_with_their_file(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=FILE):
        ServerConfig.load(tmp_path)


def test_a_zone_that_would_not_survive_the_file_is_no_host(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('public_host = "fe80::1%\\"\\n"')
    with pytest.raises(ConfigError, match="public_host"):
        ServerConfig.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": 8470}', DEEP, '{"address": "localhost:1"'])
def test_a_damaged_running_file_is_reported(tmp_path: Path, text: str) -> None:
    ServerConfig().save(tmp_path)
    (tmp_path / "running.json").write_text(text)
    with pytest.raises(StateUnusable, match=r"running\.json is damaged"), connect.operator(tmp_path):
        pass


def test_without_a_running_server_and_a_port_there_is_nobody_to_call(tmp_path: Path) -> None:
    ServerConfig(port=0).save(tmp_path)
    with pytest.raises(Unreachable, match="fedserver run"), connect.operator(tmp_path):
        pass

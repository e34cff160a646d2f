from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fedclient.basedigest import base_digest
from fedclient.cli import app, parse_data
from fedclient.daemon import ClientSettings
from fedclient.enroll import enroll, read_token
from fedclient.identity import ClientIdentity, new_request
from fedclient.tasks.digits.network import BASE_WEIGHTS
from fedcore.cli import run_app
from fedcore.clock import SystemClock
from fedcore.errors import ConfigError, Exit, InvalidInput, Refused, Unauthenticated, Unreachable
from fedcore.identity import EnrolmentToken
from fedserver.security.authority import Authority


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("a") / "ca", "fed", ["127.0.0.1"])


@pytest.fixture
def token(authority: Authority) -> EnrolmentToken:
    expires_at = SystemClock().wall_s() + 600
    return EnrolmentToken("127.0.0.1:1", "127.0.0.1:1", "fed", "c1", authority.ca_pem.decode(), "s" * 43, expires_at)


@pytest.fixture
def identity(authority: Authority, tmp_path: Path) -> ClientIdentity:
    request = new_request("c1", "fed")
    pem = authority.sign_client(request.csr_pem, "c1").public_bytes(Encoding.PEM)
    identity = request.complete(pem, server="127.0.0.1:1", ca_pem=authority.ca_pem, now_s=SystemClock().wall_s())
    identity.save(tmp_path / "id")
    return identity


def run(*arguments: str) -> int:
    return run_app(app, "fedclient", arguments)


def test_a_token_is_read_from_argument_file_or_standard_input(
    token: EnrolmentToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = token.encode()
    (tmp_path / "token").write_text(text + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert read_token(text) == read_token(f"@{tmp_path / 'token'}") == read_token("-") == token


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary"):
        with pytest.raises(ConfigError, match=name):
            read_token(f"@{tmp_path / name}")
    with pytest.raises(InvalidInput):
        read_token("not a token")


async def test_an_expired_token_is_not_sent(token: EnrolmentToken, tmp_path: Path) -> None:
    class Later(SystemClock):
        def wall_s(self) -> float:
            return token.expires_at

    with pytest.raises(Unauthenticated, match="expired"):
        await enroll(token, tmp_path / "id", Later())
    assert not (tmp_path / "id").exists()


async def test_a_folder_with_an_identity_is_refused_before_the_token_is_spent(
    token: EnrolmentToken, identity: ClientIdentity, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="already holds"):
        await enroll(token, tmp_path / "id", SystemClock())


async def test_without_a_server_enrolling_leaves_no_identity(token: EnrolmentToken, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        await enroll(token, tmp_path / "id", SystemClock())
    assert list((tmp_path / "id").iterdir()) == []


def test_data_options_become_a_mapping() -> None:
    assert parse_data(["shard=0", "path=/a=b", "empty="]) == {"shard": "0", "path": "/a=b", "empty": ""}


@pytest.mark.parametrize("pairs", [["shard"], ["=0"], ["a=1", "a=2"]])
def test_data_options_that_are_not_pairs_are_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigError, match="--data"):
        parse_data(pairs)


def test_settings_are_checked_as_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threads 0: 1 to"):
        ClientSettings(tmp_path, threads=0)
    with pytest.raises(InvalidInput, match="server"):
        ClientSettings(tmp_path, server="nowhere")


def test_running_without_an_identity_says_to_enroll(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--folder", str(tmp_path)) == Exit.NOT_FOUND
    assert "run `fedclient enroll` first" in capsys.readouterr().err


def test_check_says_what_is_wrong_with_its_exit_code(
    identity: ClientIdentity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "--folder", str(tmp_path / "id"), "--device", "cpu", "--json") == Exit.UNREACHABLE
    found = json.loads(capsys.readouterr().out)
    assert {name: finding["ok"] for name, finding in found.items()} == {
        "identity": True,
        "device": True,
        "server": False,
    }
    assert found["identity"]["text"].startswith("c1 in fed, valid until ")


def test_check_looks_at_policy_and_ledger(
    identity: ClientIdentity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("check", "--folder", str(tmp_path / "id"), "--device", "cpu", "--json")
    (tmp_path / "id" / "policy.toml").write_text("[privacy]\nepsilon_in_all = 4\n", encoding="utf-8")
    assert run(*arguments) == Exit.UNREACHABLE
    found = json.loads(capsys.readouterr().out)["privacy"]
    assert (found["ok"], found["text"]) == (True, "policy for private jobs; ledger of 0 updates in 0 jobs")
    (tmp_path / "id" / "policy.toml").write_text("[privacy]\nepsilon = 4\n", encoding="utf-8")
    assert run(*arguments) == Exit.INVALID
    assert "privacy.epsilon: unknown key" in json.loads(capsys.readouterr().out)["privacy"]["text"]
    (tmp_path / "id" / "policy.toml").unlink()
    (tmp_path / "id" / "privacy-ledger.jsonl").write_text("damaged\n", encoding="utf-8")
    assert run(*arguments) == Exit.STATE_UNUSABLE
    assert run("run", "--folder", str(tmp_path / "id")) == Exit.STATE_UNUSABLE
    assert "is not what was written there" in capsys.readouterr().err


def test_a_policy_that_is_named_must_be_there_and_be_one(
    identity: ClientIdentity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strict.toml").write_text("privacy = 1\ntask = 2\n", encoding="utf-8")
    for name, text in (("missing.toml", "missing.toml is missing"), ("strict.toml", "did you mean 'tasks'?")):
        assert run("run", "--folder", str(tmp_path / "id"), "--policy", str(tmp_path / name)) == Exit.INVALID
        assert text in capsys.readouterr().err


def test_check_reads_as_a_table_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--folder", str(tmp_path), "--device", "gpu") == Exit.NOT_FOUND
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["BAD", "identity"],
        ["BAD", "device"],
    ]


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys; from fedclient.cli import app; from fedcore.cli import run_app;"
        "run_app(app, 'fedclient', ['run', '--help']);"
        "sys.exit(sorted({'torch', 'grpc', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_starts_a_session_needs_no_torch() -> None:
    code = (
        "import sys, fedclient.runner, fedclient.daemon, fedclient.transport.grpc_transport;"
        "sys.exit(int('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_and_option_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "client.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"fedclient {command.callback.__name__}" in text
    for option in ("--token", "--folder", "--force", "--data", "--task-file", "--device", "--threads", "--server"):
        assert f"`{option}" in text


# -- base ------------------------------------------------------------------------------------------------------------

SHARD = ("--data", "shard=0", "--data", "num_shards=5")


def test_base_prints_the_digest_of_files_and_of_what_a_job_builds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.toml"
    text = '[job]\nname = "a"\nrounds = 1\n[task]\nname = "digits"\n[schedule]\ncohort = 1\n[adapter]\nname = "{}"\n'
    job.write_text(text.format("lora"))
    for place in (BASE_WEIGHTS, BASE_WEIGHTS.parent, job):
        assert run("base", str(place), *SHARD) == Exit.OK
        assert capsys.readouterr().out == f"{base_digest(BASE_WEIGHTS)}\n"
    job.write_text(text.format("full"))
    assert run("base", str(job), *SHARD) == Exit.OK
    assert "nothing of the model is frozen" in capsys.readouterr().out
    assert run("base", str(job), *SHARD, "--json") == Exit.OK
    assert json.loads(capsys.readouterr().out) == {"path": str(job), "base_digest": None}


def test_base_of_what_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, text in ((tmp_path, "holds no *.safetensors"), (tmp_path / "no.toml", "cannot be read")):
        assert run("base", str(place)) == Exit.INVALID
        assert text in capsys.readouterr().err

"""`fedserver`'s commands against a real server in this process."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.cli import run_app
from fedcore.clock import SystemClock
from fedcore.errors import Exit
from fedcore.identity import EnrolmentToken
from fedserver.cli import app
from fedserver.config import ServerConfig
from tests.support.player import LAYOUT, playing
from tests.support.server import FEDERATION, TestServer, running_server

JOB = """
[job]
name = "small"
rounds = 1

[task]
name = "played"

[schedule]
cohort = 1
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands on a thread, so that the server's loop stays free."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    async def run(self, command: str, *arguments: str, expect: int = Exit.OK) -> Answer:
        given = [command, *arguments, "--folder", str(self.folder)]
        code = await asyncio.to_thread(run_app, app, "fedserver", given)
        answer = Answer(code, *self._capsys.readouterr())
        assert answer.code == expect, answer
        return answer


@dataclass
class Scene:
    server: TestServer
    shell: Shell
    job_file: Path

    async def submit(self) -> str:
        return (await self.shell.run("submit", str(self.job_file))).out.strip()


@pytest.fixture
async def scene(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Scene]:
    job_file = tmp_path / "job.toml"
    job_file.write_text(JOB)
    async with running_server(tmp_path) as server:
        ServerConfig(public_host="localhost", port=server.rpc.port).save(tmp_path)
        yield Scene(server, Shell(tmp_path, capsys), job_file)


@asynccontextmanager
async def working_client(server: TestServer) -> AsyncIterator[None]:
    """A client that does whatever it is asked."""
    identity = await server.enrol("ann")
    transport = GrpcTransport(identity, SystemClock())
    async with playing(transport, identity.signing_key) as player:

        async def work() -> None:
            while True:
                await player.answer(await player.next_work())

        working = asyncio.create_task(work())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.wait({working})
    await transport.close()


async def test_a_token_and_nothing_else_goes_to_standard_output(scene: Scene) -> None:
    answer = await scene.shell.run("token", "ann", "--lifetime", "15m")
    token = EnrolmentToken.decode(answer.out.strip())
    assert (token.client, token.federation) == ("ann", FEDERATION)
    assert answer.out.count("\n") == 1
    assert answer.err == ""


async def test_a_token_as_json(scene: Scene) -> None:
    answer = (await scene.shell.run("token", "ann", "--json")).json
    assert (answer["client"], answer["lifetime_s"]) == ("ann", 3600)
    assert EnrolmentToken.decode(answer["token"]).client == "ann"


@pytest.mark.parametrize("arguments", [["no good"], ["ann", "--lifetime", "31d"], ["ann", "--lifetime", "soon"]])
async def test_a_bad_token_request_is_invalid(scene: Scene, arguments: list[str]) -> None:
    answer = await scene.shell.run("token", *arguments, expect=Exit.INVALID)
    assert answer.out == ""
    assert answer.err.startswith("error: ")


async def test_clients_are_listed_and_revoked(scene: Scene) -> None:
    assert "nobody has enrolled yet" in (await scene.shell.run("clients")).out
    await scene.server.enrol("ann")
    heading, row = (await scene.shell.run("clients")).out.splitlines()
    assert heading.split() == ["CLIENT", "STATE", "ENROLLED", "EXPIRES", "DEVICE", "SOFTWARE"]
    assert row.split()[:2] == ["ann", "away"]
    assert (await scene.shell.run("revoke", "ann", "--yes")).out == "revoked ann\n"
    (client,) = (await scene.shell.run("clients", "--json")).json["clients"]
    assert (client["name"], client["revoked"], client["connected"]) == ("ann", True, False)


async def test_revoking_asks_or_needs_yes(scene: Scene) -> None:
    await scene.server.enrol("ann")
    answer = await scene.shell.run("revoke", "ann", "--json", expect=Exit.USAGE)
    assert "--yes" in json.loads(answer.err)["error"]["text"]
    assert scene.server.membership.num_enrolled == 1


async def test_who_is_not_there_cannot_be_revoked(scene: Scene) -> None:
    answer = await scene.shell.run("revoke", "bob", "--yes", expect=Exit.NOT_FOUND)
    assert answer.err == "error: no client 'bob'\n"


async def test_a_job_is_submitted_shown_and_stopped(scene: Scene) -> None:
    job_id = await scene.submit()
    (job,) = (await scene.shell.run("status", "--json")).json["jobs"]
    assert (job["job_id"], job["status"], job["phase"]) == (job_id, "running", "waiting")
    for name in (job_id, job_id[:8], "small"):
        assert (await scene.shell.run("status", name, "--json")).json["jobs"][0]["job_id"] == job_id
    text = (await scene.shell.run("status")).out
    assert f"small {job_id[:8]}: round 0/1; making version 0: waits for 1 client" in text
    assert (await scene.shell.run("stop", "small")).out == f"{job_id} stopped\n"
    assert "stopped" in (await scene.shell.run("jobs")).out
    answer = await scene.shell.run("status", "small", "--watch", expect=Exit.JOB_FAILED)
    assert answer.err == f"error: job small ({job_id}) stopped: stopped by an operator\n"


async def test_an_ambiguous_name_lists_the_ids(scene: Scene) -> None:
    first, second = await scene.submit(), await scene.submit()
    answer = await scene.shell.run("stop", "small", expect=Exit.INVALID)
    assert first in answer.err
    assert second in answer.err


async def test_an_unknown_job_is_not_found(scene: Scene, tmp_path: Path) -> None:
    for command in (["status", "nope"], ["stop", "nope"], ["export", "nope", "--out", str(tmp_path / "out")]):
        answer = await scene.shell.run(*command, expect=Exit.NOT_FOUND)
        assert answer.err == "error: no job 'nope'; known: none\n"
    assert not (tmp_path / "out").exists()


async def test_submit_and_wait_follows_the_job_to_its_export(scene: Scene, tmp_path: Path) -> None:
    async with working_client(scene.server):
        answer = await scene.shell.run("submit", str(scene.job_file), "--wait")
    job_id, *lines = answer.out.splitlines()
    assert f"small {job_id[:8]}: round 1/1; finished after" in lines[-1]
    assert "accuracy 0.5" in lines[-1]

    made = (await scene.shell.run("export", job_id[:6], "--out", str(tmp_path / "out"), "--json")).json
    assert (made["version"], made["adapter"]) == (1, None)
    assert sorted(load_file(made["weights"])) == sorted(tensor.name for tensor in LAYOUT.tensors)
    answer = await scene.shell.run("export", job_id, "--out", str(tmp_path / "out"), expect=Exit.INVALID)
    assert "--force" in answer.err
    answer = await scene.shell.run("export", job_id, "--out", str(tmp_path / "out"), "--force", "--version", "0")
    assert answer.out.startswith("version 0 of small in ")
    for form, message in (("merged", "--base"), ("peft", "adapter full is not low-rank; choose another")):
        arguments = ["export", job_id, "--out", str(tmp_path / "x"), "--format", form]
        assert message in (await scene.shell.run(*arguments, expect=Exit.INVALID)).err
    await scene.shell.run("export", job_id, "--out", str(tmp_path / "y"), "--format", "weights")
    answer = await scene.shell.run("export", job_id, "--out", str(tmp_path / "x"), "--version", "9", expect=4)
    assert "version 9" in answer.err


async def test_waiting_as_json_has_an_object_for_each_change(scene: Scene) -> None:
    async with working_client(scene.server):
        answer = await scene.shell.run("submit", str(scene.job_file), "--wait", "--json")
    first, *statuses = map(json.loads, answer.out.splitlines())
    assert (first["name"], first["status"]) == ("small", "running")
    assert statuses[-1]["jobs"][0]["status"] == "finished"
    assert statuses[-1]["jobs"][0]["job_id"] == first["job_id"]


async def test_a_job_that_fails_while_waited_for_is_exit_code_10(scene: Scene) -> None:
    waiting = asyncio.create_task(scene.shell.run("submit", str(scene.job_file), "--wait", "--json", expect=10))
    while not scene.server.federation.engines:
        await scene.server.federation.next_change().wait()
    (job_id,) = scene.server.federation.engines
    await scene.server.federation.stop_job(job_id)
    assert json.loads((await waiting).err)["error"]["code"] == "job-failed"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("rounds = 1", "round = 1", "job.round: unknown key; did you mean 'rounds'?"),
        ("rounds = 1", "rounds = 0", "job.rounds: "),
        ("[schedule]", '[aggregator]\nrule = "weighted-men"\n[schedule]', "did you mean 'weighted-mean'?"),
        ("[schedule]", '[compression]\nuplink = [{ codec = "rwa" }]\n[schedule]', "compression.uplink: unknown codec"),
        ("[job]", "[job", "not TOML"),
    ],
)
@pytest.mark.parametrize("command", ["submit", "check"])
async def test_a_bad_job_file_is_told_line_by_line(
    command: str, old: str, new: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB.replace(old, new))
    assert run_app(app, "fedserver", [command, str(file)]) == Exit.INVALID
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {file}: ")
    assert text in err


def test_check_prints_the_job_with_its_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    assert run_app(app, "fedserver", ["check", str(file)]) == Exit.OK
    out, err = capsys.readouterr()
    assert tomllib.loads(out)["training"]["batch_size"] == 32
    assert err == f"{file}: valid\n"
    (tmp_path / "again.toml").write_text(out)
    assert run_app(app, "fedserver", ["check", str(tmp_path / "again.toml"), "--json"]) == Exit.OK
    answer = json.loads(capsys.readouterr().out)
    assert (answer["valid"], answer["job"]["job"]["name"]) == (True, "small")


def test_check_prints_the_schema_or_needs_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, "fedserver", ["check", "--schema"]) == Exit.OK
    assert "schedule" in json.loads(capsys.readouterr().out)["properties"]
    assert run_app(app, "fedserver", ["check"]) == Exit.USAGE


def test_methods_lists_what_job_files_can_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, "fedserver", ["methods"]) == Exit.OK
    text = capsys.readouterr().out
    assert "weighted-mean  built in  fold, streams, exact" in text
    assert run_app(app, "fedserver", ["methods", "--json"]) == Exit.OK
    answer = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in answer["codecs"]} >= {"raw", "bf16"}
    assert next(row for row in answer["rules"] if row["name"] == "weighted-mean")["traits"]["exact"] is True
    assert next(row for row in answer["server_optimizers"] if row["name"] == "adam")["traits"] == {"slots": ["m", "v"]}

"""kill -9 of servers and clients of a job whose versions change the frozen matrices: every version keeps its bytes.

Real processes and torch: what a client trains depends on every change that it has made, so one that misses a change, or
makes one twice, gives other bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedcore.jobfile import Job, parse_job
from tests.integration.test_killed_at_the_start import NAMES, let_go, start_client
from tests.support.gate import Gate, open_gate
from tests.support.gated_plugins import environment
from tests.support.processes import Deployment, Tree, bytes_of

ROUNDS = 4


def make_job() -> Job:
    tree: dict[str, object] = {
        "job": {"name": "changes", "rounds": ROUNDS, "seed": 3, "method": "fedex-lora"},
        "task": {"name": "gated-layers"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "training": {"learning_rate": 0.05, "batch_size": 8},
        "schedule": {"cohort": len(NAMES), "quorum": len(NAMES), "deadline_s": 60.0},
    }
    return parse_job(tree, "job")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    plugins = environment(tmp_path_factory.mktemp("site"))
    with Deployment(tmp_path_factory.mktemp("changes"), environment=plugins) as deployment:
        deployment.start_server()
        yield deployment


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


def result(deployment: Deployment, job_id: str) -> list[tuple[object, ...]]:
    history: list[Tree] = deployment.finish(job_id)
    return bytes_of(history)


def test_server_and_clients_killed_between_changes(deployment: Deployment, gate: Gate) -> None:
    for name in NAMES:
        start_client(deployment, name, gate)
    with gate.opened():
        expected = result(deployment, deployment.submit(make_job()))
    assert len({row[1] for row in expected}) == len(expected) == ROUNDS + 1
    job_id = deployment.submit(make_job())
    for number in range(ROUNDS):
        held = [gate.wait_for_client() for _ in NAMES]
        if number == 1:  # the first client loses the changes that it has made
            deployment.clients[NAMES[0]].kill()
            start_client(deployment, NAMES[0], gate)
            held.append(gate.wait_for_client())
        elif number == 2:  # the server comes back to clients that have them
            deployment.server.kill()
            deployment.start_server()
        elif number == 3:  # both
            deployment.server.kill()
            deployment.clients[NAMES[1]].kill()
            deployment.start_server()
            start_client(deployment, NAMES[1], gate)
            held.append(gate.wait_for_client())
        let_go(held)
    with gate.opened():
        assert result(deployment, job_id) == expected
    for name in NAMES:
        deployment.clients[name].kill()

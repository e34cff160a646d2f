"""The demo job through the simulator: the server's engine and the client's runner as they are deployed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedcore.jobfile import load_job
from fedsim.pooled import measure
from fedsim.simulation import make_clients, simulate

JOB_FILE = Path(__file__).parents[2] / "examples" / "digits.toml"


def test_the_federated_adapter_closes_three_quarters_of_the_gap_to_pooled_training() -> None:
    job = load_job(JOB_FILE)
    clients = make_clients(job, 5, {})
    simulated = asyncio.run(simulate(job, clients))
    bounds = measure(job, [client.data for client in clients])
    base = simulated.history[0]["evaluation"]["accuracy"]
    federated = simulated.history[-1]["evaluation"]["accuracy"]
    pooled = bounds.pooled["accuracy"]
    assert abs(bounds.base["accuracy"] - base) < 1e-9
    assert base < 0.4, "the base must do badly on shifted digits, or there is nothing to show"
    assert pooled > 0.8
    gap_closed = (federated - base) / (pooled - base)
    assert gap_closed >= 0.75, f"base {base:.3f}, pooled {pooled:.3f}, federated {federated:.3f}"

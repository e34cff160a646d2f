"""The table of RQM's vectors in docs/privacy.md, computed again: the rows that take no more than seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedprivacy.accountant import epsilon_rdp
from fedprivacy.events import Adjacency, Gaussian, History, Mechanism, Release, Rqm, Trust, Unit
from fedprivacy.levels import variance

DOCS = Path(__file__).resolve().parents[3] / "docs/privacy.md"
RANKS = (1, 4, 8, 16, 64)
CLIPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def row(name: str) -> list[str]:
    """Return the cells of the row with that name, below the head of the table."""
    table = DOCS.read_text(encoding="utf-8").split("| clients | r = 1 |")[1]
    found = re.search(rf"^\| {name} \|(.*)\|$", table, re.MULTILINE)
    assert found, name
    return [cell.strip() for cell in found[1].split("|")]


def epsilon(mechanism: Mechanism) -> float:
    release = Release(mechanisms=(mechanism,), count=50)
    history = History(unit=Unit.CLIENT, adjacency=Adjacency.REPLACE, trust=Trust.SECURE_SUM, releases=(release,))
    return epsilon_rdp(history, 1e-5)


def shown(values: list[float]) -> list[str]:
    """Return epsilons with as many digits as the table shows."""
    return [f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}" for value in values]


@pytest.mark.parametrize("clients", [1, 10])
def test_levels_of_a_vector_cost_what_the_table_says(clients: int) -> None:
    found = [epsilon(Rqm(clients=clients, dimension=rank**2)) for rank in RANKS]
    found += [epsilon(Rqm(clients=clients, dimension=10**6, l2_clip=clip)) for clip in CLIPS]
    assert row(str(clients)) == shown(found)


@pytest.mark.parametrize(("name", "clients"), [("Gaussian noise of equal variance, 40", 40), ("same, 100", 100)])
def test_normal_noise_beside_it_costs_what_the_table_says(name: str, clients: int) -> None:
    std = (clients * variance(0.0, Rqm())) ** 0.5
    found = [epsilon(Gaussian(noise_multiplier=std / clip)) for clip in CLIPS]
    assert row(name)[len(RANKS) :] == shown(found)

"""Histories of what was released, as a ledger on a damaged disk or a peer may give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedcore.errors import InvalidInput
from fedprivacy.events import Adjacency, ClipCount, FixedSize, Gaussian, History, Pbm, Poisson, Release, Rqm, Unit
from fedprivacy.guarantee import not_covered, sampling_texts
from tests.fuzz.target import BOMBS, Target, check_refusal

STEP: Final = Release(mechanisms=(Gaussian(noise_multiplier=1.0), ClipCount(std=2.0)), sampling=Poisson(rate=0.1))
LEVELS: Final = Release(mechanisms=(Rqm(clients=3, dimension=7, l2_clip=0.5), Pbm(trials=4)), count=5)
DRAWN: Final = Release(mechanisms=(Gaussian(noise_multiplier=2.0),), sampling=FixedSize(size=3, population=10))


def read_history(data: bytes) -> None:
    try:
        history = History.from_json(data)
    except InvalidInput as error:
        check_refusal(error)
        return
    written = history.to_json()
    assert History.from_json(written) == history
    assert History.from_json(written).to_json() == written
    assert sampling_texts(history)
    assert not_covered(history)
    for release in history.releases:
        if 2 * release.count <= 10**9:
            grown = history.then(release)
            assert len(grown.releases) == len(history.releases)


def histories() -> Iterator[bytes]:
    for unit, adjacency, releases in (
        (Unit.CLIENT, Adjacency.ADD_OR_REMOVE, ()),
        (Unit.EXAMPLE, Adjacency.ADD_OR_REMOVE, (STEP,)),
        (Unit.CLIENT, Adjacency.ZERO_OUT, (STEP, LEVELS)),
        (Unit.CLIENT, Adjacency.REPLACE, (DRAWN, LEVELS)),
    ):
        yield History(unit=unit, adjacency=adjacency, releases=releases).to_json().encode()
    yield b'{"unit":"client","releases":[{"mechanisms":[{"kind":"gaussian","noise_multiplier":1e999}],"count":NaN}]}'
    yield b'{"unit":"\\ud800","trust":[1e400],"adjacency":{"kind":null}}'
    yield from (b'{"unit":' + bomb + b"}" for bomb in BOMBS)
    yield from BOMBS


TARGETS: Final = (Target("privacy-history", read_history, histories),)

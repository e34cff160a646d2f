"""What was released survives JSON, is counted rather than listed, and is refused where nothing accounts for it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcore.errors import InvalidInput
from fedcore.params import Params
from fedprivacy.events import (
    Adjacency,
    ClipCount,
    Everyone,
    FixedSize,
    Gaussian,
    History,
    Pbm,
    Poisson,
    Release,
    Rqm,
    Trust,
    Unit,
)

GAUSSIANS = st.builds(Gaussian, noise_multiplier=st.floats(1e-3, 1e6))
COUNTS = st.builds(ClipCount, std=st.floats(1e-3, 1e6))
RQMS = st.builds(
    Rqm,
    levels=st.integers(2, 64),
    keep=st.floats(0.01, 0.99),
    clients=st.integers(1, 1000),
    dimension=st.integers(1, 10**6),
    l2_clip=st.none() | st.floats(1e-3, 10),
)
PBMS = st.builds(Pbm, trials=st.integers(1, 64), theta=st.floats(0.01, 0.49))
DRAWN = st.builds(
    Release,
    mechanisms=st.lists(GAUSSIANS | COUNTS, min_size=1, max_size=3).map(tuple),
    sampling=st.just(Everyone()) | st.builds(Poisson, rate=st.floats(1e-6, 0.999)),
    count=st.integers(1, 10**6),
)
DISCRETE = st.builds(Release, mechanisms=st.lists(RQMS | PBMS, min_size=1, max_size=2).map(tuple))
HISTORIES = st.builds(
    History,
    unit=st.sampled_from(Unit),
    adjacency=st.just(Adjacency.ZERO_OUT),
    trust=st.sampled_from(Trust),
    releases=st.lists(DRAWN | DISCRETE, max_size=4).map(tuple),
)
WORDS = sorted({name for each in (History, Release, Gaussian, FixedSize, Rqm, Pbm) for name in each.model_fields})
STEP = Release(mechanisms=(Gaussian(noise_multiplier=1.0),), sampling=Poisson(rate=0.1))


@given(HISTORIES)
def test_json_gives_back_the_same_history(history: History) -> None:
    assert History.from_json(history.to_json()) == history
    assert "\n" not in history.to_json()


def test_json_is_what_a_ledger_can_read_in_years() -> None:
    history = History(unit=Unit.EXAMPLE, releases=(STEP,))
    assert json.loads(history.to_json()) == {
        "unit": "example",
        "adjacency": "add-or-remove-one",
        "trust": "central",
        "releases": [
            {
                "mechanisms": [{"kind": "gaussian", "noise_multiplier": 1.0}],
                "sampling": {"kind": "poisson", "rate": 0.1},
                "count": 1,
            }
        ],
    }


def test_equal_releases_are_counted() -> None:
    other = STEP.model_copy(update={"sampling": Everyone(), "count": 7})
    history = History(unit=Unit.CLIENT)
    for release in (STEP, other, STEP, STEP.model_copy(update={"count": 10}), other):
        history = history.then(release)
    assert [release.count for release in history.releases] == [12, 14]
    assert history.releases[0].sampling == Poisson(rate=0.1)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Gaussian, {"noise_multiplier": -1.0}),
        (Gaussian, {"noise_multiplier": 0.0}),
        (Gaussian, {"noise_multiplier": float("nan")}),
        (Gaussian, {"noise_multiplier": float("inf")}),
        (Gaussian, {}),
        (ClipCount, {"std": 0.0}),
        (Poisson, {"rate": 0.0}),
        (Poisson, {"rate": 1.0}),
        (FixedSize, {"size": 11, "population": 10}),
        (FixedSize, {"size": 0, "population": 10}),
        (Rqm, {"levels": 1}),
        (Rqm, {"levels": 65}),
        (Rqm, {"keep": 0.0}),
        (Rqm, {"keep": 1.0}),
        (Rqm, {"clip": 0.0}),
        (Rqm, {"extension": 0.0}),
        (Rqm, {"extension": 1e-7}),
        (Rqm, {"clients": 0}),
        (Rqm, {"dimension": 0}),
        (Rqm, {"l2_clip": 0.0}),
        (Rqm, {"level": 3}),
        (Pbm, {"theta": 0.5}),
        (Pbm, {"theta": 0.0}),
        (Pbm, {"trials": 0}),
    ],
)
def test_values_out_of_bounds_are_refused(kind: type[Params], values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(values)


def release(mechanism: Gaussian | Rqm | Pbm, sampling: Everyone | Poisson | FixedSize) -> Release:
    return Release(mechanisms=(mechanism,), sampling=sampling)


@pytest.mark.parametrize(
    ("adjacency", "made"),
    [
        (Adjacency.REPLACE, release(Gaussian(noise_multiplier=1), Poisson(rate=0.5))),
        (Adjacency.ADD_OR_REMOVE, release(Gaussian(noise_multiplier=1), FixedSize(size=1, population=2))),
        (Adjacency.ZERO_OUT, release(Gaussian(noise_multiplier=1), FixedSize(size=1, population=2))),
        (Adjacency.ADD_OR_REMOVE, release(Rqm(), Everyone())),
        (Adjacency.ADD_OR_REMOVE, release(Pbm(), Everyone())),
    ],
)
def test_what_nothing_accounts_for_is_refused(adjacency: Adjacency, made: Release) -> None:
    with pytest.raises(ValidationError, match=f"cannot be accounted for with adjacency {adjacency}"):
        History(unit=Unit.CLIENT, adjacency=adjacency, releases=(made,))
    with pytest.raises(ValidationError, match="cannot be accounted for"):
        History(unit=Unit.CLIENT, adjacency=adjacency).then(made)


def test_levels_are_not_amplified_by_sampling() -> None:
    with pytest.raises(ValidationError, match="sampling must be everyone"):
        release(Rqm(), Poisson(rate=0.5))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "an object is needed, not list"),
        ("{}", "privacy history.unit: is required"),
        ('{"unit": "planet"}', "privacy history.unit"),
        ('{"unit": "client", "units": 1}', "did you mean 'unit'"),
        ('{"unit": "client", "releases": [{"mechanisms": []}]}', "releases.0.mechanisms"),
        ('{"unit": "client", "releases": [{"mechanisms": [{"kind": "magic"}]}]}', "magic"),
        ('{"unit": "client", "releases": [{"mechanisms": [{"kind": "gaussian", "noise_multiplier": "1"}]}]}', "number"),
        ('{"unit": "client", "releases": [{"mechanisms": [{"kind": "gaussian", "noise_multiplier": NaN}]}]}', "number"),
        (b"\xff", "not JSON"),
        ("9" * 5000, "not JSON"),
        ('{"unit": ' + "9" * 4000 + "}", "privacy history.unit: Input should be 'example' or 'client', got '9{80}'"),
        ("[" * 10**5, "not JSON"),
        ('{"unit": ' * 10**5, "not JSON"),
        ('{"unit": "\\ud800"}', "privacy history"),
        ('{"unit": "client", "releases": [' + "1," * 9999 + "1]}", "and 9980 more problems"),
    ],
)
def test_what_is_no_history_is_refused_with_its_place(text: str | bytes, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        History.from_json(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*Adjacency, *Unit]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=10,
)


@given(HISTORIES, st.sampled_from(WORDS), st.integers(0, 20), JSON)
def test_hostile_json_is_refused_and_nothing_else(history: History, key: str, at: int, hostile: object) -> None:
    """One value anywhere in a sound history becomes any other: numbers without end, NaN, lists, half a character."""

    def changed(tree: object) -> object:
        nonlocal at
        if isinstance(tree, list):
            return [changed(each) for each in tree]
        if not isinstance(tree, dict):
            return tree
        at -= key in tree
        return {name: hostile if name == key and at == -1 else changed(value) for name, value in tree.items()}

    for text in (json.dumps(changed(json.loads(history.to_json()))), json.dumps(hostile)):
        try:
            found = History.from_json(text)
        except InvalidInput:
            continue
        assert History.from_json(found.to_json()) == found


@given(st.integers(1, 1100), st.sampled_from(["[", '{"unit":', '{"unit":"client","releases":[']))
def test_depth_is_refused_wherever_it_ends(depth: int, opening: str) -> None:
    closing = {"[": "]", '{"unit":': "}", '{"unit":"client","releases":[': "]}"}[opening]
    with pytest.raises(InvalidInput, match="privacy history"):
        History.from_json(opening * depth + "1" + closing * depth)

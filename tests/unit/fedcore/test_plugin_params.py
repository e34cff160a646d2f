from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field, JsonValue, ValidationError

from fedcore.errors import InvalidInput
from fedcore.plugin import Plugin


class Spring(Plugin):
    name: ClassVar[str] = "spring"

    stiffness: float = Field(gt=0)
    coils: int = 3


def test_configured_plugin_gives_back_what_configures_it() -> None:
    spring = Spring.configure({"stiffness": 2})
    assert spring.params() == {"stiffness": 2.0, "coils": 3}
    assert Spring.configure(spring.params()) == spring


def test_unknown_parameter_names_the_nearest_and_all_known() -> None:
    with pytest.raises(
        InvalidInput, match=r"spring\.coil: unknown key; did you mean 'coils'\? known: stiffness, coils"
    ):
        Spring.configure({"stiffness": 1.0, "coil": 4})


def test_plugin_without_parameters_says_so() -> None:
    class Plain(Plugin):
        name: ClassVar[str] = "plain"

    with pytest.raises(InvalidInput, match=r"plain\.x: unknown key; known: none"):
        Plain.configure({"x": 1})


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "stiffness: is required"),
        ({"stiffness": -1.5}, "stiffness: .*greater than 0, got '-1.5'"),
        ({"stiffness": float("nan")}, "stiffness: .*got 'nan'"),
        ({"stiffness": "2"}, "stiffness: .*number.*got '2'"),
        ({"stiffness": 1.0, "coils": 2.0}, "coils: .*integer"),
        ({"stiffness": 1.0, "coils": True}, "coils: .*integer"),
    ],
)
def test_wrong_parameter_is_named_with_value_and_bound(params: dict[str, JsonValue], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Spring.configure(params)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidInput, match=r"spring\.stiffness: .*; spring\.size: "):
        Spring.configure({"stiffness": 0.0, "size": 1})


def test_parameters_cannot_be_changed() -> None:
    spring = Spring(stiffness=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        spring.coils = 4  # type: ignore[misc]

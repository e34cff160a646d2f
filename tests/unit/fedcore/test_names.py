from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput
from fedcore.names import NAME_PATTERN, check_name, nearest

ALLOWED = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


@pytest.mark.parametrize("name", ["a", "0", "lora-sb", "client_1.example", "A" * 64])
def test_names_are_returned_as_they_are(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", ".hidden", "a b", "a/b", "a\n", "a\0", "ä", "٣", "A" * 65, "../etc/passwd"]
)
def test_what_could_be_a_path_or_hide_on_a_screen_is_no_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="is not valid: 1 to 64 of"):
        check_name(name)


@given(st.text(max_size=70))
def test_names_are_exactly_what_the_message_says(text: str) -> None:
    valid = 1 <= len(text) <= 64 and set(text) <= ALLOWED and text[0] not in "._-"
    assert (re.fullmatch(NAME_PATTERN, text) is not None) == valid
    if valid:
        assert check_name(text) == text
    else:
        with pytest.raises(InvalidInput):
            check_name(text)


def test_message_says_what_kind_of_name_and_shows_no_more_than_80_characters() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_name("x" * 10_000, "client")
    assert str(caught.value).startswith(f"client '{'x' * 80}' is not valid")
    assert len(str(caught.value)) < 250


def test_message_escapes_control_characters() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_name("\x1b[2J")
    assert str(caught.value).isprintable()


def test_nearest_finds_a_misspelling_and_nothing_far_away() -> None:
    known = ["cohort", "deadline_s", "quorum"]
    assert nearest("deadline", known) == "deadline_s"
    assert nearest("cohrot", known) == "cohort"
    assert nearest("zzz", known) is None
    assert nearest("cohort", []) is None

"""Figures, sizes, durations and job files as text."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput
from fedserver.cli.phrases import Pace, job_line, phase_text
from fedserver.cli.text import columns, duration_text, parse_duration, printable, size_text
from fedserver.cli.toml_text import toml_text

VALUES = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), st.dictionaries(st.text(), VALUES, max_size=4), max_size=4))
def test_toml_text_reads_back_the_same(tree: dict[str, dict[str, Any]]) -> None:
    assert tomllib.loads(toml_text(tree)) == tree


def test_toml_text_leaves_out_what_is_none() -> None:
    assert toml_text({"a": {"b": None, "c": {"d": None}}}) == "[a]\nc = {}"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_310_000, "2.31 MB"), (999_600, "1 MB"), (5 * 10**12, "5 TB")],
)
def test_sizes_are_decimal(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (42.4, "42 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_have_the_units_that_matter(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), ("7d", 604_800)])
def test_durations_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1.5h", "1 h", "1w", "9999999999s", "١h"])
def test_what_is_no_duration_says_how_to_write_one(text: str) -> None:
    with pytest.raises(InvalidInput, match="90s or 1h"):
        parse_duration(text)


def test_no_name_steers_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\\x1b[2Jb\\nc\\u202ed"


def test_columns_align() -> None:
    assert columns([["A", "BB"], ["long", "x"]]) == ["A     BB", "long  x"]


def job(**changes: Any) -> dict[str, Any]:
    """Return a running job as a status has it: 3 of 10 rounds made, one every 2 s since it began to train."""
    return {
        "job_id": "042f4fbacca24292bc3a6b272f7d73d2",
        "name": "digits",
        "rounds": 10,
        "submitted_at": 1000.0,
        "status": "running",
        "failure": "",
        "finished_at": None,
        "stage": "train",
        "phase": "open",
        "phase_age_s": 1.5,
        "deadline_in_s": 58.5,
        "attempt": 0,
        "fitting_clients": 3,
        "needs": {"task": "digits", "adapter": "lora", "codecs": ["bf16", "raw"]},
        "version": 3,
        "waiting_for": {"what": "updates", "missing": 2, "clients": ["ann", "bob"]},
        "working": [],
        "accepted": 1,
        "uplink_bytes": 1000,
        "downlink_bytes": 2000,
        "latest": {"version": 3, "created_at": 1030.0, "evaluation": {}},
        "privacy": None,
        "evaluated": {"version": 2, "evaluation": {"accuracy": 0.5, "num_examples": 40.0}},
        **changes,
    }


def test_an_open_round_says_what_it_lacks_and_from_whom() -> None:
    expected = "training: 1 update in, 2 missing from ann, bob, for 1.5 s, at most 58 s more"
    assert phase_text(job()) == expected
    assert phase_text(job(), age_s=2).endswith("for 3.5 s, at most 56 s more")


def test_long_lists_of_clients_are_cut() -> None:
    waiting = {"what": "updates", "missing": 8, "clients": [f"c{number}" for number in range(8)]}
    assert "from c0, c1, c2, c3, c4 and 3 more, for" in phase_text(job(waiting_for=waiting))


def test_a_repeated_attempt_is_said() -> None:
    waiting = {"what": "clients", "missing": 1, "clients": []}
    text = phase_text(job(phase="waiting", attempt=2, waiting_for=waiting))
    assert text.startswith("training (attempt 3): waits for 1 client, for")


@pytest.mark.parametrize(("fitting", "who"), [(0, "none of them have"), (1, "1 of them has"), (2, "2 of them have")])
def test_a_job_that_waits_beside_clients_that_do_not_fit_says_what_it_needs(fitting: int, who: str) -> None:
    waiting = {"what": "clients", "missing": 1, "clients": []}
    one = job(phase="waiting", waiting_for=waiting, fitting_clients=fitting)
    needs = "task 'digits', adapter 'lora' and codecs 'bf16', 'raw'"
    said = f"training: waits for 1 client (3 connected, {who} {needs}), for 1.5 s"
    assert phase_text(one, connected=3) == f"{said}, at most 58 s more"
    assert f"; {said}, at most" in job_line(one, Pace(), connected=3)


def test_clients_that_all_fit_are_not_explained() -> None:
    waiting = {"what": "clients", "missing": 1, "clients": []}
    one = job(phase="waiting", waiting_for=waiting, fitting_clients=3)
    assert phase_text(one, connected=3).startswith("training: waits for 1 client, for")


def test_a_job_that_has_its_clients_does_not_mind_others() -> None:
    assert phase_text(job(fitting_clients=0), connected=2) == phase_text(job())


def test_an_ended_job_says_why() -> None:
    text = phase_text(job(status="failed", finished_at=1042.0, failure="gave up\nafter 11 attempts"))
    assert text == "failed after 42 s: gave up\\nafter 11 attempts"


def test_a_job_is_one_line() -> None:
    assert job_line(job(), Pace()) == (
        "digits 042f4fba: round 3/10; training: 1 update in, 2 missing from ann, bob, for 1.5 s, at most 58 s more;"
        " accuracy 0.5 (version 2, 40 examples); up 1 kB, down 2 kB; about 1 min 10 s left"
    )


def test_time_left_comes_from_the_rounds_that_were_seen() -> None:
    pace = Pace()
    pace.see({"jobs": [job()]})
    assert pace.left_s(job()) == pytest.approx(70)  # nothing seen yet: 30 s for 3 rounds
    later = job(version=5, latest={"version": 5, "created_at": 1034.0})
    pace.see({"jobs": [later]})
    assert pace.left_s(later) == pytest.approx(10)


@pytest.mark.parametrize("latest", [None, {"version": 0, "created_at": 1001.0}, {"version": 10, "created_at": 1001.0}])
def test_time_left_is_not_guessed(latest: dict[str, Any] | None) -> None:
    assert Pace().left_s(job(latest=latest)) is None


def test_who_has_declined_is_named_while_something_is_missing() -> None:
    last = {"client": "ann", "reason": "adapter.targets ['x']: match no linear layer"}
    waiting = {"what": "clients", "missing": 1, "clients": []}
    text = phase_text(job(phase="waiting", waiting_for=waiting, last_decline=last))
    assert text.endswith("; ann declined: adapter.targets ['x']: match no linear layer")
    full = {"what": "write", "missing": 0, "clients": []}
    assert "declined" not in phase_text(job(phase="open", waiting_for=full, last_decline=last))

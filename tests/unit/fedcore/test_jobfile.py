"""Reading a job file: whatever is wrong is said at once, with file, key path, value and bound."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import JobFileError
from fedcore.jobfile import MAX_JOB_BYTES, Job, ScheduleSection, load_job, parse_job
from fedcore.validation import MAX_PROBLEMS

MINIMAL = """
[job]
name = "digits"
rounds = 20
[task]
name = "digits"
[schedule]
cohort = 5
"""


def load(tmp_path: Path, text: str | bytes) -> Job:
    path = tmp_path / "job.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job(path)


def tree_with(section: str, **keys: object) -> dict[str, Any]:
    """Return the minimal job with some keys of one section set."""
    tree: dict[str, Any] = {
        "job": {"name": "digits", "rounds": 20},
        "task": {"name": "digits"},
        "schedule": {"cohort": 5},
    }
    tree[section] = {**tree.get(section, {}), **keys}
    return tree


def problems_of(tree: object) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        parse_job(tree, "job.toml")
    assert str(caught.value) == "\n".join(f"job.toml: {problem}" for problem in caught.value.problems)
    return caught.value.problems


def test_everything_but_name_rounds_task_and_cohort_has_a_default(tmp_path: Path) -> None:
    job = load(tmp_path, MINIMAL)
    assert (job.job.seed, job.adapter.name, job.aggregator.rule) == (0, "full", "weighted-mean")
    assert [stage.codec for stage in (*job.compression.uplink, *job.compression.downlink)] == ["raw", "raw"]
    assert (job.schedule.updates_to_close, job.schedule.updates_at_deadline, job.schedule.clients_to_assign) == (
        5,
        3,
        5,
    )


def test_integers_are_taken_for_numbers() -> None:
    assert parse_job(tree_with("schedule", deadline_s=60), "job.toml").schedule.deadline_s == 60.0


def test_further_keys_of_a_plugin_are_its_parameters() -> None:
    job = parse_job(tree_with("task", partition={"kind": "dirichlet", "alpha": 0.3}), "job.toml")
    assert job.task.params == {"partition": {"kind": "dirichlet", "alpha": 0.3}}
    assert job.adapter.params == {}


@pytest.mark.parametrize("key", ["params", "model_config", "model_dump", "__class__", "__dict__", "__pydantic_extra__"])
def test_a_parameter_may_have_any_name_and_changes_nothing_else(key: str) -> None:
    job = parse_job(tree_with("task", **{key: 5}), "job.toml")
    assert job.task.params == {key: 5}
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    ("section", "key", "value", "bound"),
    [
        ("job", "name", "", "pattern"),
        ("job", "name", "a b", "pattern"),
        ("job", "name", 5, "valid string"),
        ("job", "rounds", 0, "greater than or equal to 1"),
        ("job", "rounds", 1_000_001, "less than or equal to 1000000"),
        ("job", "rounds", "20", "valid integer"),
        ("job", "rounds", 20.0, "valid integer"),
        ("job", "rounds", True, "valid integer"),
        ("job", "seed", -1, "greater than or equal to 0"),
        ("job", "seed", 2**53, f"less than {2**53}"),
        ("job", "description", "x" * 2001, "at most 2000 characters"),
        ("job", "base_digest", "AB" * 32, "pattern"),
        ("task", "name", "../x", "pattern"),
        ("task", "data", "x" * 2001, "at most 2000 characters"),
        ("adapter", "name", "", "pattern"),
        ("training", "local_epochs", 0, "greater than or equal to 1"),
        ("training", "local_epochs", 10_001, "less than or equal to 10000"),
        ("training", "batch_size", 0, "greater than or equal to 1"),
        ("training", "batch_size", 1_000_001, "less than or equal to 1000000"),
        ("training", "optimizer", "lion", "'adamw' or 'sgd'"),
        ("training", "learning_rate", 0, "greater than 0"),
        ("training", "learning_rate", 101, "less than or equal to 100"),
        ("training", "learning_rate", math.nan, "finite number"),
        ("training", "learning_rate", "fast", "valid number"),
        ("training", "weight_decay", -0.1, "greater than or equal to 0"),
        ("training", "weight_decay", 101, "less than or equal to 100"),
        ("training", "max_grad_norm", 0, "greater than 0"),
        ("training", "max_grad_norm", math.inf, "finite number"),
        ("compression", "uplink", [], "at least 1 item"),
        ("compression", "uplink", [{"codec": "raw"}] * 9, "at most 8 items"),
        ("compression", "downlink", [], "at least 1 item"),
        ("compression", "downlink", [{"codec": "raw"}] * 9, "at most 8 items"),
        ("compression", "uplink", "raw", "valid list"),
        ("compression", "preset", "Fed Zip", "pattern"),
        ("job", "method", "Fed SB", "pattern"),
        ("compression", "error_feedback", "yes", "valid dictionary"),
        ("aggregator", "rule", "", "pattern"),
        ("aggregator", "max_examples", 0, "greater than or equal to 1"),
        ("aggregator", "max_examples", 2**31 + 1, f"less than or equal to {2**31}"),
        ("aggregator", "max_abs", 0, "greater than 0"),
        ("aggregator", "max_abs", 2**41, f"less than or equal to {2**40}"),
        ("aggregator", "max_abs", math.inf, "finite number"),
        ("server_optimizer", "name", "", "pattern"),
        ("schedule", "cohort", 0, "greater than or equal to 1"),
        ("schedule", "cohort", 1_000_001, "less than or equal to 1000000"),
        ("schedule", "over_select", 0.9, "greater than or equal to 1"),
        ("schedule", "over_select", 10.1, "less than or equal to 10"),
        ("schedule", "over_select", math.nan, "finite number"),
        ("schedule", "buffer", 0, "greater than or equal to 1"),
        ("schedule", "quorum", 0, "greater than or equal to 1"),
        ("schedule", "deadline_s", 0.0005, "greater than or equal to 0.001"),
        ("schedule", "deadline_s", 604801, "less than or equal to 604800"),
        ("schedule", "deadline_s", math.inf, "finite number"),
        ("schedule", "max_retries", -1, "greater than or equal to 0"),
        ("schedule", "max_retries", 1_000_001, "less than or equal to 1000000"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_key_path_and_the_bound(
    section: str, key: str, value: object, bound: str
) -> None:
    (problem,) = problems_of(tree_with(section, **{key: value}))
    assert problem.startswith(f"{section}.{key}: ")
    assert bound in problem
    assert problem.endswith(f"got {str(value)[:80]!r}")


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("decay", 0, "greater than 0"),
        ("decay", 1.5, "less than or equal to 1"),
        ("max_age", 0, "greater than or equal to 1"),
        ("max_age", 1_000_001, "less than or equal to 1000000"),
    ],
)
def test_bounds_of_error_feedback(key: str, value: object, bound: str) -> None:
    (problem,) = problems_of(tree_with("compression", error_feedback={key: value}))
    assert problem.startswith(f"compression.error_feedback.{key}: ")
    assert bound in problem


def test_every_key_with_a_bound_is_tried_above() -> None:
    marks = test_a_value_out_of_bounds_is_named_with_its_key_path_and_the_bound.pytestmark  # type: ignore[attr-defined]
    tried = {row[:2] for row in marks[0].args[1]}
    keys = {
        (section, key)
        for section, field in Job.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    }
    assert tried == keys


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("job", "round", "rounds"),
        ("training", "learn_rate", "learning_rate"),
        ("training", "local_epoch", "local_epochs"),
        ("compression", "uplinks", "uplink"),
        ("schedule", "deadline", "deadline_s"),
        ("schedule", "overselect", "over_select"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_known_ones(section: str, key: str, nearest: str) -> None:
    (problem,) = problems_of(tree_with(section, **{key: 1}))
    assert problem.startswith(f"{section}.{key}: unknown key; did you mean '{nearest}'? known: ")


def test_an_unknown_section_names_the_nearest() -> None:
    (problem,) = problems_of(tree_with("trainings", x=1))
    assert problem.startswith("trainings: unknown key; did you mean 'training'? known: job, task, adapter,")


def test_an_unknown_key_that_resembles_nothing_gets_no_guess() -> None:
    (problem,) = problems_of(tree_with("compression", zzz=1))
    assert problem == "compression.zzz: unknown key; known: preset, uplink, downlink, error_feedback"


def test_all_problems_are_said_at_once() -> None:
    tree = {
        "job": {"name": "a b", "seed": -1},
        "training": {"optimiser": "sgd"},
        "compression": {"uplink": [{"codec": "raw"}, {"fraction": 0.1}]},
        "schedule": {"cohort": 0},
    }
    assert [problem.partition(":")[0] for problem in problems_of(tree)] == [
        "job.name",
        "job.rounds",
        "job.seed",
        "task",
        "training.optimiser",
        "compression.uplink.1.codec",
        "schedule.cohort",
    ]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"buffer": 6}, "buffer 6 can never fill: at most 5 clients are assigned (cohort x over_select)"),
        ({"buffer": 8, "over_select": 1.4}, "buffer 8 can never fill: at most 7 clients are assigned"),
        ({"quorum": 6}, "quorum 6 is above buffer 5"),
        ({"buffer": 2, "quorum": 3}, "quorum 3 is above buffer 2"),
    ],
)
def test_a_schedule_that_cannot_close_is_refused(keys: dict[str, Any], problem: str) -> None:
    (said,) = problems_of(tree_with("schedule", **keys))
    assert said.startswith(f"schedule: {problem}")


@given(cohort=st.integers(1, 10_000), hundredths=st.integers(100, 1000))
def test_over_selection_rounds_the_decimal_number_up_and_not_its_binary_form(cohort: int, hundredths: int) -> None:
    schedule = ScheduleSection(cohort=cohort, over_select=hundredths / 100)
    assert schedule.clients_to_assign == math.ceil(cohort * Fraction(hundredths, 100))


@given(buffer=st.integers(1, 10_000))
def test_quorum_is_half_of_buffer_rounded_up(buffer: int) -> None:
    assert ScheduleSection(cohort=10_000, buffer=buffer).updates_at_deadline == -(-buffer // 2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "[1.0, nan]", "{ a = { b = inf } }", "[[[nan]]]"])
def test_numbers_that_are_not_finite_are_refused_in_parameters_too(tmp_path: Path, value: str) -> None:
    with pytest.raises(JobFileError, match=r"task\.p[a-z0-9.]*: Input should be a finite number"):
        load(tmp_path, MINIMAL.replace("[schedule]", f"p = {value}\n[schedule]"))


def test_key_path_inside_a_parameter_is_the_users_own(tmp_path: Path) -> None:
    text = MINIMAL.replace("[schedule]", "p = { list = [{ float = nan }] }\n[schedule]")
    with pytest.raises(JobFileError) as caught:
        load(tmp_path, text)
    assert caught.value.problems == ["task.p.list.0.float: Input should be a finite number, got 'nan'"]


@pytest.mark.parametrize("key", ["a\nerror: all is well", "\x1b[31mred", "\r", "\x85", "\u2028", "\0", "\u202e"])
@pytest.mark.parametrize("where", ["", "training", "task.deep"])
def test_a_key_neither_ends_its_line_nor_steers_a_terminal(key: str, where: str) -> None:
    tree = tree_with("task", deep={key: math.inf}) if where == "task.deep" else tree_with(where or key, **{key: 1})
    (problem,) = problems_of(tree)
    assert problem.isprintable()
    assert problem.startswith(".".join([where, repr(key)]).lstrip(".") + ": ")


@pytest.mark.parametrize("value", ["2026-01-01", "12:00:00", "2026-01-01T00:00:00Z"])
def test_dates_are_no_parameters(tmp_path: Path, value: str) -> None:
    with pytest.raises(JobFileError, match=r"task\.p: input was not a valid JSON value"):
        load(tmp_path, MINIMAL.replace("[schedule]", f"p = {value}\n[schedule]"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[schedule]", f"p = {'9' * 5000}\n[schedule]"),
        ("[schedule]", f"p = 0x{'f' * 5000}\n[schedule]"),
        ("[schedule]", f"p = [[0x{'f' * 5000}]]\n[schedule]"),
        ("cohort = 5", f"cohort = 0x{'f' * 5000}"),
        ("[schedule]", f"p = {'[' * 300}{']' * 300}\n[schedule]"),
        ("[schedule]", f"p = {'[' * 20_000}\n[schedule]"),
    ],
)
def test_values_that_no_peer_could_read_are_problems_and_not_crashes(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(JobFileError) as caught:
        load(tmp_path, MINIMAL.replace(old, new))
    assert all(len(problem) < 1000 for problem in caught.value.problems)


@pytest.mark.parametrize("tree", [None, [], 5, "job", {"job": 5}, {"job": []}])
def test_a_tree_of_another_shape_is_refused(tree: object) -> None:
    assert problems_of(tree)


def test_an_empty_file_lacks_every_required_section(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        load(tmp_path, "")
    assert caught.value.problems == ["job: is required", "task: is required", "schedule: is required"]
    assert caught.value.source == str(tmp_path / "job.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_a_folder_is_no_job_file(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="cannot be read: Is a directory"):
        load_job(tmp_path)


def test_text_that_is_not_utf_8_is_refused_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"not TOML: 'utf-8' codec can't decode byte 0xe4 in position 17"):
        load(tmp_path, b'[job]\nname = "dig\xe4ts"\n')


def test_bad_toml_is_refused_with_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"not TOML: .*line 2, column 8"):
        load(tmp_path, "[job]\nname = digits\n")


def test_a_file_at_the_bound_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    padding = MAX_JOB_BYTES - len(MINIMAL) - 1
    assert load(tmp_path, MINIMAL + "#" + "x" * padding).job.name == "digits"
    with pytest.raises(JobFileError, match=f"more than {MAX_JOB_BYTES} bytes"):
        load(tmp_path, MINIMAL + "#" + "x" * (padding + 1))


def test_no_more_is_read_than_the_bound() -> None:
    with pytest.raises(JobFileError, match=f"more than {MAX_JOB_BYTES} bytes"):
        load_job(Path("/dev/zero"))


def test_a_job_that_grows_too_long_as_json_is_refused_before_a_client_would(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=f"bytes as JSON, at most {MAX_JOB_BYTES}"):
        load(tmp_path, MINIMAL.replace("[schedule]", f'p = "{"ä" * 20_000}"\n[schedule]'))


PARAMETERS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda key: key not in {"name", "data"}),
    st.recursive(
        st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
        max_leaves=6,
    ),
    max_size=4,
)


@given(PARAMETERS)
def test_canonical_json_round_trips_byte_for_byte(parameters: dict[str, object]) -> None:
    job = parse_job(tree_with("task", **parameters), "job.toml")
    data = job.to_json()
    assert data.isascii()
    back = Job.from_json(data)
    assert back == job
    assert back.to_json() == data
    assert back.task.params == parameters


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"{", b"[]", b"null", b"[" * 60_000, b"{" * 60_000, b'{"job": NaN}', b"9" * 5000, b"x" * 70_000],
)
def test_hostile_json_is_refused_with_a_short_text(data: bytes) -> None:
    with pytest.raises(JobFileError) as caught:
        Job.from_json(data)
    assert len(str(caught.value)) < 1000


def test_json_from_a_peer_with_lone_surrogates_is_refused() -> None:
    data = json.dumps(tree_with("task", p="\ud800")).encode()
    with pytest.raises(JobFileError, match="'p' cannot be written as JSON"):
        Job.from_json(data)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.one_of(st.text(max_size=4), st.sampled_from(list(Job.model_fields))), inner, max_size=4),
        ),
        max_leaves=15,
    )
)
def test_arbitrary_trees_are_refused_cleanly(tree: object) -> None:
    assert problems_of(tree)


HUGE: dict[str, object] = {
    "many unknown keys": tree_with("training", **{f"key{i}": i for i in range(5000)}),
    "many unknown sections": {f"section{i}": {} for i in range(5000)},
    "many wrong stages": tree_with("compression", uplink=[{"codec": "raw", "": float("nan")}, {}] * 4, zzz=1),
    "many numbers that are not finite": tree_with("task", p=[math.nan] * 5000),
    "a huge key": tree_with("training", **{"k" * 60_000: 1}),
    "a huge key with a wrong value": tree_with("task", **{"k" * 60_000: math.nan}),
    "a huge key that is no text": tree_with("task", **{"k" * 60_000 + "\ud800": 1}),
    "a huge value": tree_with("job", name="n" * 60_000),
    "a deep path": tree_with("task", p=json.loads(f'{{"{"k" * 500}":' * 50 + "NaN" + "}" * 50)),
}


@pytest.mark.parametrize("tree", HUGE.values(), ids=HUGE)
def test_what_is_said_of_a_job_has_a_bound_whatever_is_wrong_with_it(tree: object) -> None:
    problems = problems_of(tree)
    assert len(problems) <= MAX_PROBLEMS + 1
    assert all(len(problem) <= JobFileError.MAX_CHARS for problem in problems)


def test_problems_beyond_the_bound_are_counted() -> None:
    keys = [f"key{i:02}" for i in range(MAX_PROBLEMS + 3)]
    problems = problems_of(tree_with("training", **dict.fromkeys(keys, 1)))
    assert [problem.partition(":")[0] for problem in problems[:-1]] == [f"training.{key}" for key in keys[:-3]]
    assert problems[-1] == "and 3 more problems"
    assert len(problems_of(tree_with("training", **dict.fromkeys(keys[:-3], 1)))) == MAX_PROBLEMS


def test_a_reader_that_quotes_the_file_is_cut_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        load(tmp_path, f"{'k' * 30_000} = {{}}\n{'k' * 30_000}.b = 1\n")
    (problem,) = caught.value.problems
    assert len(problem) == JobFileError.MAX_CHARS
    assert re.fullmatch(r"not TOML: [^…]*…[^…]*\(at line 2, column \d+\)", problem)


@given(st.sampled_from(list(Job.model_fields)), st.data())
def test_one_arbitrary_section_is_a_job_or_a_problem_under_its_name(section: str, data: st.DataObject) -> None:
    keys = [*getattr(Job.model_fields[section].annotation, "model_fields", {}), "other"]
    values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([{}]))
    tree = tree_with(section, **data.draw(st.dictionaries(st.sampled_from(keys), values, max_size=4)))
    try:
        job = parse_job(tree, "job.toml")
    except JobFileError as error:
        problems = error.problems
    else:
        problems = []
        assert Job.from_json(job.to_json()) == job
    assert all(problem.startswith(section) for problem in problems)

"""Update headers: what a hostile client may send is a header or a MALFORMED rejection, nothing else."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.messages import MAX_HEADER_BYTES, MAX_METRIC, MAX_METRICS, UpdateHeader, WorkKind

FIELDS: dict[str, Any] = {
    "federation": "lab",
    "update_id": "0" * 31 + "1",
    "assignment_id": "a" * 32,
    "job_id": "b" * 32,
    "version": 3,
    "kind": "train",
    "layout_digest": "c" * 64,
    "frame_bytes": 1000,
    "frame_digest": "d" * 64,
    "num_examples": 50,
}


def rejection(data: bytes) -> str:
    with pytest.raises(UpdateRejected) as caught:
        UpdateHeader.from_bytes(data)
    assert caught.value.reason is UpdateResult.MALFORMED
    text = str(caught.value)
    assert len(text) < 400
    return text


def rejection_of(**changes: object) -> str:
    return rejection(json.dumps(FIELDS | changes).encode())


def test_a_header_has_its_optional_fields_empty() -> None:
    header = UpdateHeader.from_bytes(json.dumps(FIELDS).encode())
    assert header.kind is WorkKind.TRAIN
    assert (header.metrics, header.evaluation, header.evaluated_examples, header.layout) == ({}, {}, 0, None)
    assert header.encoding_error is None


@pytest.mark.parametrize("kind", WorkKind)
def test_every_kind_of_work_can_be_named(kind: WorkKind) -> None:
    assert UpdateHeader.from_bytes(json.dumps(FIELDS | {"kind": kind.value}).encode()).kind is kind


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field: str) -> None:
    left = {name: value for name, value in FIELDS.items() if name != field}
    assert rejection(json.dumps(left).encode()).startswith(f"header.{field}: Field required")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", "../x"),
        ("federation", "x\n"),
        ("update_id", "0" * 31),
        ("update_id", "G" * 32),
        ("update_id", "A" * 32),
        ("assignment_id", "0" * 32 + "\n"),
        ("job_id", None),
        ("version", -1),
        ("version", 2**48),
        ("version", "3"),
        ("version", True),
        ("version", 3.0),
        ("kind", "evaluate "),
        ("kind", 1),
        ("layout_digest", "c" * 63),
        ("layout_digest", "C" * 64),
        ("frame_bytes", 10**4000),
        ("frame_digest", ""),
        ("num_examples", -1),
        ("num_examples", 10**30),
        ("metrics", []),
        ("metrics", {"loss": "0.5"}),
        ("metrics", {"loss": float("nan")}),
        ("metrics", {"loss": float("inf")}),
        ("metrics", {"../loss": 0.5}),
        ("metrics", {"x" * 100_000: 0.5}),
        ("metrics", {f"m{number}": 0.0 for number in range(MAX_METRICS + 1)}),
        ("evaluated_examples", -1),
        ("evaluation", {"": 1.0}),
        ("encoding_error", -1e-9),
        ("encoding_error", 1.1e30),
        ("encoding_error", float("nan")),
        ("encoding_error", float("inf")),
        ("encoding_error", "0.5"),
        ("layout", "rows"),
        ("signature", "x"),
        ("x" * 100_000, 1),
    ],
)
def test_a_wrong_field_is_named_in_a_short_text(field: str, value: object) -> None:
    assert rejection_of(**{field: value}).startswith(f"header.{field[:60]}")


def test_as_many_metrics_as_allowed_are_read() -> None:
    metrics = {f"m{number}": 0.5 for number in range(MAX_METRICS)}
    assert UpdateHeader.from_bytes(json.dumps(FIELDS | {"metrics": metrics}).encode()).metrics == metrics


def test_a_header_at_the_bound_is_looked_at_and_one_byte_more_is_not() -> None:
    data = json.dumps(FIELDS).encode()
    assert UpdateHeader.from_bytes(data.ljust(MAX_HEADER_BYTES)).version == 3
    text = rejection(data.ljust(MAX_HEADER_BYTES + 1))
    assert text == f"header of {MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES}"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"{", b"null", b"[]", b"[" * 500_000, b'{"version":' + b"9" * 5000 + b"}", b'"\\ud800"']
)
def test_what_is_not_a_json_object_is_malformed(data: bytes) -> None:
    assert rejection(data).startswith("header: ")


@pytest.mark.parametrize("value", ["NaN", "1e999", "[-Infinity]"])
def test_a_layout_holds_only_what_json_can_say(value: str) -> None:
    data = json.dumps(FIELDS | {"layout": []}).replace("[]", f'[["g", {value}]]')
    assert rejection(data.encode()).startswith("header.layout: ")


@pytest.mark.parametrize("layout", ["[]", '["g","n",[2],"float32"]'])
def test_a_long_header_takes_little_more_memory_than_its_json(layout: str) -> None:
    rows = ",".join([layout] * (MAX_HEADER_BYTES // (len(layout) + 2)))
    data = f'{{"layout":[{rows}]}}'.encode()
    tree_bytes = peak_bytes_of(lambda: json.loads(data))
    # Ten fields are missing; each of these errors comes with the input, which is not to be copied for it.
    assert peak_bytes_of(lambda: rejection(data)) < 3 * tree_bytes


def peak_bytes_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=10,
)


@given(st.one_of(st.binary(max_size=300), JSON.map(lambda tree: json.dumps(tree).encode())))
def test_arbitrary_input_is_malformed(data: bytes) -> None:
    rejection(data)


@given(st.dictionaries(st.sampled_from([*UpdateHeader.model_fields, "other"]), JSON, max_size=4), st.data())
def test_damaged_headers_are_headers_or_malformed(changes: dict[str, Any], data: st.DataObject) -> None:
    raw = bytearray(json.dumps(FIELDS | changes).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    reason = UpdateResult.MALFORMED
    try:
        header = UpdateHeader.from_bytes(bytes(raw))
    except UpdateRejected as error:
        reason = error.reason
    else:
        assert isinstance(header.version, int)
    assert reason is UpdateResult.MALFORMED


METRICS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    st.floats(-MAX_METRIC, MAX_METRIC),
    max_size=4,
)


@given(METRICS, METRICS, st.sampled_from(WorkKind), st.integers(0, 2**48 - 1))
def test_canonical_bytes_round_trip(
    metrics: dict[str, float], evaluation: dict[str, float], kind: WorkKind, version: int
) -> None:
    header = UpdateHeader(
        **FIELDS | {"kind": kind, "version": version}, metrics=metrics, evaluation=evaluation, layout=[["g", "n", [2]]]
    )
    data = header.to_bytes()
    assert data.isascii()
    assert UpdateHeader.from_bytes(data) == header
    assert UpdateHeader.from_bytes(data).to_bytes() == data

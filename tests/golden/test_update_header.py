"""The header's bytes are signed and journaled: the same header must give the same bytes for ever."""

from __future__ import annotations

from fedcore.messages import SIGNATURE_CONTEXT, UpdateHeader, WorkKind

HEADER = UpdateHeader(
    federation="lab.example",
    update_id="00112233445566778899aabbccddeeff",
    assignment_id="0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    job_id="ffeeddccbbaa99887766554433221100",
    version=41,
    kind=WorkKind.TRAIN,
    layout_digest="c" * 64,
    frame_bytes=8236,
    frame_digest="d" * 64,
    num_examples=120,
    metrics={"loss": 0.30000000000000004, "accuracy": 1.0},
    evaluated_examples=30,
    evaluation={"loss": 1e-07},
)
CANONICAL = (
    b'{"assignment_id":"0f1e2d3c4b5a69788796a5b4c3d2e1f0","evaluated_examples":30,"evaluation":{"loss":1e-07},'
    b'"federation":"lab.example","frame_bytes":8236,'
    b'"frame_digest":"dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",'
    b'"job_id":"ffeeddccbbaa99887766554433221100","kind":"train","layout":null,'
    b'"layout_digest":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",'
    b'"metrics":{"accuracy":1.0,"loss":0.30000000000000004},"num_examples":120,'
    b'"update_id":"00112233445566778899aabbccddeeff","version":41}'
)
INITIALISE_TAIL = (
    b'"kind":"initialise","layout":[["adapter","\\u00fc",[2,3],"float32"]],'
    b'"layout_digest":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",'
    b'"metrics":{},"num_examples":0,"update_id":"00112233445566778899aabbccddeeff","version":0}'
)


def test_canonical_bytes_are_what_they_always_were() -> None:
    assert HEADER.to_bytes() == CANONICAL


def test_canonical_bytes_are_read_back() -> None:
    assert UpdateHeader.from_bytes(CANONICAL) == HEADER


def test_an_encoding_error_is_a_key_only_where_there_is_one() -> None:
    lossy = HEADER.model_copy(update={"encoding_error": 0.1})
    with_key = CANONICAL.replace(b'"evaluated_examples"', b'"encoding_error":0.1,"evaluated_examples"')
    assert lossy.to_bytes() == with_key
    assert UpdateHeader.from_bytes(with_key) == lossy


def test_a_base_digest_is_a_key_only_where_there_is_one() -> None:
    based = HEADER.model_copy(update={"base_digest": "a" * 64})
    with_key = CANONICAL.replace(b'"evaluated_examples"', b'"base_digest":"' + b"a" * 64 + b'","evaluated_examples"')
    assert based.to_bytes() == with_key
    assert UpdateHeader.from_bytes(with_key) == based


def test_layout_rows_lie_in_the_header_as_in_the_layout() -> None:
    header = HEADER.model_copy(
        update={
            "kind": WorkKind.INITIALISE,
            "version": 0,
            "num_examples": 0,
            "metrics": {},
            "layout": [["adapter", "ü", [2, 3], "float32"]],
        }
    )
    assert header.to_bytes().endswith(INITIALISE_TAIL)
    assert UpdateHeader.from_bytes(header.to_bytes()) == header


def test_signature_context_is_what_it_always_was() -> None:
    assert SIGNATURE_CONTEXT == b"roundtable-update-v1"

"""Frames, update headers, layouts and protobuf messages: what peers send."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError, Message
from pydantic import JsonValue
from safetensors import deserialize

from fedclient.transport import convert
from fedcodec import build_pipeline
from fedcore.adapters import basis_modules, gradient_layout, lora_modules
from fedcore.changes import DENSE, change_bytes, max_change_bytes, read_change
from fedcore.errors import FrameError, InvalidInput, JobFileError, LayoutError, Refused, UpdateRejected, UpdateResult
from fedcore.jobfile import Job
from fedcore.layout import MAX_VALUES, Layout, Vector
from fedcore.messages import Assignment, Cancel, Decline, Heartbeat, Hello, UpdateHeader, UploadState, WorkKind
from fedcore.part import dense_blocks
from fedproto.v1 import client_pb2 as pb
from fedserver.export.weights import safetensors_chunks
from fedserver.rounds.admission import layout_of
from fedserver.rounds.fleet import Fleet
from fedserver.rpc import client_service
from fedserver.rpc.unknown_fields import MAX_FIELDS, refuse_unknown_fields
from tests.fuzz.target import BOMBS, Reader, Target, check_refusal, check_rejection
from tests.support.exports import LORA, make_job
from tests.support.player import LAYOUT

CHAINS: Final = (
    *("raw", "bf16", "fp16", "int8", "int4", "int2", "ternary", "sign", "rqm", "ranks", "kmeans", "kmeans-auto"),
    *("top-k", "threshold", "rand-k", "clip gaussian-noise", "zstd", "bf16 zstd", "top-k bf16", "rand-k int8 huffman"),
    *("int4 fixed-symbols", "ternary huffman", "top-k kmeans rice huffman", "kmeans-auto rice huffman zstd"),
    *("threshold ternary rice", "threshold ranks fixed-positions", "top-k ranks rice", "rand-k ranks zstd"),
    *("per-tensor bf16", "per-tensor top-k", "per-tensor int8", "per-tensor sign", "per-tensor rqm"),
    *("per-tensor ranks", "per-tensor raw"),
    *("per-tensor top-k kmeans rice", "per-tensor threshold int2 rice huffman zstd", "per-tensor rand-k ternary"),
)
"""Stages of the pipelines that are tried, all of ours among them."""
PARAMS: Final[dict[str, dict[str, JsonValue]]] = {
    "int8": {"block": 3},
    "int2": {"block": 1},
    "ternary": {"alpha": 2.0},
    "sign": {"scale": "mean"},
    "rqm": {"levels": 300},
    "kmeans": {"clusters": 2, "exact_zero": False},
    "kmeans-auto": {"max_clusters": 3},
    "top-k": {"fraction": 0.5},
    "threshold": {"value": 1.0},
    "rand-k": {"fraction": 0.5},
    "zstd": {"width": 1},
}
"""What they are tried with besides their defaults."""
PIPELINES: Final = [
    build_pipeline([{"codec": name, **params.get(name, {})} for name in chain.split()])
    for params in ({}, PARAMS)
    for chain in CHAINS
    if not params or params.keys() & set(chain.split())
]
CANONICAL: Final = {"raw", "bf16", "fp16", "ternary", "sign", "ranks", "huffman", "fixed-symbols"}
"""What these write decodes to values that they write in the same way, with their defaults."""
MAX_SCATTERED: Final = 1 << 16
MAX_EXPORTED_VALUES: Final = 4096
SPECIAL: Final = np.array([0.0, -0.0, 1.0, -1.5, 1e-45, 3.4e38, np.inf, -np.inf, np.nan], np.float32)
NOBODY: Final = "0" * 32

# -- frames ----------------------------------------------------------------------------------------------------------


def read_frame(data: bytes) -> None:
    reader = Reader(data)
    pipeline = PIPELINES[reader.number() % len(PIPELINES)]
    block_values, num_values = 1 + reader.number(), 1 + reader.number(8) % MAX_VALUES
    if not pipeline.streams:  # a reader has room for all values; here they are not to fill the memory
        num_values = 1 + (num_values - 1) % MAX_SCATTERED
    first = reader.number() % (num_values + 1)
    sizes = (first, num_values - first)
    frame = reader.rest()
    try:
        blocks = list(dense_blocks(pipeline.open(frame, sizes), block_values))
        values_D = pipeline.decode(memoryview(frame), sizes)
    except FrameError as error:
        check_refusal(error)
        return
    assert len(frame) <= pipeline.max_frame_bytes(sizes)
    assert values_D.shape == (num_values,)
    assert values_D.flags.aligned
    assert same(np.concatenate(blocks), values_D)
    again = pipeline.encode(values_D, rng(), sizes)
    assert len(again) <= pipeline.max_frame_bytes(sizes)
    once_more = pipeline.decode(again, sizes)
    if pipeline.traits.lossless:
        assert same(once_more, values_D)
    if all(stage.name in CANONICAL and stage == type(stage)() for stage in pipeline.stages):
        # One value has one encoding, but for the NaNs of lossy codecs, which become quiet.
        assert again == frame or np.isnan(values_D).any()
        assert same(once_more, values_D)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def same(left_D: Vector, right_D: Vector) -> bool:
    """Whether two vectors agree in every bit, where both are NaN aside."""
    nan = np.isnan(left_D) & np.isnan(right_D)
    return bool((nan | (left_D.view(np.uint32) == right_D.view(np.uint32))).all())


def frames() -> Iterator[bytes]:
    for index, pipeline in enumerate(PIPELINES):
        for values in (SPECIAL[-1:], SPECIAL[-2:], SPECIAL, SPECIAL[:6], SPECIAL[:1].repeat(40)):
            for first in {0, 2 % values.size if pipeline.by_tensor else 0}:
                frame = pipeline.encode(values, rng(), (first, values.size - first))
                for block_values, num_values in ((0, values.size), (255, MAX_VALUES)):
                    yield struct.pack("<BBQB", index, block_values, num_values - 1, first) + frame


# -- update headers --------------------------------------------------------------------------------------------------


def read_header(data: bytes) -> None:
    try:
        header = UpdateHeader.from_bytes(data)
    except UpdateRejected as error:
        check_rejection(error, UpdateResult.MALFORMED)
        return
    written = header.to_bytes()
    assert UpdateHeader.from_bytes(written) == header
    try:
        layout = layout_of(header)
    except UpdateRejected as error:
        check_rejection(error, UpdateResult.WRONG_LAYOUT)
        return
    assert json.loads(layout.to_json()) == header.layout


def headers() -> Iterator[bytes]:
    header = UpdateHeader(
        federation="north",
        update_id=NOBODY,
        assignment_id=NOBODY,
        job_id=NOBODY,
        version=3,
        kind=WorkKind.TRAIN,
        layout_digest=LAYOUT.digest,
        frame_bytes=83,
        frame_digest=hashlib.sha256(b"").hexdigest(),
        num_examples=10,
        metrics={"train_loss": 0.5},
        evaluated_examples=4,
        evaluation={"accuracy": 0.25, "loss": 1e-7},
    )
    yield header.to_bytes()
    yield header.model_copy(update={"kind": WorkKind.GRADIENT, "basis_digest": "ab" * 32}).to_bytes()
    yield header.model_copy(update={"kind": WorkKind.EVALUATE, "frame_bytes": 0}).to_bytes()
    rows = json.loads(LAYOUT.to_json())
    yield header.model_copy(update={"kind": WorkKind.INITIALISE, "version": 0, "layout": rows}).to_bytes()
    yield b'{"layout":[NaN,1e999,-1,"\\u0000"],"metrics":{"a":1e31},"more":[[[[]]]]}'
    yield from (b'{"layout":' + bomb for bomb in BOMBS)


# -- layouts ---------------------------------------------------------------------------------------------------------


def read_layout(data: bytes) -> None:
    """A layout, and after a NUL the values to export with it."""
    text, _, state = data.partition(b"\0")
    try:
        layout = Layout.from_json(text)
    except LayoutError as error:
        check_refusal(error)
        return
    assert Layout.from_json(layout.to_json()) == layout
    assert layout.num_values == sum(math.prod(tensor.shape) for tensor in layout.tensors) <= MAX_VALUES
    try:
        factors = {f"{module}.lora_{factor}.weight" for module in lora_modules(layout) for factor in "AB"}
        assert factors <= {tensor.name for tensor in layout.tensors}
    except LayoutError as error:
        check_refusal(error)
    assert layout.moving.num_values + layout.num_basis_values == layout.num_values
    try:
        gradients = gradient_layout(layout)
        assert [tensor.name for tensor in gradients.tensors] == list(basis_modules(layout))
    except LayoutError as error:
        check_refusal(error)
    if layout.num_values <= MAX_EXPORTED_VALUES:
        export(layout, (state * (4 * layout.num_values // len(state) + 1) if state else b"\0" * 4 * layout.num_values))


CHANGED: Final = Layout.of(
    ("adapter", f"{name}.lora_{factor}.weight", shape, "float32")
    for name, (m, n) in {"one": (3, 5), "two": (4, 2)}.items()
    for factor, shape in (("A", (2, n)), ("B", (m, 2)))
)


def read_changes(data: bytes) -> None:
    """What a server says has changed of the frozen matrices."""
    try:
        changes = list(read_change(memoryview(data), CHANGED))
    except FrameError as error:
        check_refusal(error)
        return
    assert b"".join(piece for each in changes for piece in change_bytes(each.b_mr, each.a_rn)) == data
    assert len(data) <= max_change_bytes(CHANGED)
    assert all(np.isfinite(each.b_mr).all() for each in changes)


def export(layout: Layout, state: bytes) -> None:
    state = state[: 4 * layout.num_values]
    keys = [f"{tensor.group}/{tensor.name}" for tensor in layout.tensors]
    if len(set(keys)) < len(keys):  # a slash in a name
        return
    try:
        exported = b"".join(safetensors_chunks(keys, layout, state, {"format": "pt"}))
    except InvalidInput as error:
        check_refusal(error)
        return
    written = dict(deserialize(exported))  # type: ignore[no-untyped-call]
    assert written.keys() == set(keys)
    values = np.frombuffer(state, "<f4")
    for key, tensor in zip(keys, layout.tensors, strict=True):
        assert tuple(written[key]["shape"]) == tensor.shape
        if tensor.dtype == "float32":
            assert written[key]["data"] == values[tensor.offset : tensor.offset + tensor.num_values].tobytes()


def layouts() -> Iterator[bytes]:
    yield LAYOUT.to_json()
    yield LORA.to_json() + b"\0" + SPECIAL[:6].tobytes()
    wide = Layout.of([("model", name, (2, 3), name) for name in ("float32", "float16", "bfloat16")])
    yield wide.to_json() + b"\0" + np.array([1e5, -3.0], np.float32).tobytes()
    yield wide.to_json() + b"\0" + np.array([0.5, 2.0, -3.0], np.float32).tobytes()
    yield Layout.of([("model", "é", (MAX_VALUES,), "float32")]).to_json()
    yield b'[["a","b",[1,2],"float32"],["a","c",[],"float16"],["",[],{},null,1.5,true]]'
    fed_sb = [
        ("adapter", "w.lora_R.weight", (2, 2)),
        ("basis", "w.lora_A.weight", (2, 5)),
        ("basis", "w.lora_B.weight", (4, 2)),
    ]
    yield Layout.of((*row, "float32") for row in fed_sb).to_json()
    yield from BOMBS


def changes() -> Iterator[bytes]:
    """Yield changes of both modules, of one, of none, and one with a value that is not finite."""
    for ranks in ((1, 1), (1, 0), (0, 0)):
        rows = zip(((3, 5), (4, 2)), ranks, strict=True)
        yield b"".join(
            struct.pack("<I", rank) + np.arange(rank * (m + n), dtype="<f4").tobytes() for (m, n), rank in rows
        )
    yield struct.pack("<I", DENSE) + np.arange(15, dtype="<f4").tobytes() + struct.pack("<I", 0)
    yield struct.pack("<I", 1) + SPECIAL[:8].tobytes() + struct.pack("<I", 0)


# -- protobuf messages -----------------------------------------------------------------------------------------------


def read_message(data: bytes) -> None:
    reader = Reader(data)
    kind, check = MESSAGES[reader.number() % len(MESSAGES)]
    try:
        encoded = reader.rest()
        message = kind.FromString(encoded)
    except DecodeError:
        return  # gRPC refuses it before any code of ours
    if kind is pb.SessionRequest and hides_fields(message, encoded):
        return
    check(message)


def hides_fields(message: Message, encoded: bytes) -> bool:
    """Whether a message has fields that nobody knows, which protobuf says by what it discards."""
    whole = type(message).FromString(encoded)
    whole.DiscardUnknownFields()
    hides = whole.ByteSize() < message.ByteSize()
    try:
        refuse_unknown_fields(encoded, pb.SessionRequest.DESCRIPTOR)
    except InvalidInput as error:
        check_refusal(error)
        assert hides or len(encoded) > MAX_FIELDS
        return True
    assert not hides
    return False


def said_by_client(message: pb.SessionRequest) -> None:
    try:
        if message.WhichOneof("event") == "hello":
            hello = client_service._hello(message.hello)
            assert client_service._hello(convert.hello_to_wire(hello).hello) == hello
            seat = Fleet().join("alice", hello)
            assert seat.hello is hello
            return
        event = client_service._event(message)
    except InvalidInput as error:
        check_refusal(error)
        return
    again = client_service._event(convert.event_to_wire(event))
    if isinstance(event, Decline):
        event = replace(event, reason=event.reason[: convert.MAX_REASON_CHARS])
    assert repr(again) == repr(event)  # NaN is no progress, but the same NaN
    if isinstance(event, Heartbeat):
        fleet = Fleet()
        seat = fleet.join("alice", HELLO)
        seat.work = event.assignment_id
        fleet.heartbeat(seat, event)
        assert 0 <= seat.progress <= 1


def said_by_server(message: pb.SessionReply) -> None:
    match message.WhichOneof("order"):
        case "welcome":
            assert 0.1 <= convert.heartbeat_interval_s(message.welcome) <= 3600
        case "cancel":
            cancel = convert.cancel_from_wire(message.cancel)
            assert convert.cancel_from_wire(client_service._order(cancel).cancel) == cancel
        case "assignment":
            assigned(message.assignment)


def assigned(message: pb.Assignment) -> None:
    try:
        assignment = convert.assignment_from_wire(message)
    except convert.UnfitAssignment as error:
        check_refusal(error)
        return
    assignment = replace(assignment, deadline_s=min(assignment.deadline_s // 1, 2.0**40))  # a float of milliseconds
    assert convert.assignment_from_wire(client_service._order(assignment).assignment) == assignment
    try:
        job = Job.from_json(assignment.job)
    except JobFileError as error:
        check_refusal(error)
        return
    assert Job.from_json(job.to_json()) == job


def state_of_upload(message: pb.UploadState) -> None:
    try:
        state = convert.upload_state_from_wire(message)
    except Refused as error:
        check_refusal(error)
        return
    assert convert.upload_state_from_wire(client_service._state(state)) == state


HELLO: Final = Hello("roundtable 0.1.0", "cpu", ("digits",), ("full", "lora"), ("raw",), (NOBODY,))
MESSAGES: Final[list[tuple[type[Message], Callable[[Any], None]]]] = [
    (pb.SessionRequest, said_by_client),
    (pb.SessionReply, said_by_server),
    (pb.UploadState, state_of_upload),
]


def messages() -> Iterator[bytes]:
    digest = "0" * 64
    work = Assignment(NOBODY, NOBODY, make_job().to_json(), 3, WorkKind.TRAIN, 7, digest, digest, 83, 60.0)
    welcome = pb.SessionReply(welcome=pb.Welcome(heartbeat_interval_ms=10_000))
    for index, message in (
        (0, convert.hello_to_wire(HELLO)),
        (0, convert.event_to_wire(Heartbeat(NOBODY, 0.5))),
        (0, convert.event_to_wire(Heartbeat(NOBODY, math.nan))),
        (0, convert.event_to_wire(Decline(NOBODY, "no such task", transient=True))),
        (1, welcome),
        (1, client_service._order(work)),
        (1, client_service._order(replace(work, kind=WorkKind.INITIALISE, layout_digest="", frame_digest=""))),
        (1, client_service._order(Cancel(NOBODY, "the version has closed"))),
        *((2, client_service._state(UploadState(83, result, "why"))) for result in (None, *UpdateResult)),
    ):
        yield bytes([index]) + message.SerializeToString()
    # A field that no version has had yet.
    yield bytes([0]) + convert.hello_to_wire(HELLO).SerializeToString() + b"\xfa\x3f\x01x"


TARGETS: Final = (
    Target("frame", read_frame, frames, max_bytes=1024, runs=400_000),
    Target("header", read_header, headers, max_bytes=1 << 16, runs=50_000),
    Target("layout", read_layout, layouts, max_bytes=1 << 15, runs=20_000),
    Target("change", read_changes, changes, max_bytes=1 << 10, runs=20_000),
    Target("message", read_message, messages, max_bytes=1 << 14, runs=20_000),
)

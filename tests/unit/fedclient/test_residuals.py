"""Error feedback in the client: against the recursion written out, and over files that were lost, damaged or left."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclient.declining import Declined
from fedclient.guard import Guard
from fedclient.ledger import MemoryLedger
from fedclient.residuals import (
    MAX_JOBS,
    FileResiduals,
    MemoryResiduals,
    Residuals,
    encoding_error,
)
from fedclient.trainer import Evaluation, Stopped, Trained, Work
from fedclient.updates import Update, UpdateMaker
from fedcodec import build_pipeline
from fedcore.errors import StorageFailed
from fedcore.jobfile import parse_job
from fedcore.layout import Layout, Vector
from fedcore.messages import Assignment, UpdateHeader, WorkKind
from fedcore.rng import stream
from tests.support.workers import PlainWorker

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LAYOUT = Layout.of([("adapter", "a", (3, 7), "float32"), ("adapter", "b", (20,), "float32")])
NUM_VALUES = LAYOUT.num_values
JOB_ID = "ab" * 16
BASE = build_pipeline([{"codec": "raw"}]).encode(np.zeros(NUM_VALUES, np.float32), stream(0))
TOP_K: list[dict[str, Any]] = [{"codec": "top-k", "fraction": 0.1}, {"codec": "rice"}]
CONTRACTIONS: list[list[dict[str, Any]]] = [
    TOP_K,
    [{"codec": "bf16"}],
    [{"codec": "int8"}],
    [{"codec": "sign"}],
    [{"codec": "kmeans", "clusters": 3}],
    [{"codec": "top-k", "fraction": 0.2}, {"codec": "ternary"}, {"codec": "rice"}],
    [
        {"codec": "per-tensor"},
        {"codec": "top-k", "fraction": 0.1},
        {"codec": "kmeans", "clusters": 3},
        {"codec": "rice"},
    ],
]
each_contraction = pytest.mark.parametrize(
    "stages", CONTRACTIONS, ids=lambda stages: "+".join(stage["codec"] for stage in stages)
)


def delta_of(version: int) -> Vector:
    return np.random.default_rng(version).standard_normal(NUM_VALUES).astype(np.float32)


@dataclass
class Worker(PlainWorker):
    """Gives the same difference for the same version, always in the same memory, as it may."""

    deltas: dict[int, Vector] = field(default_factory=dict)
    stops: bool = False
    memory_D: Vector = field(default_factory=lambda: np.zeros(NUM_VALUES, np.float32))  # noqa: N815 - shape suffix

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        return LAYOUT, self.memory_D

    def layout(self, work: Work) -> Layout:
        return LAYOUT

    def train(self, work: Work, base_D: Vector, **options: Any) -> Trained:
        if self.stops:
            raise Stopped("stopped")
        self.memory_D[:] = self.deltas.get(work.version, delta_of(work.version))
        return Trained(self.memory_D, 10, {}, None)

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        return Evaluation(0, {})

    def forget(self, job_id: str) -> None:
        pass


@dataclass
class Client:
    """A client and its job."""

    stages: list[dict[str, Any]] = field(default_factory=lambda: TOP_K)
    feedback: dict[str, Any] | None = field(default_factory=dict)
    residuals: Residuals = field(default_factory=MemoryResiduals)
    worker: Worker = field(default_factory=Worker)
    job_id: str = JOB_ID

    def __post_init__(self) -> None:
        self.maker = UpdateMaker(self.worker, KEY, "fed", "c1", self.residuals, Guard(MemoryLedger()))
        compression = {"uplink": self.stages, "error_feedback": self.feedback}
        tree = {"job": {"name": "j", "rounds": 9}, "task": {"name": "toy"}, "schedule": {"cohort": 1}}
        self.job = parse_job({**tree, "compression": compression}, "test").to_json()
        self.uplink = build_pipeline(self.stages)

    def update(self, version: int, counted_in: int = 0, kind: WorkKind = WorkKind.TRAIN) -> Update:
        digest = "0" * 64
        assignment = Assignment(
            f"{version:032x}", self.job_id, self.job, version, kind, version, LAYOUT.digest, digest, len(BASE), 60.0
        )
        work = replace(assignment, counted_in=counted_in)
        return self.maker.update(work, memoryview(BASE), lambda part: None, threading.Event())

    def sent(self, version: int, counted_in: int = 0) -> Vector:
        """Return what the server decodes."""
        return self.uplink.decode(self.update(version, counted_in).frame[:], LAYOUT.sizes)

    def residual(self, version: int) -> Vector | None:
        return self.residuals.load(self.job_id, version, NUM_VALUES)


def header_of(update: Update) -> UpdateHeader:
    return UpdateHeader.from_bytes(update.header)


# -- what is sent ----------------------------------------------------------------------------------------------------


@each_contraction
@settings(max_examples=15)
@given(scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 7.0]), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_what_was_sent_and_what_is_left_are_what_was_learnt(
    stages: list[dict[str, Any]], scales: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    deltas = {
        version: (scale * rng.laplace(size=NUM_VALUES)).astype(np.float32) for version, scale in enumerate(scales)
    }
    client = Client(stages, worker=Worker(deltas))
    sent = [client.sent(version, counted_in=version).astype(np.float64) for version in deltas]
    left_D = client.residual(len(scales) - 1)
    assert left_D is not None
    learnt = np.sum([delta.astype(np.float64) for delta in deltas.values()], axis=0)
    np.testing.assert_allclose(np.sum(sent, axis=0) + left_D, learnt, rtol=0, atol=1e-4)


@each_contraction
def test_the_error_that_is_named_is_that_of_the_frame(stages: list[dict[str, Any]]) -> None:
    for client in (Client(stages, feedback=None), Client(stages)):
        update = client.update(5)
        decoded_D = client.uplink.decode(update.frame[:], LAYOUT.sizes).astype(np.float64)
        delta_D = delta_of(5).astype(np.float64)
        expected = np.linalg.norm(delta_D - decoded_D) / np.linalg.norm(delta_D)
        assert header_of(update).encoding_error == pytest.approx(expected, rel=1e-6)
        assert 0 < expected < 1
        assert (client.worker.memory_D == delta_of(5)).all(), "the worker's memory is its own"


def test_without_error_feedback_nothing_is_kept_or_added() -> None:
    client = Client(feedback=None)
    assert (client.sent(0) == client.uplink.decode(client.uplink.encode(delta_of(0), stream(0)), LAYOUT.sizes)).all()
    assert client.residual(0) is None


@pytest.mark.parametrize("stages", [[{"codec": "raw"}], [{"codec": "raw"}, {"codec": "zstd"}]])
def test_what_loses_nothing_names_no_error_and_leaves_nothing(stages: list[dict[str, Any]]) -> None:
    client = Client(stages)
    assert header_of(client.update(0)).encoding_error is None
    assert client.residual(0) is None


def test_an_evaluation_names_no_error_and_touches_nothing() -> None:
    client = Client()
    client.update(0)
    kept = client.residual(0)
    assert kept is not None
    assert header_of(client.update(0, kind=WorkKind.EVALUATE)).encoding_error is None
    np.testing.assert_array_equal(client.residual(0), kept)


def test_what_hides_by_its_draws_names_no_error_and_feeds_nothing_back() -> None:
    rqm = [{"codec": "rqm", "levels": 16, "keep": 0.42, "clip": 1.0, "extension": 1.0}]
    with pytest.raises(Declined, match="would take back what the uplink hides"):
        Client(rqm).update(0)
    assert header_of(Client(rqm, feedback=None).update(0)).encoding_error is None


# -- which residual counts -------------------------------------------------------------------------------------------


def expected_of(client: Client, history: Sequence[tuple[int, int]], decay: float = 1.0) -> dict[int, Vector]:
    """Return what is sent from each version, in float64: each assignment is (version, counted_in)."""
    left: dict[int, Any] = {}
    sent: dict[int, Vector] = {}
    for version, counted_in in history:
        fed_back = left[counted_in - 1] * decay ** (version - counted_in) if counted_in else 0.0
        c_D = (delta_of(version) + fed_back).astype(np.float32)
        frame = client.uplink.encode(c_D, stream(version, "encode"))
        sent[version] = client.uplink.decode(frame, LAYOUT.sizes)
        left[version] = c_D - sent[version]
    return sent


@pytest.mark.parametrize(
    ("what", "history"),
    [
        ("every update counts", [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("the second came too late", [(0, 0), (1, 1), (2, 1), (3, 3)]),
        ("the first two came too late", [(0, 0), (1, 0), (2, 0), (3, 3)]),
        ("it was not asked for a while", [(0, 0), (1, 1), (5, 2), (9, 6)]),
        ("a round was abandoned and tried again", [(0, 0), (1, 1), (1, 1), (1, 1), (2, 2)]),
        ("only the first counted", [(0, 0), (2, 1), (3, 1), (4, 1), (5, 1)]),
    ],
)
def test_what_counted_decides_what_is_fed_back(what: str, history: list[tuple[int, int]], tmp_path: Path) -> None:
    for residuals in (MemoryResiduals(), FileResiduals(tmp_path, "fed", "c1")):
        client = Client(residuals=residuals)
        expected = expected_of(client, history)
        for version, counted_in in history:
            np.testing.assert_allclose(client.sent(version, counted_in), expected[version], rtol=1e-6)


def test_an_update_that_is_made_again_has_the_same_bytes_and_leaves_the_same(tmp_path: Path) -> None:
    client = Client(residuals=FileResiduals(tmp_path, "fed", "c1"))
    client.update(0)
    first, left = client.update(1, 1), (tmp_path / "residuals" / f"{JOB_ID}.1").read_bytes()
    for maker in (client, Client(residuals=FileResiduals(tmp_path, "fed", "c1"))):  # the same process, and a new one
        again = maker.update(1, 1)
        assert (again.header, again.frame[:]) == (first.header, first.frame[:])
        assert (tmp_path / "residuals" / f"{JOB_ID}.1").read_bytes() == left


def test_an_update_that_is_broken_off_leaves_what_an_earlier_one_has_kept() -> None:
    """It may count already: the server takes it in while the client, killed and back, is asked for it again."""
    client = Client()
    client.update(0)
    client.update(1, 1)
    kept = client.residual(1)
    client.worker.stops = True
    with pytest.raises(Stopped):
        client.update(1, 1)
    assert kept is not None
    np.testing.assert_array_equal(client.residual(1), kept)


def test_decay_counts_the_versions_that_were_missed() -> None:
    history = [(0, 0), (1, 1), (4, 2), (5, 5)]
    client = Client(feedback={"decay": 0.5})
    expected = expected_of(client, history, decay=0.5)
    for version, counted_in in history:
        np.testing.assert_allclose(client.sent(version, counted_in), expected[version], rtol=1e-6)


@pytest.mark.parametrize(("version", "is_fed_back"), [(1, True), (3, True), (4, False), (9, False)])
def test_what_is_older_than_max_age_is_dropped(version: int, is_fed_back: bool) -> None:
    client = Client(feedback={"max_age": 3})
    client.update(0)
    fresh = Client(feedback={"max_age": 3}).sent(version)
    assert (client.sent(version, counted_in=1) != fresh).any() == is_fed_back
    assert (client.residual(0) is not None) == is_fed_back


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_training_gone_astray_leaves_nothing(value: float) -> None:
    astray_D = delta_of(1)
    astray_D[4] = value
    client = Client([{"codec": "bf16"}], worker=Worker({1: astray_D}))
    client.update(0)
    assert header_of(client.update(1, 1)).encoding_error is None
    assert client.residual(1) is None
    assert client.residual(0) is not None, "the update will be refused, so this is still the true one"


def test_at_most_two_are_kept_of_a_job_and_none_that_cannot_count() -> None:
    client = Client()
    kept = []
    for version, counted_in in [(0, 0), (1, 1), (2, 2), (3, 2), (4, 2), (5, 5)]:
        client.update(version, counted_in)
        kept.append([v for v in range(6) if client.residual(v) is not None])
    assert kept == [[0], [0, 1], [1, 2], [1, 3], [1, 4], [4, 5]]


def test_no_error_is_named_that_is_no_number() -> None:
    def error_of(values: list[float], decoded: list[float]) -> float | None:
        (part,) = build_pipeline([{"codec": "raw"}]).open(
            build_pipeline([{"codec": "raw"}]).encode(np.array(decoded, np.float32), stream(0)), len(decoded)
        )
        return encoding_error(np.array(values, np.float32), [part])

    assert error_of([0, 0], [0, 0]) == 0
    assert error_of([0, 0], [1, 0]) is None
    assert error_of([3, 4], [0, 0]) == 1
    assert error_of([3, 4], [3, 3]) == 0.2
    assert error_of([1e-45, 0], [3e38, 0]) is None
    assert error_of([3e38, 0], [-3e38, 0]) is None  # the difference overflows
    assert error_of([1e38, 0], [-1e38, 0]) == 2


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The file of version 0."""
    Client(residuals=FileResiduals(tmp_path, "fed", "c1")).update(0)
    (path,) = (tmp_path / "residuals").iterdir()
    return path


@pytest.mark.usefixtures("open_umask")
def test_only_the_owner_can_read_it(kept: Path) -> None:
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_another_process_reads_what_one_has_kept(kept: Path, tmp_path: Path) -> None:
    in_memory = Client()
    in_memory.update(0)
    residual_D = FileResiduals(tmp_path, "fed", "c1").load(JOB_ID, 0, NUM_VALUES)
    assert residual_D is not None
    np.testing.assert_array_equal(residual_D, in_memory.residual(0))


@pytest.mark.parametrize("federation_client", [("other", "c1"), ("fed", "c2")])
def test_what_somebody_else_left_is_not_taken(
    kept: Path, tmp_path: Path, federation_client: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert FileResiduals(tmp_path, *federation_client).load(JOB_ID, 0, NUM_VALUES) is None
    assert "residual is lost" in caplog.text


@pytest.mark.parametrize("job_and_version", [("cd" * 16, 0), (JOB_ID, 1)])
def test_a_file_under_another_name_is_not_taken(
    kept: Path, tmp_path: Path, job_and_version: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    job_id, version = job_and_version
    kept.rename(kept.with_name(f"{job_id}.{version}"))
    assert FileResiduals(tmp_path, "fed", "c1").load(job_id, version, NUM_VALUES) is None
    assert "residual is lost" in caplog.text


def test_a_file_of_another_length_counts_as_none(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    residuals = FileResiduals(tmp_path, "fed", "c1")
    for num_values in (NUM_VALUES - 1, NUM_VALUES + 1):
        assert residuals.load(JOB_ID, 0, num_values) is None
    assert caplog.text.count("residual is lost") == 2
    for data in (b"", kept.read_bytes()[:-1], kept.read_bytes() + b"\0"):
        kept.write_bytes(data)
        assert residuals.load(JOB_ID, 0, NUM_VALUES) is None


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_a_damaged_file_counts_as_none_and_is_replaced(
    kept: Path, tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = kept.read_bytes()
    data = bytearray(whole)
    data[place] ^= 1
    kept.write_bytes(data)
    client = Client(residuals=FileResiduals(tmp_path, "fed", "c1"))
    assert (client.sent(1, counted_in=1) == Client().sent(1)).all()
    assert "residual is lost" in caplog.text
    client.update(0)
    assert kept.read_bytes() == whole


def test_a_file_that_cannot_be_read_counts_as_none(
    kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept.unlink()
    kept.mkdir()
    assert FileResiduals(tmp_path, "fed", "c1").load(JOB_ID, 0, NUM_VALUES) is None
    assert "Is a directory" in caplog.records[-1].__dict__["reason"]


def test_what_a_kill_cut_short_is_cleared_away(kept: Path, tmp_path: Path) -> None:
    (kept.parent / f".{kept.name}.0123456789abcdef").write_bytes(b"half")
    Client(residuals=FileResiduals(tmp_path, "fed", "c1")).update(1, 1)
    assert sorted(path.name for path in kept.parent.iterdir()) == [f"{JOB_ID}.0", f"{JOB_ID}.1"]


def test_the_jobs_worked_on_last_are_remembered(tmp_path: Path) -> None:
    residuals = FileResiduals(tmp_path, "fed", "c1")
    jobs = [f"{number:032x}" for number in range(MAX_JOBS + 2)]
    for age, job_id in enumerate(jobs):
        client = Client(residuals=residuals, job_id=job_id)
        client.update(0)
        client.update(1, 1)
        for path in (tmp_path / "residuals").glob(f"{job_id}.*"):
            os.utime(path, (4e9 - age, 4e9 - age))  # the clock was put back: the job in hand is kept all the same
    names = {path.name.partition(".")[0] for path in (tmp_path / "residuals").iterdir()}
    assert len(names) == MAX_JOBS
    assert jobs[-1] in names


def test_an_update_whose_rest_cannot_be_kept_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "residuals").write_text("in the way")
    client = Client(residuals=FileResiduals(tmp_path, "fed", "c1"))
    with pytest.raises(StorageFailed, match="cannot prepare the folder"):
        client.update(0)


def test_what_was_kept_before_outlives_a_disk_that_takes_no_more(kept: Path, tmp_path: Path) -> None:
    (kept.parent / f"{JOB_ID}.1").mkdir()  # a file cannot replace it
    client = Client(residuals=FileResiduals(tmp_path, "fed", "c1"))
    with pytest.raises(StorageFailed, match="cannot write"):
        client.update(1, 1)
    (kept.parent / f"{JOB_ID}.1").rmdir()
    (expected,) = [sent for version, sent in expected_of(client, [(0, 0), (2, 1)]).items() if version == 2]
    np.testing.assert_allclose(client.sent(2, counted_in=1), expected, rtol=1e-6)

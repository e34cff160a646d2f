from __future__ import annotations

import re
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks import codecs, folding
from benchmarks.suite import HERE
from benchmarks.targets import TARGETS
from fedagg.base import Capacity
from fedagg.weighted_mean import WeightedMean
from fedcodec.base import LOSSLESS
from fedcodec.build import build_pipeline
from fedcore.draws import PrivateDraws
from fedcore.layout import Vector

VALUES = np.random.default_rng(1).standard_normal(5000, dtype=np.float32)
SIZES = codecs.tensor_sizes(VALUES.size)
README = HERE.parent / "compression" / "fedcodec" / "README.md"


@pytest.mark.parametrize("subject", codecs.subjects(), ids=lambda subject: subject.name)
def test_every_subject_reads_what_it_wrote(subject: codecs.Subject) -> None:
    frame = subject.encode(VALUES, SIZES)
    decoded = subject.decode(frame, SIZES)
    assert decoded.shape == VALUES.shape
    assert decoded.dtype == np.float32
    subject.open(frame, SIZES)
    stages = codecs.CHAINS.get(subject.name)
    if stages is None or build_pipeline(stages).traits == LOSSLESS:
        assert decoded.tobytes() == VALUES.tobytes()
    else:
        assert decoded.tobytes() != VALUES.tobytes()


def test_opening_reads_the_whole_frame() -> None:
    (subject,) = [each for each in codecs.subjects() if each.name == "FedZip"]
    frame = subject.encode(VALUES, SIZES)
    with pytest.raises(ValueError, match="after the end"):
        subject.open(frame + b"\0", SIZES)


def test_what_is_timed_was_done_before() -> None:
    calls: list[str] = []

    def encode(values_D: Vector, sizes: Sequence[int]) -> bytes:
        calls.append("encode")
        return b""

    def read(frame: bytes, sizes: Sequence[int]) -> None:
        calls.append("open")

    def decode(frame: bytes, sizes: Sequence[int]) -> Vector:
        calls.append("decode")
        return VALUES

    subject = codecs.Subject("s", "", encode, read, decode)
    codecs._timed(subject, VALUES, SIZES)
    assert calls == ["encode"] * 3 + ["open"] * 2 + ["decode"] * 2


@pytest.mark.parametrize("draw", codecs.DRAWS)
def test_sizes_and_errors_are_those_of_the_frames(draw: str) -> None:
    found = codecs.measure(draw, 2000, 1)
    rows = {row["name"]: row for row in found["rows"]}
    assert [subject.name for subject in codecs.subjects()] == list(rows)
    values = codecs.DRAWS[draw](np.random.default_rng(codecs.SEED), 2000)
    for name, stages in codecs.CHAINS.items():
        pipeline = build_pipeline(stages)
        frame = pipeline.encode(values, codecs.draws_for(pipeline), [200] * 10)
        lost = pipeline.decode(frame, [200] * 10).astype(np.float64) - values
        assert rows[name]["bytes"] == len(frame)
        assert rows[name]["ratio"] == pytest.approx(8000 / len(frame), abs=1e-3)
        error = np.linalg.norm(lost) / np.linalg.norm(values.astype(np.float64))
        assert rows[name]["error"] == pytest.approx(error, rel=1e-5, abs=1e-6)
    assert rows["raw"]["small_bytes"] == {"10": 40 + 7, "1000": 4000 + 8}


def test_what_hides_by_its_draws_draws_in_private() -> None:
    private = [name for name, each in codecs.CHAINS.items() if _draws_in_private(each)]
    assert private == ["RQM", "RQM, Huffman"]


def _draws_in_private(stages: codecs.Stages) -> bool:
    return isinstance(codecs.draws_for(build_pipeline(stages)), PrivateDraws)


def test_the_layout_has_ten_tensors_of_all_values() -> None:
    assert codecs.tensor_sizes(23) == [2, 2, 2, 3, 2, 2, 3, 2, 2, 3]
    assert codecs.tensor_sizes(10_000_000) == [1_000_000] * 10


def test_every_speed_that_is_wanted_is_of_a_pipeline() -> None:
    speeds = [target.text.rpartition(", ")[0] for target in TARGETS if "MB/s" in target.text]
    assert speeds
    assert set(speeds) <= set(codecs.CHAINS)


def test_the_catalogue_has_a_row_for_each_subject_and_stands_in_the_readme_of_the_codecs() -> None:
    made = codecs.catalogue(1000).splitlines()
    measured = README.read_text(encoding="utf-8").partition("## Measured")[2].partition("## ")[0]
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    columns = re.compile(r"^\|[^|]*\|[^|]*\|")
    assert [columns.findall(line) for line in rows] == [columns.findall(line) for line in made]
    assert "python -m benchmarks.codecs --catalogue" in measured


@pytest.mark.parametrize("name", folding.NAMES)
def test_parts_and_dense_vectors_have_one_mean(name: str) -> None:
    updates = folding.encode_all(name, 3000, 3)
    fold = WeightedMean().open(3000, Capacity(3, 3, folding.MAX_ABS))
    vectors = [updates.pipeline.decode(frame, updates.sizes).astype(np.float64) for frame in updates.frames]
    mean = np.average(vectors, axis=0, weights=[1, 2, 3])
    for way in folding.WAYS:
        np.testing.assert_allclose(folding.mean_of(fold, updates, way), mean, rtol=1e-6, atol=1e-9)
    assert max(np.abs(vector).max() for vector in vectors) <= folding.MAX_ABS


def test_the_peak_is_that_of_what_is_added_and_tracing_ends() -> None:
    updates = folding.encode_all("sign", 100_000, 2)
    fold = WeightedMean().open(100_000, Capacity(2, 2, folding.MAX_ABS))
    # A dense vector is held whole.
    assert folding.peak_bytes(fold, updates, "dense") >= 4 * 100_000
    assert not tracemalloc.is_tracing()


def test_folding_measures_each_pipeline_in_both_ways() -> None:
    found = folding.measure(2000, 2, 1)
    assert [row["name"] for row in found["rows"]] == list(folding.NAMES)
    for row in found["rows"]:
        assert {f"{way}_{unit}" for way in folding.WAYS for unit in ("s", "mib")} < row.keys()

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from fedclient.tasks.hf.rows import read_dataset, read_files
from fedcore.errors import InvalidInput
from tests.support.text_models import mood_rows, write_jsonl

COLUMNS = ["text", "number"]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".jsonl":
        return write_jsonl(file, rows)
    if file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def expected(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{column: str(row[column]) for column in COLUMNS} for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    rows = [*mood_rows(20), {"text": 'quotes "," commas\nand a line ä', "label": "", "place": "", "number": -1}]
    assert read_files(write(tmp_path / f"rows{suffix}", rows), COLUMNS) == [expected(rows)]


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, start in (("b.csv", 4), ("a.jsonl", 0), ("c.parquet", 8)):
        write(tmp_path / name, mood_rows(12)[start : start + 4])
    (tmp_path / "notes.md").write_text("not data")
    assert read_files(tmp_path, COLUMNS) == [expected(mood_rows(12)[at : at + 4]) for at in (0, 4, 8)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_column_that_is_not_there_names_those_that_are(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"rows{suffix}", mood_rows(3))
    with pytest.raises(InvalidInput, match=rf"rows\{suffix}.*: has no column 'body'; it has: text, label, place, num"):
        read_files(file, ["body"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": 1, "number": 1}\n{"text"', r"x\.jsonl: cannot be read: "),
        ("x.jsonl", b'{"text": "a", "number": 1}\n[1]\n', r"row 2: is list, not an object"),
        ("x.jsonl", b'{"text": null, "number": 1}\n', r"row 1: column 'text' is NoneType, not text"),
        ("x.jsonl", b'{"text": {"a": 1}, "number": 1}\n', r"row 1: column 'text' is dict, not text"),
        ("x.jsonl", b"\xff\xfe", r"x\.jsonl: cannot be read: "),
        ("x.csv", b'text,number\n"a,1\n', r"x\.csv: cannot be read: "),
        ("x.csv", b"text,number\na\n", r"row 1: column 'number' is NoneType"),
        ("x.parquet", b"PAR1 and no more", r"x\.parquet: cannot be read: "),
        ("x.txt", b"text", r"x\.txt: known are files with \.jsonl, \.csv, \.parquet"),
    ],
)
def test_malformed_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_files(tmp_path / name, COLUMNS)


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no file with one of \.jsonl"):
        read_files(tmp_path, COLUMNS)
    with pytest.raises(InvalidInput, match=r"absent\.jsonl: cannot be read"):
        read_files(tmp_path / "absent.jsonl", COLUMNS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_data_set_by_name_gives_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", mood_rows(9))
    write_jsonl(folder / "test.jsonl", mood_rows(4))
    assert read_dataset(str(folder), None, "train", COLUMNS) == expected(mood_rows(9))
    assert read_dataset(str(folder), None, "test", COLUMNS) == expected(mood_rows(4))
    with pytest.raises(InvalidInput, match=r"has no column 'body'; it has: text, label"):
        read_dataset(str(folder), None, "train", ["body"])
    with pytest.raises(InvalidInput, match=r"data set .*valid"):
        read_dataset(str(folder), None, "valid", COLUMNS)
    with pytest.raises(InvalidInput, match=r"data set .*absent"):
        read_dataset(str(tmp_path / "absent"), None, "train", COLUMNS)

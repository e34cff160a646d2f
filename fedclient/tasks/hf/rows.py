"""A client's rows of text: from JSONL, CSV or Parquet files, or from a data set of the `datasets` package."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from fedcore.errors import ConfigError, InvalidInput

Row = Mapping[str, str]

SUFFIXES: Final = (".jsonl", ".csv", ".parquet")


def read_files(path: Path, columns: Sequence[str]) -> list[list[Row]]:
    """Return the rows of each file.

    Args:
        path: a file, or a folder whose files with one of `SUFFIXES` are read in the order of their names.
        columns: what is kept of each row; every row must have them. Numbers become text.

    Raises:
        InvalidInput: there is nothing to read, a file is malformed, or a row lacks a column.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(f"{path}: no file with one of {', '.join(SUFFIXES)}")
    return [list(_checked(_read(file, columns), columns, str(file))) for file in files]


def read_dataset(name: str, config: str | None, split: str, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a split of a data set that `datasets.load_dataset` finds by `name`.

    Raises:
        ConfigError: `datasets` is not installed.
        InvalidInput: there is no such data set, configuration, split or column.
    """
    if find_spec("datasets") is None:
        raise ConfigError(f"--data dataset={name} needs the package datasets: pip install 'roundtable[datasets]'")
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"data set {name}: {error}") from error
    lacking = [column for column in columns if column not in found.column_names]
    if lacking:
        raise _lacks(f"data set {name}", lacking[0], found.column_names)
    return list(_checked(found.select_columns(list(columns)), columns, f"data set {name}"))


def _read(file: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as lines:
                yield from csv.DictReader(lines, strict=True)
        elif file.suffix == ".parquet":
            yield from _read_parquet(file, columns)
        else:
            raise InvalidInput(f"{file}: known are files with {', '.join(SUFFIXES)}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise InvalidInput(f"{file}: cannot be read: {error}") from error


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    if find_spec("pyarrow") is None:
        raise ConfigError(f"{file}: Parquet needs the package pyarrow: pip install 'roundtable[hf]'")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            known = table.schema_arrow.names
            lacking = [column for column in columns if column not in known]
            if lacking:
                raise _lacks(str(file), lacking[0], known)
            for batch in table.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise InvalidInput(f"{file}: cannot be read: {error}") from error


def _checked(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], where: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise InvalidInput(f"{where}: row {number}: is {type(row).__name__}, not an object with columns")
        values: dict[str, str] = {}
        for column in columns:
            if column not in row:
                raise _lacks(f"{where}: row {number}", column, row)
            value = row[column]
            if not isinstance(value, str | int | float):
                raise InvalidInput(f"{where}: row {number}: column {column!r} is {type(value).__name__}, not text")
            values[column] = str(value)
        yield values


def _lacks(where: str, column: str, known: Iterable[object]) -> InvalidInput:
    return InvalidInput(f"{where}: has no column {column!r}; it has: {', '.join(map(str, known))}")

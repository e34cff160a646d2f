"""The picture of the rounds."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import ConfigError, StorageFailed
from fedserver.export import plot
from fedserver.export.plot import plot_history, plot_png
from tests.support.exports import LORA, make_history, make_state


def history(version: int, **kwargs: Any) -> list[dict[str, Any]]:
    return make_history(make_state(LORA), version, **kwargs)


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def test_picture_has_a_panel_for_each_metric_and_one_for_bytes(tmp_path: Path) -> None:
    plot_history(history(30), tmp_path / "rounds.png")
    width, height = size((tmp_path / "rounds.png").read_bytes())
    assert size(plot_png(history(30, measured=False))) < (width, height)


def test_same_history_gives_the_same_picture() -> None:
    assert plot_png(history(3)) == plot_png(history(3))


@pytest.mark.parametrize("rows", [[], history(0), history(0, measured=False), history(300)])
def test_any_length_can_be_drawn(rows: list[dict[str, Any]]) -> None:
    assert size(plot_png(rows))


def test_metric_names_are_not_taken_for_formulas() -> None:
    rows = history(2)
    for row in rows:
        row["evaluation"] = {r"$\broken{": 1.0}
    assert size(plot_png(rows))


def test_figures_of_any_size_can_be_drawn() -> None:
    rows = history(3)
    for row, value in zip(rows, (float("nan"), float("inf"), 1e300, -1e300), strict=True):
        row["evaluation"] = {"accuracy": value, "loss": 0.0}
    assert size(plot_png(rows))


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed \(pip install 'roundtable\[plot\]'\)"):
        plot_history(history(2), tmp_path / "rounds.png")


def test_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"^cannot write .*: No such file or directory$"):
        plot_history(history(1), tmp_path / "missing" / "rounds.png")

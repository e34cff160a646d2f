from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.logs import configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


log = logging.getLogger("fedserver.rounds")


def objects(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_file_gets_one_json_object_a_line() -> None:
    stream = io.StringIO()
    configure("info", stream)
    before = datetime.now(UTC)
    log.info("round closed", extra={"job": "digits", "version": 3, "round_s": 1.25})
    log.warning("line one\nline two")
    first, second = objects(stream)
    assert list(first) == ["ts", "level", "logger", "event", "job", "version", "round_s"]
    assert first["level"] == "info"
    assert first["logger"] == "fedserver.rounds"
    assert first["event"] == "round closed"
    assert (first["job"], first["version"], first["round_s"]) == ("digits", 3, 1.25)
    assert second["event"] == "line one\nline two"
    when = datetime.fromisoformat(str(first["ts"]))
    assert str(first["ts"]).endswith("Z")
    assert abs((when - before).total_seconds()) < 60


def test_a_terminal_gets_text_with_the_fields() -> None:
    stream = Terminal()
    configure("info", stream)
    log.info("round closed", extra={"job": "digits", "reason": "two words", "round_s": 1.23456789})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('INFO    fedserver.rounds: round closed job=digits reason="two words" round_s=1.23457')


@pytest.mark.parametrize(("log_format", "is_json"), [("json", True), ("text", False)])
def test_a_chosen_format_wins_over_the_kind_of_stream(log_format: str, is_json: bool) -> None:
    stream = Terminal() if is_json else io.StringIO()
    configure("info", stream, log_format)
    log.info("hello")
    assert stream.getvalue().startswith("{") is is_json


def test_standard_error_of_the_moment_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    log.info("hello")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["event"] == "hello"
    assert captured.out == ""


def test_an_exception_is_a_field_and_the_line_stays_one() -> None:
    stream = io.StringIO()
    configure("info", stream)
    try:
        raise ValueError("no such\nversion")
    except ValueError:
        log.exception("download failed", extra={"job": "digits"})
    (line,) = objects(stream)
    assert line["exception_type"] == "ValueError"
    assert "Traceback" in str(line["exception"])
    assert "no such\nversion" in str(line["exception"])


def test_text_indents_tracebacks() -> None:
    stream = io.StringIO()
    configure("info", stream, "text")
    try:
        raise ValueError("2026-03-01 ERROR forged\n2026-03-01 ERROR forged too")
    except ValueError:
        log.exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_text_from_a_peer_cannot_forge_lines_or_steer_the_terminal() -> None:
    stream = Terminal()
    configure("info", stream)
    log.info("declined", extra={"reason": "no\n2026 ERROR forged \x1b[2J\u2028\x9b1m"})
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    assert not any(character in text for character in "\x1b\x9b\u2028")


def test_values_that_json_lacks_become_text() -> None:
    stream = io.StringIO()
    configure("info", stream)
    extra = {"loss": math.nan, "path": Path("state"), "nested": {1: [math.inf, {"a"}]}, "raw": b"\xff", "gone": None}
    log.info("odd", extra=extra)
    (line,) = objects(stream)
    assert line["loss"] == "nan"
    assert line["path"] == "state"
    assert line["nested"] == {"1": ["inf", ["a"]]}
    assert line["raw"] == "b'\\xff'"
    assert line["gone"] is None


def test_lone_surrogates_do_not_break_an_ascii_stream() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    configure("info", stream)
    log.info("name", extra={"client": "\udcff ü"})
    stream.flush()
    assert json.loads(raw.getvalue())["client"] == "\udcff ü"


def test_a_field_never_overwrites_the_keys_of_the_line() -> None:
    stream = io.StringIO()
    configure("info", stream)
    log.info("real", extra={"event": "forged", "level": "debug"})
    (line,) = objects(stream)
    assert (line["event"], line["level"]) == ("real", "info")
    assert (line["event_"], line["level_"]) == ("forged", "debug")


def test_what_is_below_the_level_is_not_shown() -> None:
    stream = io.StringIO()
    configure("warning", stream)
    log.info("small talk")
    log.warning("trouble")
    assert [line["event"] for line in objects(stream)] == ["trouble"]


def test_configuring_again_replaces_the_handler_and_keeps_those_of_others() -> None:
    other = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(other)
    before = len(root.handlers)
    first, second = io.StringIO(), io.StringIO()
    configure("info", first)
    configure("info", second)
    log.info("hello")
    assert len(root.handlers) == before + 1
    assert other in root.handlers
    assert first.getvalue() == ""
    assert not first.closed
    assert len(objects(second)) == 1


@pytest.mark.parametrize(
    ("level", "log_format", "text"),
    [
        ("inof", "auto", "log level 'inof' is not one of debug, info, warning, error (did you mean 'info'?)"),
        ("info", "jsno", "log format 'jsno' is not one of auto, text, json (did you mean 'json'?)"),
    ],
)
def test_unknown_settings_name_the_known_ones(level: str, log_format: str, text: str) -> None:
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(ConfigError) as caught:
        configure(level, sys.stderr, log_format)
    assert str(caught.value) == text
    assert logging.getLogger().handlers == handlers

"""Structured logs: lines for people on a terminal, one JSON object a line for machines.

Modules log with the standard library alone, an event and its fields::

    _log = logging.getLogger(__name__)
    _log.info("round closed", extra={"job": job, "version": 3, "round_s": 1.25})

The event is constant text; what varies goes into `extra`, where it can be searched for. (The standard library
reserves some names there: `name`, `args`, `module`, `process`, `thread` and the other attributes of a LogRecord.)

As text::

    2026-03-01 12:00:00Z INFO    fedserver.rounds: round closed job=digits version=3 round_s=1.25

As JSON, keys always in this order, the fields in the order of `extra`::

    {"ts": "2026-03-01T12:00:00.000000Z", "level": "info", "logger": "fedserver.rounds", "event": "round closed",
     "job": "digits", "version": 3, "round_s": 1.25}

An exception adds `exception` (the traceback as text) and `exception_type`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, Literal, TextIO, get_args

from fedcore.errors import ConfigError
from fedcore.names import nearest

LogFormat = Literal["auto", "text", "json"]

LEVELS: Final = ("debug", "info", "warning", "error")
_RECORD_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}
_OURS: Final = frozenset({"ts", "level", "logger", "event", "exception", "exception_type", "stack"})
# Names and reasons come from peers too: none may start a line of its own or steer a terminal.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN: Final = re.compile(r"[^\s\"'=]+")


def configure(level: str = "info", stream: TextIO | None = None, log_format: str = "auto") -> None:
    """Send everything that is logged to `stream`.

    Takes the place of what an earlier call installed; handlers of others on the root logger stay. The stream is
    not closed, neither now nor later. Call it once, at the start of a command.

    Args:
        level: the least that is shown, one of `LEVELS`.
        stream: standard error by default, as it is at the time of the call.
        log_format: `text`, `json`, or `auto`: text if the stream is a terminal, else JSON.

    Raises:
        ConfigError: an unknown level or format.
    """
    _check("log level", level, LEVELS)
    _check("log format", log_format, get_args(LogFormat))
    chosen_stream = sys.stderr if stream is None else stream
    as_text = log_format == "text" or (log_format == "auto" and chosen_stream.isatty())
    handler = _Handler(chosen_stream)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(earlier)
        earlier.close()
    root.addHandler(handler)
    root.setLevel(level.upper())


class _Handler(logging.StreamHandler[TextIO]):
    """Tells our handler from those of others."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        line: dict[str, object] = {
            "ts": _time(record).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line[f"{name}_" if name in _OURS else name] = _jsonable(value)
        if record.exc_info and record.exc_info[0] is not None:
            line["exception_type"] = record.exc_info[0].__name__
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """One line an event; tracebacks follow, indented, so that no line of theirs passes for an event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines without the last one's end."""
        when = _time(record).strftime("%Y-%m-%d %H:%M:%SZ")
        fields = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        text = _escape(f"{when} {record.levelname:<7} {record.name}: {record.getMessage()}{fields}")
        below = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        if record.stack_info:
            below.append(record.stack_info)
        return "\n".join([text, *(f"    {_escape(line)}" for part in below for line in part.split("\n"))])


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        guess = nearest(value, known)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        raise ConfigError(f"{what} {value!r} is not one of {', '.join(known)}{hint}")


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _RECORD_ATTRIBUTES}


def _escape(text: str) -> str:
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def _word(value: object) -> str:
    """Return a value as one word, quoted where it would otherwise be read as several."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _jsonable(value: object) -> object:
    """Return `value` as JSON has it; what JSON lacks (NaN, bytes, paths, any object) becomes text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    return str(value)

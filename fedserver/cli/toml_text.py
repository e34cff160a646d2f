"""A job as the text of a job file, every default written out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(tree: Mapping[str, Mapping[str, JsonValue] | None]) -> str:
    """Return sections of settings as TOML that `tomllib` reads back to the same tree, without what is None."""
    sections = []
    for section, settings in tree.items():
        if settings is None:
            continue
        lines = [f"{_key(key)} = {_value(value)}" for key, value in settings.items() if value is not None]
        sections.append("\n".join([f"[{_key(section)}]", *lines]))
    return "\n\n".join(sections)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # JSON's escapes are TOML's too, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: JsonValue) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    return json.dumps(value)

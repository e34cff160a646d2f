"""Text that others wrote, made safe inside Markdown and YAML.

Job files and clients are not trusted to leave a page's structure alone: nothing of theirs may become a heading, a
table cell, a link, HTML, or a key of the front matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Final

_JOINERS: Final = "\u200c\u200d"  # not "printable", but some scripts need them
_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;"}
_SPECIAL: Final = re.compile(r"[&<>|\\`*\[\]#~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BLOCK_START: Final = re.compile(r"^(\d{0,9})([-+=.)])")
_PLAIN: Final = re.compile(r"[^`|\\\s](?:[^`|\\]*[^`|\\\s])?")


def line(text: str) -> str:
    """Return `text` on one line: what cannot be printed becomes a space, runs of white space become one."""
    return " ".join("".join(c if c.isprintable() or c in _JOINERS else " " for c in text).split())


def escaped(text: str) -> str:
    """Return Markdown, on one line, that shows `text` literally: in a paragraph, a heading or a table cell."""
    inner = _SPECIAL.sub(lambda match: _ENTITIES.get(match.group(), "\\" + match.group()), line(text))
    return _BLOCK_START.sub(r"\1\\\2", inner)


def paragraphs(text: str) -> list[str]:
    """Return each paragraph of `text` escaped; blank lines part them."""
    return [escaped(part) for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")) if line(part)]


def code(text: str) -> str:
    """Return `text` as a code span where that shows it as it is, otherwise escaped."""
    return f"`{text}`" if _PLAIN.fullmatch(text) and line(text) == text else escaped(text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table of cells that are Markdown already."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def yaml_text(text: str) -> str:
    """Return `text`, on one line, as a double-quoted YAML scalar; JSON's strings are that."""
    return json.dumps(line(text), ensure_ascii=False)

"""The one pattern for every name that crosses the wire or becomes part of a file name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from fedcore.errors import InvalidInput

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it is one.

    Raises:
        InvalidInput: it is not; the text shows the value cut to 80 characters and the pattern.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidInput(
            f"{what} {name[:80]!r} is not valid: 1 to 64 of A-Z a-z 0-9 . _ - and not starting with . _ or -"
        )
    return name


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the entry of `known` that somebody who wrote `word` probably meant."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None

"""The C library's memory allocator, set so that the server's memory has a bound."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_M_ARENA_MAX: Final = -8  # <malloc.h>


def use_one_arena() -> None:
    """Let all threads allocate from one arena; to be called before there are any.

    By default the GNU C library gives threads arenas of their own, and what one thread has freed is of no use to
    another one: with many uploads at once a third of the memory is such leftovers. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)

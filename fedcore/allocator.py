"""The C library's memory allocator, set for programs that take and give back megabytes all the time.

To be called before there are threads. With another library than GNU's nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

# <malloc.h>
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

KEPT_BYTES: Final = 32 << 20
"""The library takes no larger `M_MMAP_THRESHOLD`."""


def keep_memory() -> None:
    """Keep up to `KEPT_BYTES` of what was freed.

    A chunk of a megabyte lies in a few buffers on its way. By default what lies at the end of the heap is given back at
    once, and the system clears each page when it is asked for it again: a tenth of the processor time of a round.
    """
    _set(_M_MMAP_THRESHOLD, KEPT_BYTES)
    _set(_M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def use_one_arena() -> None:
    """Let all threads allocate from one arena.

    By default threads have arenas of their own, and what one thread has freed is of no use to another one: with many
    uploads at once a third of the memory is such leftovers.
    """
    _set(_M_ARENA_MAX, 1)


def _set(parameter: int, value: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(parameter, value)

"""Canonical Huffman codes. Huffman: A Method for the Construction of Minimum-Redundancy Codes, 1952."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from fedcodec.base import LOSSLESS, Codes, Kind, Traits
from fedcodec.bits import pack, packed_bytes, unpack
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.plugin import Plugin

MAX_LENGTH: Final = 15
RUN_CODES: Final = 1024
"""Codes after which a decoder may start anew: it takes a step in all runs at once."""
RUN_BITS: Final = 14
"""Bits of the length of a run: 15 · 1024 is below 2^14."""

_CHUNK: Final = 1 << 16
"""Codes encoded or counted at once; a multiple of `RUN_CODES`."""
_RUNS: Final = 1 << 12
"""Runs decoded at once: where each stands fits a core's cache."""
_FEW_RUNS: Final = 32
"""Up to so many runs are decoded code by code: a step in all of them at once costs as much as so many codes."""
_GROUP: Final = 32
_GROUP_BYTES: Final = (7 + MAX_LENGTH * _GROUP + 7) // 8
"""Codes decoded from one number, which is slow to shift if it is long, and its bytes."""
_STEPS: Final = 3
"""Codes for which one look into the bytes is enough: 64 − 7 bits hold three of at most 15."""
_OVERRUN_BYTES: Final = MAX_LENGTH * RUN_CODES // 8 + 8
"""How far a run may read beyond its end: it may be the last, and shorter than the others, or a lie."""

_REVERSED: Final = np.array([int(f"{number:015b}"[::-1], 2) for number in range(1 << MAX_LENGTH)], dtype=np.int64)
"""Each number of `MAX_LENGTH` bits with its bits in reverse."""

Lengths = npt.NDArray[np.uint8]
"""By symbol: bits of its code; 0: it does not occur."""
_Found = npt.NDArray[np.uint16]
"""Symbols in the lower 8 bits, above them the lengths of their codes."""


class Huffman(Plugin):
    """Few bits for frequent codes, up to 15 for rare ones, the fewest in sum; a code that stands alone takes none."""

    name: ClassVar[str] = "huffman"
    wire_id: ClassVar[int] = 51
    kind: ClassVar[Kind] = "symbols"
    traits: ClassVar[Traits] = LOSSLESS
    max_codes: ClassVar[int] = 256
    streams: ClassVar[bool] = False

    def encode(self, codes_n: Codes, num_codes: int) -> bytes | memoryview:
        """See `SymbolCoder.encode`."""
        counts = _count(codes_n, num_codes)
        lengths = code_lengths(counts)
        head = bytes(pack(lengths, 4))
        if np.count_nonzero(lengths) < 2:
            return head
        run_bits, bits = _write(codes_n, lengths, int(counts @ lengths))
        return b"".join((head, pack(run_bits, RUN_BITS), bits))

    def max_bytes(self, count: int, num_codes: int) -> int:
        """See `SymbolCoder.max_bytes`: the best codes are never longer in sum than those of fixed width."""
        run_bytes = packed_bytes(-(-count // RUN_CODES), RUN_BITS)
        return packed_bytes(num_codes, 4) + run_bytes + packed_bytes(count, (num_codes - 1).bit_length())

    def decode(self, reader: Reader, count: int, num_codes: int) -> Codes:
        """See `SymbolCoder.decode`."""
        lengths: Lengths = unpack(reader.take(packed_bytes(num_codes, 4), "code lengths"), num_codes, 4, np.uint8)
        codes_n = self._read(reader, count, lengths)
        if not np.array_equal(code_lengths(_count(codes_n, num_codes)), lengths):
            raise FrameError("code lengths are not those of the codes that follow")
        return codes_n

    def _read(self, reader: Reader, count: int, lengths: Lengths) -> Codes:
        occurring = np.flatnonzero(lengths)
        if occurring.size < 2:
            # Whether there may be none, or one of this length, is seen from the codes.
            return np.full(count, occurring[0] if occurring.size else 0, dtype=np.uint8)
        filled = int(np.sum(1 << (MAX_LENGTH - lengths[occurring].astype(int))))
        if filled != 1 << MAX_LENGTH:
            raise FrameError(f"code lengths fill {filled} of {1 << MAX_LENGTH} (Kraft's sum)")
        num_runs = -(-count // RUN_CODES)
        run_bits = unpack(reader.take(packed_bytes(num_runs, RUN_BITS), "run lengths"), num_runs, RUN_BITS, np.uint16)
        num_bits = int(run_bits.sum(dtype=np.int64))
        if num_bits < count:
            raise FrameError(f"{count} codes of at least a bit in {num_bits} bits")
        data = reader.take(packed_bytes(num_bits, 1), "codes")
        if num_bits % 8 and data[-1] >> num_bits % 8:
            raise FrameError("bits behind the last code are not zero")
        return _read_runs(data, run_bits, lengths, count)


def code_lengths(counts: npt.NDArray[np.int64]) -> Lengths:
    """Return the code length of each symbol, at most `MAX_LENGTH`, such that counts · lengths is the least there is.

    Of several such codes it is the one with the least sum of lengths. Symbols in order of their counts, of equal ones
    the first, have lengths that do not grow.

    Args:
        counts: by symbol, how often it occurs; of one symbol alone the length is 1.
    """
    symbols = np.flatnonzero(counts)
    symbols = symbols[np.argsort(counts[symbols], kind="stable")]
    lengths = np.zeros(counts.size, dtype=np.uint8)
    if symbols.size < 2:
        lengths[symbols] = 1
        return lengths
    weights = counts[symbols]
    found = merged_lengths(weights.tolist())
    lengths[symbols] = found if found[0] <= MAX_LENGTH else package_merge(weights)
    return lengths


def merged_lengths(weights: list[int]) -> list[int]:
    """Return Huffman's lengths, without a limit, of two or more symbols in ascending order of their weights.

    The two lightest nodes become one, again and again. That one is the heaviest so far, so nodes wait in two queues
    (van Leeuwen: On the construction of Huffman trees, 1976). At equal weight symbols come first.

    That is as if each weight were larger by the same infinitesimal, and so is what `package_merge` does: nodes that are
    equal even then are trees of the same shape. So if the longest length is within the limit, both find the same.
    """
    num_symbols = len(weights)
    nodes, parents = weights.copy(), [0] * (2 * num_symbols - 1)
    symbol, node = 0, num_symbols
    for parent in range(num_symbols, 2 * num_symbols - 1):
        total = 0
        for _ in range(2):
            if symbol < num_symbols and (node == parent or nodes[symbol] <= nodes[node]):
                lightest, symbol = symbol, symbol + 1
            else:
                lightest, node = node, node + 1
            total += nodes[lightest]
            parents[lightest] = parent
        nodes.append(total)
    depths = [0] * len(nodes)
    for node in range(len(nodes) - 2, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return sorted(depths[:num_symbols], reverse=True)


def package_merge(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the lengths, at most `MAX_LENGTH`, of two or more symbols in ascending order of their weights.

    Larmore, Hirschberg: A Fast Algorithm for Optimal Length-Limited Huffman Codes, 1990: a list holds the symbols, and
    packages of two neighbours of the list before; at equal weight symbols come first. A symbol's length is in how many
    lists it is among those taken.
    """
    lengths = np.zeros(weights.size, dtype=np.uint8)
    lists = []
    packages = weights[:0]
    for _ in range(MAX_LENGTH):
        merged = np.concatenate((weights, packages))
        order = np.argsort(merged, kind="stable")
        lists.append(order < weights.size)
        merged = merged[order][: merged.size & ~1]
        packages = merged[::2] + merged[1::2]
    taken = 2 * weights.size - 2
    for is_symbol in reversed(lists):
        num_symbols = int(np.count_nonzero(is_symbol[:taken]))
        lengths[:num_symbols] += 1
        taken = 2 * (taken - num_symbols)
    return lengths


def _count(codes_n: Codes, num_codes: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(num_codes, dtype=np.int64)
    for start in range(0, codes_n.size, _CHUNK):
        counts += np.bincount(codes_n[start : start + _CHUNK], minlength=num_codes)
    return counts


def _in_order(lengths: Lengths) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the symbols in the order of their codes, shorter ones first, equal ones by symbol, and their lengths."""
    symbols = np.flatnonzero(lengths)
    sizes = lengths[symbols].astype(np.int64)
    order = np.argsort(sizes, kind="stable")
    return symbols[order], sizes[order]


def _words(lengths: Lengths) -> npt.NDArray[np.uint64]:
    """Return by symbol its bits, the first one lowest."""
    symbols, sizes = _in_order(lengths)
    shares = 1 << (MAX_LENGTH - sizes)
    words = np.zeros(lengths.size, dtype=np.uint64)
    words[symbols] = _REVERSED[np.cumsum(shares) - shares]
    return words


def _write(codes_n: Codes, lengths: Lengths, num_bits: int) -> tuple[npt.NDArray[np.uint16], memoryview]:
    """Return how many bits each run takes, and the bits of all."""
    words, sizes = _words(lengths), lengths.astype(np.int64)
    # By pair of symbols, 30 bits at most; two pairs are put together below.
    pair_words = (words[None, :] | words[:, None] << sizes.astype(np.uint64)[None, :]).ravel()
    pair_sizes = (sizes[None, :] + sizes[:, None]).ravel()
    run_bits = np.zeros(-(-codes_n.size // RUN_CODES), dtype=np.uint16)
    found = np.zeros(num_bits // 64 + 2, dtype="<u8")
    at = 0
    for start in range(0, codes_n.size, _CHUNK):
        chunk = codes_n[start : start + _CHUNK]
        first_run = start // RUN_CODES
        chunk_runs = np.add.reduceat(sizes[chunk], np.arange(0, chunk.size, RUN_CODES))
        run_bits[first_run : first_run + chunk_runs.size] = chunk_runs
        whole = chunk[: chunk.size & ~3].astype(np.int64).reshape(-1, 4)
        lower, upper = (whole[:, place] + whole[:, place + 1] * lengths.size for place in (0, 2))
        lower_sizes = pair_sizes[lower]
        tail = chunk[chunk.size & ~3 :]
        groups = pair_words[lower] | pair_words[upper] << lower_sizes.astype(np.uint64)
        group_words = np.concatenate((groups, words[tail]))
        group_sizes = np.concatenate((lower_sizes + pair_sizes[upper], sizes[tail]))
        ends = at + np.cumsum(group_sizes)
        starts = ends - group_sizes
        shifts = (starts & 63).astype(np.uint64)
        # Bits are disjoint, so adding puts them together. What goes over is shifted by up to 64: in two steps.
        np.add.at(found, starts >> 6, group_words << shifts)
        np.add.at(found, (starts >> 6) + 1, group_words >> np.uint64(1) >> (np.uint64(63) - shifts))
        at = int(ends[-1])
    return run_bits, found.data.cast("B")[: packed_bytes(num_bits, 1)]


def _read_runs(data: memoryview, run_bits: npt.NDArray[Any], lengths: Lengths, count: int) -> Codes:
    by_bits = _by_bits(lengths)
    if run_bits.size <= _FEW_RUNS:
        return _read_one_by_one(data, run_bits.tolist(), by_bits, count)
    return _read_together(data, run_bits, lengths, by_bits, count)


def _read_one_by_one(data: memoryview, run_bits: list[int], by_bits: _Found, count: int) -> Codes:
    symbols, sizes = by_bits.astype(np.uint8).tobytes(), (by_bits >> 8).astype(np.uint8).tobytes()
    mask = by_bits.size - 1
    codes = bytearray()
    end = 0
    for num_bits in run_bits:
        at, end = end, end + num_bits
        last = min(len(codes) + RUN_CODES, count)
        while len(codes) < last:
            window = int.from_bytes(data[at >> 3 : (at >> 3) + _GROUP_BYTES], "little") >> (at & 7)
            for _ in range(min(_GROUP, last - len(codes))):
                bits = window & mask
                codes.append(symbols[bits])
                used = sizes[bits]
                window >>= used
                at += used
        if at != end:
            raise FrameError("a run of codes does not end where its length says")
    return np.frombuffer(codes, dtype=np.uint8)


def _read_together(
    data: memoryview, run_bits: npt.NDArray[Any], lengths: Lengths, by_bits: _Found, count: int
) -> Codes:
    padded = np.zeros(len(data) + _OVERRUN_BYTES, dtype=np.uint8)
    padded[: len(data)] = data
    # The eight bytes from each byte on.
    windows = np.ndarray(padded.size - 7, dtype="<u8", buffer=padded, strides=(1,))
    mask = np.uint64(by_bits.size - 1)
    ends = np.cumsum(run_bits, dtype=np.int64)
    starts = ends - run_bits
    codes = np.empty((run_bits.size, RUN_CODES), dtype=np.uint8)
    for first in range(0, run_bits.size, _RUNS):
        at = starts[first : first + _RUNS].copy()
        steps = min(count - first * RUN_CODES, RUN_CODES)
        rows = np.empty((RUN_CODES, at.size), dtype=np.uint8)
        for step in range(0, steps, _STEPS):
            window = windows[at >> 3] >> (at & 7).astype(np.uint64)
            used = np.zeros(at.size, dtype=np.uint16)
            for row in rows[step : min(step + _STEPS, steps)]:
                found = by_bits[(window & mask).astype(np.int64)]
                row[:] = found & np.uint16(0xFF)
                found >>= np.uint16(8)
                window >>= found
                used += found
            at += used
        if first + at.size == run_bits.size:
            last = count - (run_bits.size - 1) * RUN_CODES
            at[-1] = starts[-1] + int(lengths[rows[:last, -1]].sum(dtype=np.int64))
        if not np.array_equal(at, ends[first : first + _RUNS]):
            raise FrameError("a run of codes does not end where its length says")
        codes[first : first + _RUNS] = rows.T
    return codes.ravel()[:count]


def _by_bits(lengths: Lengths) -> _Found:
    """Return by the next bits, as many as the longest code has, which symbol they begin with, and its length above."""
    symbols, sizes = _in_order(lengths)
    longest = int(sizes[-1])
    in_order = np.repeat((sizes << 8 | symbols).astype(np.uint16), 1 << (longest - sizes))
    found: _Found = in_order[_REVERSED[: 1 << longest] >> (MAX_LENGTH - longest)]
    return found

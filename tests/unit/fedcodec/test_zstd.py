"""Shuffled Zstandard against frames by hand (RFC 8878), a shuffle by transposition, and hostile frames."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from fedcodec import build_pipeline
from fedcodec.coders.zstd import MAX_WINDOW_BYTES, Zstd
from fedcore.errors import FrameError, InvalidInput

MAGIC = bytes.fromhex("28b52ffd")
WIDTHS = (1, 2, 4)


def block(content: bytes, *, last: bool = True) -> bytes:
    """Return a raw block (RFC 8878, 3.1.1.2)."""
    return (len(content) << 3 | last).to_bytes(3, "little") + content


def run(byte: int, size: int, *, last: bool = True) -> bytes:
    """Return a block of one byte `size` times."""
    return (size << 3 | 0b010 | last).to_bytes(3, "little") + bytes([byte])


def unpack(frame: bytes, max_bytes: int = 1 << 16, width: int = 1) -> bytes:
    return bytes(Zstd.configure({"width": width}).decompress(memoryview(frame), max_bytes))


def shuffled(data: bytes, width: int) -> bytes:
    words = len(data) // width
    return b"".join(bytes(data[place : words * width : width]) for place in range(width)) + data[words * width :]


@given(data=st.binary(max_size=300), width=st.sampled_from(WIDTHS), level=st.sampled_from([1, 3, 19]))
def test_content_is_the_shuffled_bytes_and_comes_back(data: bytes, width: int, level: int) -> None:
    zstd = Zstd.configure({"width": width, "level": level})
    frame = zstd.compress(data)
    assert len(frame) <= zstd.max_bytes(len(data))
    assert zstandard.ZstdDecompressor().decompress(frame) == shuffled(data, width)
    assert zstd.decompress(memoryview(frame), len(data)) == data


@pytest.mark.parametrize("num_bytes", [(1 << 16) - 1, (1 << 16) + 255, (1 << 16) + 256, (1 << 20) + 3, (9 << 20) + 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_many_blocks_come_back(num_bytes: int, width: int) -> None:
    data = np.random.default_rng(0).integers(0, 20, num_bytes, dtype=np.uint8).tobytes()
    zstd = Zstd.configure({"width": width})
    frame = zstd.compress(data)
    assert zstandard.ZstdDecompressor().decompress(frame) == shuffled(data, width)
    assert zstd.decompress(memoryview(frame), num_bytes) == data


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, (1 << 17) - 1, 1 << 17, 1 << 20])
def test_what_cannot_be_compressed_keeps_within_the_bound(num_bytes: int) -> None:
    data = np.random.default_rng(0).bytes(num_bytes)
    assert len(Zstd().compress(data)) <= Zstd().max_bytes(num_bytes)


def test_bound_is_monotonic() -> None:
    bounds = [Zstd().max_bytes(num_bytes) for num_bytes in range((1 << 17) + 5000)]
    assert bounds == sorted(bounds)


def test_every_level_keeps_within_the_window() -> None:
    windows = [zstandard.ZstdCompressionParameters.from_level(level, source_size=1 << 40) for level in range(1, 20)]
    assert max(1 << window.window_log for window in windows) == MAX_WINDOW_BYTES


def test_floats_get_shorter_by_shuffling() -> None:
    data = (np.random.default_rng(0).standard_normal(1 << 20) * 1e-2).astype(np.float32).tobytes()
    assert len(Zstd().compress(data)) < 0.95 * len(Zstd.configure({"width": 1}).compress(data))


@pytest.mark.parametrize(
    "params", [{"level": 0}, {"level": 20}, {"width": 0}, {"width": 3}, {"width": 8}, {"level": 1.5}]
)
def test_parameters_have_bounds(params: dict[str, JsonValue]) -> None:
    with pytest.raises(InvalidInput):
        Zstd.configure(params)


def test_frames_by_hand_are_read() -> None:
    assert unpack(MAGIC + b"\x20\x03" + block(b"abc")) == b"abc"
    assert unpack(MAGIC + b"\x20\x07" + run(0x61, 4, last=False) + block(b"bcd")) == b"aaaabcd"
    assert unpack(MAGIC + b"\x60\x00\x00" + run(1, 256)) == b"\1" * 256
    assert unpack(MAGIC + b"\x20\x07" + block(b"ADBECFG"), width=2) == b"AEDCBFG"
    assert unpack(MAGIC + b"\x20\x00" + block(b"")) == b""
    # A window of 8 MiB beside the size.
    assert unpack(MAGIC + b"\x40\x68\x00\x00" + run(1, 256)) == b"\1" * 256


FRAMES = {
    "empty": b"",
    "other magic": b"\x27" + MAGIC[1:] + b"\x20\x03" + block(b"abc"),
    "skippable": bytes.fromhex("502a4d18 03000000") + b"abc",
    "skippable that looks like a header": bytes.fromhex("502a4d18 20030000") + bytes(0x320),
    "skippable before": bytes.fromhex("502a4d18 00000000") + MAGIC + b"\x20\x03" + block(b"abc"),
    "skippable after": MAGIC + b"\x20\x03" + block(b"abc") + bytes.fromhex("502a4d18 00000000"),
    "legacy": bytes.fromhex("27b52ffd") + bytes(20),
    "no content size": MAGIC + b"\x00\x68" + block(b"abc"),
    "checksum": MAGIC + b"\x24\x03" + block(b"abc") + bytes(4),
    "dictionary": MAGIC + b"\x21\x07\x03" + block(b"abc"),
    "dictionary of 4 bytes": MAGIC + b"\x23\x07\0\0\0\x03" + block(b"abc"),
    "reserved bit": MAGIC + b"\x28\x03" + block(b"abc"),
    "unused bit": MAGIC + b"\x30\x03" + block(b"abc"),
    "size in too many bytes": MAGIC + b"\xa0\x03\0\0\0" + block(b"abc"),
    "size in too many bytes, window": MAGIC + b"\x80\x68\x00\x01\0\0" + run(1, 256),
    "size in 8 bytes": MAGIC + b"\xe0" + (1 << 16).to_bytes(8, "little") + run(1, 1 << 16),
    "trailing byte": MAGIC + b"\x20\x03" + block(b"abc") + b"\0",
    "two frames": 2 * (MAGIC + b"\x20\x03" + block(b"abc")),
    "second frame empty": MAGIC + b"\x20\x03" + block(b"abc") + MAGIC + b"\x20\x00" + block(b""),
    "empty and more": MAGIC + b"\x20\x00" + block(b"") + b"\0",
    "empty with content": MAGIC + b"\x20\x00" + block(b"abc"),
    "empty without a block": MAGIC + b"\x20\x00",
    "too much content": MAGIC + b"\x20\x03" + block(b"abcd"),
    "too little content": MAGIC + b"\x20\x05" + block(b"abcd"),
    "no last block": MAGIC + b"\x20\x03" + block(b"abc", last=False),
    "reserved block type": MAGIC + b"\x20\x03" + (3 << 3 | 0b111).to_bytes(3, "little") + b"abc",
    "window above 8 MiB": MAGIC + b"\x40\x69\x00\x00" + run(1, 256),
    "largest window": MAGIC + b"\x40\xff\x00\x00" + run(1, 256),
}


@pytest.mark.parametrize("what", FRAMES)
def test_frames_that_are_not_ours_are_refused(what: str) -> None:
    with pytest.raises(FrameError):
        unpack(FRAMES[what])


def test_dictionary_of_another_is_refused() -> None:
    words = zstandard.ZstdCompressionDict(b"federated learning " * 20, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    frame = zstandard.ZstdCompressor(dict_data=words).compress(b"federated learning " * 3)
    with pytest.raises(FrameError):
        unpack(frame)


def test_content_above_the_bound_is_refused() -> None:
    frame = Zstd().compress(bytes(1000))
    assert unpack(frame, 1000, 4) == bytes(1000)
    with pytest.raises(FrameError, match="1000 bytes, at most 999"):
        unpack(frame, 999, 4)


@given(data=st.data())
def test_one_flipped_bit_gives_bytes_within_the_bound_or_a_frame_error(data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=200) | st.binary(max_size=4).map(lambda part: part * 100))
    frame = bytearray(Zstd().compress(content))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    try:
        found = Zstd().decompress(memoryview(bytes(frame)), 500)
    except FrameError:
        return
    assert len(found) <= 500


@pytest.mark.parametrize("num_bytes", [0, 5, 400, 200_000])
def test_every_truncation_is_refused(num_bytes: int) -> None:
    frame = Zstd().compress(np.random.default_rng(0).integers(0, 4, num_bytes, dtype=np.uint8).tobytes())
    step = max(1, len(frame) // 500)
    for end in range(0, len(frame), step):
        with pytest.raises(FrameError):
            unpack(frame[:end], num_bytes)


BOMBS = {
    # What the header says, and so what would be allocated: 1 TiB, 4 GiB of zeros, a window of 3.75 TiB.
    "declared": MAGIC + b"\xe0" + (1 << 40).to_bytes(8, "little") + run(0, 1 << 17),
    "declared beside a window": MAGIC + b"\xc0\x68" + (1 << 40).to_bytes(8, "little") + run(0, 1 << 17),
    "zeros": MAGIC
    + b"\xc0\x68"
    + (1 << 32).to_bytes(8, "little")
    + run(0, 1 << 17, last=False) * ((1 << 15) - 1)
    + run(0, 1 << 17),
    "undeclared": MAGIC + b"\x00\x68" + run(0, 1 << 17, last=False) * ((1 << 15) - 1) + run(0, 1 << 17),
    "window": MAGIC + b"\x40\xff\x00\x00" + run(0, 1 << 8),
    "single segment": MAGIC + b"\xa0" + (1 << 26).to_bytes(4, "little") + run(0, 1 << 17, last=False) * 511,
    # Within all bounds but the promise: little is declared, and much comes.
    "more than declared": MAGIC + b"\x20\x05" + run(0, 1 << 17, last=False) * 9999 + run(0, 1 << 17),
    "cut short": MAGIC + b"\x40\x68\x00\x00" + run(0, 1 << 7, last=False),
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_refused_in_little_memory(what: str) -> None:
    """The peak of the whole process, the library's own memory too, which Python does not trace."""
    program = textwrap.dedent(
        """
        import re, sys
        from fedcodec.coders.zstd import Zstd
        from fedcore.errors import FrameError

        def peak_kib():
            return int(re.search(r"VmPeak:\\s+(\\d+)", open("/proc/self/status").read())[1])

        frame = memoryview(sys.stdin.buffer.read())
        Zstd().decompress(memoryview(Zstd().compress(bytes(1 << 16))), 1 << 16)
        before = peak_kib()
        try:
            Zstd().decompress(frame, 1 << 30)
            print("decoded", end=" ")
        except FrameError:
            print("refused", end=" ")
        print(peak_kib() - before)
        """
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=BOMBS[what],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ).stdout.split()
    assert found[0] == b"refused"
    assert int(found[1]) < 20 << 10  # 20 MiB: two windows of 8 MiB and some


def test_frame_whose_content_is_above_what_the_stages_make_is_refused() -> None:
    pipeline = build_pipeline([{"codec": "zstd"}])
    values = np.zeros(1000, np.float32)
    frame = pipeline.encode(values, np.random.default_rng(0))
    header = frame[: frame.index(MAGIC)]
    assert pipeline.decode(frame, 1000).tobytes() == values.tobytes()
    for num_bytes in (3999, 4001, 1 << 20):
        with pytest.raises(FrameError):
            pipeline.decode(header + Zstd().compress(bytes(num_bytes)), 1000)

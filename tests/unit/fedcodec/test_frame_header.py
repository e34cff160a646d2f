from __future__ import annotations

import pytest

from fedcodec.frame import MAX_STAGES, open_frame, pack_header


@pytest.mark.parametrize("wire_ids", [[1], [1, 2], [65535] * MAX_STAGES])
def test_header_opens_to_its_payload(wire_ids: list[int]) -> None:
    header = pack_header(wire_ids, 1 << 36)
    reader = open_frame(header + b"payload", wire_ids, 1 << 36)
    assert bytes(reader.take(reader.left, "payload")) == b"payload"


@pytest.mark.parametrize(
    ("wire_ids", "num_values"),
    [([], 1), ([1] * (MAX_STAGES + 1), 1), ([0], 1), ([65536], 1), ([1], 0), ([1], (1 << 36) + 1)],
)
def test_header_says_nothing_that_a_reader_would_refuse(wire_ids: list[int], num_values: int) -> None:
    with pytest.raises(ValueError, match="1 to"):
        pack_header(wire_ids, num_values)

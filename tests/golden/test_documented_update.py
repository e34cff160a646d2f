"""The worked example of proto/README.md, recomputed: who writes a client from that page gets these bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.updates import update_id_of
from fedcodec import build_pipeline
from fedcore.identity import sign, verify
from fedcore.layout import Layout
from fedcore.messages import SIGNATURE_CONTEXT, UpdateHeader
from fedcore.rng import stream

TEXT = (Path(__file__).resolve().parents[2] / "proto" / "README.md").read_text(encoding="utf-8")
EXAMPLE = TEXT.partition("### Worked example")[2]
LAYOUT, HEADER = (block.encode("ascii") for block in re.findall(r"```json\n(.*)\n```", EXAMPLE))
FRAME, SIGNED_HEAD, SIGNATURE = (bytes.fromhex(block) for block in re.findall(r"```hex\n(.*)\n```", EXAMPLE))
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def test_the_layout_has_the_digest_that_is_shown() -> None:
    layout = Layout.from_json(LAYOUT)
    assert layout.to_json() == LAYOUT
    assert f"`{layout.digest}`" in EXAMPLE
    assert UpdateHeader.from_bytes(HEADER).layout_digest == layout.digest


def test_the_values_give_the_frame_that_is_shown() -> None:
    values_D = np.array([1.5, -0.0, 3.14159, -0.25], dtype=np.float32)
    assert build_pipeline([{"codec": "bf16"}]).encode(values_D, stream(0)) == FRAME


def test_the_header_is_canonical_and_describes_the_frame() -> None:
    header = UpdateHeader.from_bytes(HEADER)
    assert header.to_bytes() == HEADER
    assert (header.frame_bytes, header.frame_digest) == (len(FRAME), hashlib.sha256(FRAME).hexdigest())
    assert header.update_id == update_id_of(header.assignment_id)
    assert f"Header, {len(HEADER)} bytes" in EXAMPLE


def test_every_key_of_the_header_is_documented() -> None:
    table = TEXT.partition("### Header")[2].partition("### Signature")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(UpdateHeader.model_fields)


def test_the_signature_is_the_one_that_is_shown() -> None:
    public_key = KEY.public_key().public_bytes_raw()
    assert f"`{public_key.hex()}`" in EXAMPLE
    assert sign(KEY, SIGNATURE_CONTEXT, HEADER) == SIGNATURE
    verify(public_key, SIGNATURE_CONTEXT, HEADER, SIGNATURE)
    KEY.public_key().verify(SIGNATURE, SIGNED_HEAD + HEADER)

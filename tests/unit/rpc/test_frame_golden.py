"""The codec against the vectors that the Rust codec is held to as well."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs3.core.errors import Fs3Error
from fs3.rpc import frame
from fs3.rpc.crc import crc32c_36, crc32c_36_tables, crc32c_any
from fs3.v1.frame_pb2 import Code

VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "frames.json").read_text())
LIMITS = {"authenticated": frame.LIMITS, "unauthenticated": frame.UNAUTHENTICATED_LIMITS}


def limits(vector: dict[str, Any]) -> frame.Limits:
    return LIMITS[vector.get("limits", "authenticated")]


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" not in v], ids=lambda v: v["name"])
def test_golden_frames_decode_and_encode_to_the_same_bytes(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    header = frame.decode_header(data, 0, limits(vector))
    expected = {k: v for k, v in vector["header"].items() if k in frame.Header._fields}
    assert header._asdict() == expected
    body_end = frame.HEADER_BYTES + header.body_bytes
    assert data[frame.HEADER_BYTES : body_end].hex() == vector["body_hex"]
    assert data[body_end:].hex() == vector["payload_hex"]
    assert header.frame_bytes == len(data)
    assert frame.encode_header(header) == data[: frame.HEADER_BYTES]


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" in v], ids=lambda v: v["name"])
def test_golden_refusals_are_refused_with_their_code(vector: dict[str, Any]) -> None:
    with pytest.raises(Fs3Error) as refused:
        frame.decode_header(bytes.fromhex(vector["hex"]), 0, limits(vector))
    assert Code.Name(refused.value.code) == vector["error"]  # type: ignore[arg-type]


def test_crc32c_is_castagnoli_and_the_fast_form_agrees() -> None:
    assert crc32c_any(b"123456789") == 0xE3069283
    for _ in range(200):
        data = os.urandom(36)
        assert crc32c_36_tables(data) == crc32c_any(data) == crc32c_36(data)


@given(st.binary(min_size=frame.HEADER_BYTES, max_size=frame.HEADER_BYTES))
def test_no_40_bytes_do_anything_but_decode_or_be_refused(data: bytes) -> None:
    try:
        header = frame.decode_header(data)
    except Fs3Error as exc:
        assert exc.code in (Code.CODE_PROTOCOL, Code.CODE_MESSAGE_TOO_BIG)  # noqa: PT017
    else:
        assert frame.encode_header(header) == data


@given(st.data())
def test_any_flipped_bit_of_a_header_is_noticed(data: st.DataObject) -> None:
    header = frame.Header(1, data.draw(st.integers(0, 2**64 - 1)), 256, 0, 5000, 100, 200)
    good = bytearray(frame.encode_header(header))
    bit = data.draw(st.integers(0, frame.HEADER_BYTES * 8 - 1))
    good[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Fs3Error):
        frame.decode_header(good)

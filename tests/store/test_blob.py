"""The envelope of bytes at rest: what goes in comes out, whatever was damaged does not."""

from __future__ import annotations

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nested_runtime.errors import StateError
from nested_runtime.store.blob import pack, unpack


@given(st.binary(max_size=500), st.binary(max_size=40))
def test_round_trip(raw: bytes, context: bytes) -> None:
    assert unpack(pack(raw, context), context, max_bytes=500) == raw


@given(st.binary(max_size=200), st.integers(0), st.integers(1, 255))
def test_every_changed_byte_is_found(raw: bytes, position: int, change: int) -> None:
    packed = bytearray(pack(raw, b"me"))
    packed[position % len(packed)] ^= change
    with pytest.raises(StateError):
        unpack(bytes(packed), b"me", max_bytes=200)


@given(st.binary(max_size=200), st.integers(0))
def test_every_truncation_is_found(raw: bytes, length: int) -> None:
    packed = pack(raw, b"me")
    with pytest.raises(StateError):
        unpack(packed[: length % len(packed)], b"me", max_bytes=200)
    with pytest.raises(StateError):
        unpack(packed + b"x", b"me", max_bytes=200)


def test_another_session_s_bytes_are_refused() -> None:
    with pytest.raises(StateError, match="of another session"):
        unpack(pack(b"state", b"alice"), b"bob", max_bytes=10)


def test_size_is_bounded_before_memory_is_used() -> None:
    bomb = pack(bytes(50_000_000), b"me")
    assert len(bomb) < 50_000
    with pytest.raises(StateError, match="over the limit of 1000000"):
        unpack(bomb, b"me", max_bytes=1_000_000)


def test_a_lying_header_is_refused() -> None:
    """A frame that holds more than its header says, with a checksum that fits."""
    from nested_runtime.store import blob

    payload = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5_000_000))
    for size in (10, 999_999, 5_000_000):
        packed = struct.pack("<3sBQ32s", b"NRB", 1, size, blob._checksum(b"me", size, payload)) + payload
        with pytest.raises(StateError):
            unpack(packed, b"me", max_bytes=1_000_000)

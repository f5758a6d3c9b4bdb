"""The envelope of bytes at rest: what goes in comes out, whatever was damaged does not."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nested_runtime.errors import StateError
from nested_runtime.store import blob, planes
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


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("says_its_size", [False, True])
def test_a_lying_header_is_refused(version: int, says_its_size: bool) -> None:
    """A frame that holds more than its header says, or does not say how much, with a checksum that fits."""
    payload = zstandard.ZstdCompressor(write_content_size=says_its_size).compress(bytes(5_000_000))
    for size in (10, 999_999, 5_000_000):
        checksum = blob._checksum(version, b"me", size, payload)
        packed = struct.pack("<3sBQ32s", b"NRB", version, size, checksum) + payload
        with pytest.raises(StateError):
            unpack(packed, b"me", max_bytes=1_000_000)


def test_an_older_release_s_bytes_are_read() -> None:
    raw = bytes(range(256)) * 5
    payload = zstandard.ZstdCompressor(level=1).compress(raw)
    digest = hashlib.sha256(struct.pack("<QQ", 2, len(raw)) + b"me" + payload).digest()
    assert unpack(struct.pack("<3sBQ32s", b"NRB", 1, len(raw), digest) + payload, b"me", max_bytes=2_000) == raw


def test_a_version_never_written_is_refused() -> None:
    packed = bytearray(pack(b"state", b"me"))
    packed[3] = 3
    with pytest.raises(StateError, match="a newer release"):
        unpack(bytes(packed), b"me", max_bytes=10)


@given(st.binary(max_size=70))
def test_planes_join_what_they_split(raw: bytes) -> None:
    whole = len(raw) - len(raw) % 4
    assert planes.split(raw) == [*(raw[place:whole:4] for place in range(4)), raw[whole:]]
    assert planes.join(b"".join(planes.split(raw))) == raw


@pytest.mark.parametrize(("kind", "most"), [("<f4", 0.86), ("bf16", 0.72)])
def test_numbers_are_stored_smaller(kind: str, most: float) -> None:
    numbers = np.random.default_rng(0).standard_normal(100_000).astype("<f4")
    raw = numbers.tobytes() if kind == "<f4" else (numbers.view("<u4") >> 16).astype("<u2").tobytes()
    assert len(pack(raw, b"me")) < most * len(raw)

"""The envelope of bytes at rest: header, checksum, zstd. Bound to a context, so bytes of another session never load.

magic "NRB" | version | raw size u64 | hash(context, raw size, payload) | payload

| version | hash | payload | |
|---|---|---|---|
| 2 | BLAKE3 | zstd of the byte planes (`planes.split`) | written |
| 1 | SHA-256 | zstd | read |
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Protocol

import zstandard
from blake3 import blake3

from nested_runtime.errors import StateError
from nested_runtime.store import planes

__all__ = ["pack", "unpack"]

_HEAD = struct.Struct("<3sBQ32s")
_MAGIC, _VERSION = b"NRB", 2


class _Hash(Protocol):
    def update(self, data: bytes, /) -> object: ...
    def digest(self) -> bytes: ...


_HASHES: dict[int, Callable[[], _Hash]] = {1: hashlib.sha256, 2: blake3}

# Planes are noise or a few dozen different bytes without order: what helps is entropy coding, not the search for
# matches, so that is kept short. Level 1 as it is takes three times as long on the exponents and saves less.
_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, window_log=17)


def _checksum(version: int, context: bytes, size: int, payload: bytes) -> bytes:
    digest = _HASHES[version]()
    digest.update(struct.pack("<QQ", len(context), size))
    digest.update(context)
    digest.update(payload)
    return digest.digest()


def pack(raw: bytes, context: bytes) -> bytes:
    """Compress `raw` and bind it to `context`."""
    compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION).compressobj(size=len(raw))
    parts = []
    for plane in planes.split(raw):  # in blocks of its own: each block has one code for all its bytes
        parts += [compressor.compress(plane), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    payload = b"".join([*parts, compressor.flush()])
    return _HEAD.pack(_MAGIC, _VERSION, len(raw), _checksum(_VERSION, context, len(raw), payload)) + payload


def unpack(packed: bytes, context: bytes, *, max_bytes: int) -> bytes:
    """Return the bytes `pack` was given; StateError when damaged, of another context, or larger than `max_bytes`."""
    if len(packed) < _HEAD.size:
        raise StateError(
            f"stored state has {len(packed)} bytes, less than its header; it is damaged: restore a snapshot"
        )
    magic, version, size, checksum = _HEAD.unpack_from(packed)
    if magic != _MAGIC or version not in _HASHES:
        known = ", ".join(repr(_MAGIC + bytes([number])) for number in _HASHES)
        raise StateError(
            f"stored state begins with {packed[:4]!r}, this release reads {known}; it is damaged, or a newer release "
            "wrote it: use that one"
        )
    if size > max_bytes:
        raise StateError(f"stored state is {size} bytes uncompressed, over the limit of {max_bytes}; raise state_bytes")
    payload = packed[_HEAD.size :]
    if _checksum(version, context, size, payload) != checksum:
        raise StateError("stored state fails its checksum (damaged, or of another session); restore a snapshot")
    raw = _decompress(payload, size)
    return planes.join(raw) if version > 1 else raw


def _decompress(payload: bytes, size: int) -> bytes:
    """The content of a zstd frame that says itself that it holds `size` bytes, so that memory is bounded before use."""
    try:
        found = zstandard.frame_content_size(payload)
        if found != size:
            raise StateError(f"stored state: a frame of {found} bytes where its header says {size}; restore a snapshot")
        return zstandard.ZstdDecompressor().decompress(payload)
    except zstandard.ZstdError as error:
        raise StateError(f"stored state cannot be decompressed ({error}); restore a snapshot") from error

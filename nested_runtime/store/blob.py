"""The envelope of bytes at rest: header, checksum, zstd. Bound to a context, so bytes of another session never load.

magic "NRB" | version 1 | raw size u64 | sha256(context, raw size, payload) | zstd payload
"""

from __future__ import annotations

import hashlib
import struct

import zstandard

from nested_runtime.errors import StateError

__all__ = ["pack", "unpack"]

_HEAD = struct.Struct("<3sBQ32s")
_MAGIC, _VERSION = b"NRB", 1


def _checksum(context: bytes, size: int, payload: bytes) -> bytes:
    digest = hashlib.sha256(struct.pack("<QQ", len(context), size))
    digest.update(context)
    digest.update(payload)
    return digest.digest()


def pack(raw: bytes, context: bytes, *, level: int = 1) -> bytes:
    """Compress `raw` and bind it to `context`."""
    payload = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(raw)
    return _HEAD.pack(_MAGIC, _VERSION, len(raw), _checksum(context, len(raw), payload)) + payload


def unpack(packed: bytes, context: bytes, *, max_bytes: int) -> bytes:
    """Return the bytes `pack` was given; StateError when damaged, of another context, or larger than `max_bytes`."""
    if len(packed) < _HEAD.size:
        raise StateError(
            f"stored state has {len(packed)} bytes, less than its header; it is damaged: restore a snapshot"
        )
    magic, version, size, checksum = _HEAD.unpack_from(packed)
    if magic != _MAGIC or version != _VERSION:
        raise StateError(
            f"stored state begins with {packed[:4]!r}, not {_MAGIC + bytes([_VERSION])!r}; it was not written by this "
            "release: use the release that wrote it"
        )
    if size > max_bytes:
        raise StateError(f"stored state is {size} bytes uncompressed, over the limit of {max_bytes}; raise state_bytes")
    payload = packed[_HEAD.size :]
    if _checksum(context, size, payload) != checksum:
        raise StateError("stored state fails its checksum (damaged, or of another session); restore a snapshot")
    try:
        raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=max_bytes)
    except zstandard.ZstdError as error:
        raise StateError(f"stored state cannot be decompressed ({error}); restore a snapshot") from error
    if len(raw) != size:
        raise StateError(f"stored state has {len(raw)} bytes where its header says {size}; restore a snapshot")
    return raw

"""The bytes of a session state: a strict safetensors file that refuses everything it did not write itself.

Layout: 8 bytes header length (little endian), JSON header padded with spaces, tensor data without gaps, in spec order.
`__metadata__` holds the SnapshotHeader as strings and `checksum`, the SHA-256 of the whole JSON header with the
checksum's own digits read as zeros. The digest covers the tensors, so every byte is covered. Format 2 has BLAKE3 as
digest; format 1, with SHA-256, is read.
Zero rows at the end of a tensor's first axis are not stored: shape [r, ...] with r <= the session's shape [n, ...].
Tensors that grow come back with as many rows as the longest of them has stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from blake3 import blake3

from nested_runtime.errors import StateError, StateMismatch
from nested_runtime.state.pool import check_state
from nested_runtime.state.snapshot import (
    AT_REST,
    Binding,
    Hasher,
    Snapshot,
    SnapshotHeader,
    state_digest,
    tensor_bytes,
)
from nested_runtime.state.spec import TensorSpec

__all__ = ["FORMAT", "decode", "encode", "read_header"]

FORMAT = "nested-runtime-state/2"
"""What is written."""

_DIGESTS: dict[str, Callable[[], Hasher]] = {FORMAT: blake3, "nested-runtime-state/1": hashlib.sha256}

_MAX_HEADER = 1 << 20
_MAX_COUNT = 1 << 53
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_NO_CHECKSUM = "0" * 64
_HEADER_FIELDS = tuple(field.name for field in fields(SnapshotHeader))


def encode(snapshot: Snapshot) -> bytes:
    """The snapshot as a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": _to_metadata(snapshot.header)}
    parts: list[memoryview] = []
    offset = 0
    for name, tensor in snapshot.tensors.items():
        dtype = _stored_dtype(tensor.dtype, snapshot.header.at_rest)
        if dtype not in _DTYPES:
            raise StateError(f"state tensor {name!r} has dtype {dtype}, which has no stored form; use int8 or a float")
        rows = _without_zero_rows(tensor).to(dtype)
        if not _is_finite(rows):
            raise StateError(f"state tensor {name!r} holds NaN or infinity; it is not written")
        data = tensor_bytes(rows)
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(rows.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    checksum = _checksum(header, _NO_CHECKSUM)
    header = header.replace(_NO_CHECKSUM.encode(), checksum.encode(), 1)
    return b"".join([struct.pack("<Q", len(header)), header, *parts])


def decode(blob: bytes, specs: tuple[TensorSpec, ...], fingerprint: str, binding: Binding | None = None) -> Snapshot:
    """The snapshot in `blob`, every claim of it checked against the model and the place it was found at.

    StateMismatch: a well-formed state of another model or place. StateError: anything else that is not right.
    """
    form, header, entries, start = _parse(blob)
    _check_belongs(header, fingerprint, binding or Binding())
    if entries.keys() != {spec.name for spec in specs}:
        names = {spec.name for spec in specs}
        missing, extra = sorted(names - entries.keys()), sorted(entries.keys() - names)
        raise StateError(f"state blob: missing tensors {missing[:5]}, unknown tensors {extra[:5]}")
    tensors: dict[str, torch.Tensor] = {}
    data = bytearray(memoryview(blob)[start:])  # the tensors' memory from here on
    offset, rows = 0, max((_stored_shape(entries[s.name], s)[0] for s in specs if s.grows), default=0)
    for spec in specs:
        shape = (rows, *spec.shape[1:]) if spec.grows else spec.shape
        entry = entries[spec.name]
        tensors[spec.name], offset = _read_tensor(data, offset, spec, shape, entry, header.at_rest)
    if offset != len(data):
        raise StateError(f"state blob: {len(blob)} bytes, but the header accounts for {start + offset}")
    if state_digest(tensors, _DIGESTS[form]) != header.digest:
        raise StateError("state blob: the tensors do not have the digest in the header; the blob is damaged")
    check_state(specs, tensors)
    return Snapshot(header, tensors)


def read_header(blob: bytes) -> SnapshotHeader:
    """What a blob says it is, checksum verified, tensors not looked at. StateError if it is not a state blob."""
    return _parse(blob)[1]


def _parse(blob: bytes) -> tuple[str, SnapshotHeader, dict[str, Any], int]:
    """(format, header, tensor entries, offset of the data) of a blob whose header is intact."""
    if len(blob) < 8:
        raise StateError(f"state blob: {len(blob)} bytes, too short for a header")
    (size,) = struct.unpack("<Q", blob[:8])
    if size > min(_MAX_HEADER, len(blob) - 8):
        raise StateError(f"state blob: header of {size} bytes in a blob of {len(blob)}, limit {_MAX_HEADER}")
    raw = bytes(blob[8 : 8 + size])
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise StateError(f"state blob: the header is not JSON ({type(error).__name__}); the blob is damaged") from error
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateError("state blob: the header has no metadata of strings; this is not a session state")
    form = metadata.get("format", "")
    if form not in _DIGESTS:
        raise StateError(f"state blob: format {form[:40]!r}, this release reads {', '.join(map(repr, _DIGESTS))}")
    checksum = metadata.pop("checksum", "")
    if not (len(checksum) == 64 and checksum.isascii() and _checksum(raw, checksum) == checksum):
        raise StateError("state blob: the header does not have the checksum it claims; the blob is damaged")
    return form, _from_metadata(metadata), entries, 8 + size


def _checksum(header: bytes, claimed: str) -> str:
    """The checksum of a header, reading the first occurrence of the claimed one as zeros."""
    return hashlib.sha256(header.replace(claimed.encode(), _NO_CHECKSUM.encode(), 1)).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _to_metadata(header: SnapshotHeader) -> dict[str, str]:
    values = {name: "" if value is None else str(value) for name, value in asdict(header).items()}
    # First, so that the first run of zeros in the header is the checksum's place.
    return {"checksum": _NO_CHECKSUM, "format": FORMAT, **values}


def _from_metadata(metadata: dict[str, str]) -> SnapshotHeader:
    if metadata.keys() != {"format", *_HEADER_FIELDS}:
        raise StateError(f"state blob: metadata fields {sorted(metadata)[:12]}, expected {sorted(_HEADER_FIELDS)}")
    if metadata["at_rest"] not in AT_REST:
        raise StateError(f"state blob: at_rest {metadata['at_rest'][:40]!r} is not one of {', '.join(AT_REST)}")
    return SnapshotHeader(
        fingerprint=metadata["fingerprint"],
        tenant=metadata["tenant"],
        session=metadata["session"],
        version=_count(metadata, "version"),
        position=_count(metadata, "position"),
        pending=_count(metadata, "pending") if metadata["pending"] else None,
        digest=metadata["digest"],
        at_rest=metadata["at_rest"],
    )


def _count(metadata: Mapping[str, str], name: str) -> int:
    text = metadata[name]
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) < _MAX_COUNT):
        raise StateError(f"state blob: {name} is {text[:40]!r}, expected a whole number below 2**53")
    return int(text)


def _check_belongs(header: SnapshotHeader, fingerprint: str, binding: Binding) -> None:
    expected = {"fingerprint": fingerprint, **asdict(binding)}
    for name, value in expected.items():
        found = getattr(header, name)
        if value is not None and found != value:
            raise StateMismatch(f"state blob: {name} is {found!r}, expected {value!r}; load the state it belongs to")


def _read_tensor(
    data: bytearray, offset: int, spec: TensorSpec, full: tuple[int, ...], entry: Any, at_rest: str
) -> tuple[torch.Tensor, int]:
    """(tensor of shape `full`, end offset) of one entry, which must begin at `offset`. It may be a view of `data`."""
    dtype = _stored_dtype(spec.dtype, at_rest)
    shape = _stored_shape(entry, spec)
    count = math.prod(shape)
    end = offset + count * dtype.itemsize
    expected = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    if entry != expected:
        raise StateError(f"state blob: tensor {spec.name!r} is {str(entry)[:120]}, expected {expected}")
    if end > len(data):
        raise StateError(f"state blob: ends inside tensor {spec.name!r}; the blob is truncated")
    if not count:
        return torch.zeros(full, dtype=spec.dtype), end
    stored = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
    if not _is_finite(stored):
        raise StateError(f"state blob: tensor {spec.name!r} holds NaN or infinity")
    if shape == full and dtype == spec.dtype and offset % dtype.itemsize == 0:
        return stored, end
    tensor = torch.zeros(full, dtype=spec.dtype)
    (tensor[: shape[0]] if shape else tensor).copy_(stored)
    return tensor, end


def _stored_shape(entry: Any, spec: TensorSpec) -> tuple[int, ...]:
    """The stored shape if it is spec.shape, or fewer rows of it."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if isinstance(shape, list) and all(type(size) is int for size in shape) and len(shape) == len(spec.shape):
        rows_fit = not shape or 0 <= shape[0] <= spec.shape[0]
        if rows_fit and tuple(shape[1:]) == spec.shape[1:]:
            return tuple(shape)
    raise StateError(
        f"state blob: tensor {spec.name!r} has shape {str(shape)[:80]}, expected {spec.shape} or fewer rows"
    )


def _stored_dtype(dtype: torch.dtype, at_rest: str) -> torch.dtype:
    return torch.bfloat16 if at_rest == "bf16" and dtype.is_floating_point else dtype


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether nothing is NaN or infinite. A sum is finite then, unless it overflows: only so look at every element."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _without_zero_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its last all-zero rows (zero bits: -0.0 is kept)."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    is_kept = tensor.contiguous().view(tensor.shape[0], -1).view(torch.uint8).any(dim=1)
    kept = is_kept.nonzero()
    return tensor[: int(kept[-1]) + 1] if len(kept) else tensor[:0]

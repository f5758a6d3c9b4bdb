"""Snapshot: one version of a session, detached from any pool, with what it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from blake3 import blake3

from nested_runtime.errors import ConfigError

__all__ = ["AT_REST", "Binding", "Hasher", "Snapshot", "SnapshotHeader", "state_digest", "tensor_bytes"]


class Hasher(Protocol):
    """What hashlib's and BLAKE3's objects have in common."""

    def update(self, data: Any, /) -> object:
        """Hash more bytes."""

    def hexdigest(self) -> str:
        """The digest of the bytes so far."""


AT_REST = ("exact", "bf16")
"""Forms of a stored state: as it is, or float tensors rounded to bfloat16."""


@dataclass(frozen=True)
class Binding:
    """Where a blob must belong. None = not checked (an import into another session)."""

    tenant: str | None = None
    session: str | None = None
    version: int | None = None


@dataclass(frozen=True)
class SnapshotHeader:
    """What a state belongs to.

    fingerprint  of the model's config and weights
    tenant, session, version   the binding; version counts commits from 1, 0 = never committed
    position     session tokens in the state
    pending      the sampled token to read first next time, None if there is none
    digest       `state_digest` of the tensors, hex
    at_rest      one of AT_REST
    """

    fingerprint: str
    tenant: str
    session: str
    version: int
    position: int
    pending: int | None
    digest: str
    at_rest: str = "exact"


@dataclass(frozen=True)
class Snapshot:
    """Header and tensors (CPU, in spec order). Build it with `take`, which keeps header and tensors consistent."""

    header: SnapshotHeader
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def take(
        cls,
        tensors: Mapping[str, torch.Tensor],
        *,
        fingerprint: str,
        binding: Binding,
        position: int,
        pending: int | None,
        at_rest: str = "exact",
    ) -> Snapshot:
        """The snapshot of a state. With at_rest="bf16" its tensors are rounded here and now.

        Whoever continues the session must do so from the snapshot's tensors: then a turn does not depend on whether
        the state was still resident or came back from the store.
        """
        if at_rest not in AT_REST:
            raise ConfigError(f"at_rest must be one of {', '.join(AT_REST)}, got {at_rest!r}")
        if at_rest == "bf16":
            tensors = {name: _rounded(tensor) for name, tensor in tensors.items()}
        header = SnapshotHeader(
            fingerprint=fingerprint,
            tenant=binding.tenant or "",
            session=binding.session or "",
            version=binding.version or 0,
            position=position,
            pending=pending,
            digest=state_digest(tensors),
            at_rest=at_rest,
        )
        return cls(header, tensors)


def state_digest(tensors: Mapping[str, torch.Tensor], algorithm: Callable[[], Hasher] = blake3) -> str:
    """BLAKE3 (hex) over name, dtype, shape and bytes of every tensor, in the mapping's order (spec order).

    States of releases before that are hashed with `algorithm` SHA-256.
    """
    digest = algorithm()
    for name, tensor in tensors.items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as bytes, row-major."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype) if tensor.is_floating_point() else tensor

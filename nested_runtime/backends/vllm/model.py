"""Our models inside vLLM. A session's state is one block of vLLM's mamba cache; a request without one starts fresh.

Each block of the model registers a `SessionMemory` as vLLM's cache layer: the rule's tensors and how many
session tokens are in them. Page arithmetic, admission and batching are vLLM's, everything else is the same
code as in our own engine: the packed batch is rebuilt from vLLM's metadata, and the same kernels run in
place on the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from nested_runtime.core import Batch
from nested_runtime.models.loading import build
from nested_runtime.state.spec import TensorSpec

__all__ = ["POSITION", "NestedForCausalLM", "SessionMemory"]

POSITION = TensorSpec("position", (), torch.int32)  # session tokens in the state


class SessionMemory(MambaBase):  # type: ignore[misc]  # vLLM is not installed where mypy runs
    """The states of one block of the model, one cache block per request.

    `tensors`: by TensorSpec name, each [cache blocks, *shape]. vLLM's cache block 0 is never given to a request, as our
    slot 0 is never given to a sequence.
    """

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self.specs = (POSITION, *specs)
        self.tensors: dict[str, torch.Tensor] = {}
        self.kv_cache: tuple[torch.Tensor, ...] = ()

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """vLLM's interface."""
        return tuple(spec.shape for spec in self.specs)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """vLLM's interface."""
        return tuple(spec.dtype for spec in self.specs)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The metadata we need is query lengths, sequence lengths and state blocks: that of linear attention."""
        return MambaAttentionBackendEnum.LINEAR

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Lay the layer's bytes out tensor by tensor, not block by block: kernels want each pool in one piece."""
        count, raw, offset = kv_cache.shape[0], kv_cache.view(torch.int8).reshape(-1), 0
        if raw.data_ptr() != kv_cache.data_ptr():
            raise RuntimeError("vLLM's cache of a layer is not in one piece; use one model and --block-size as given")
        for spec in self.specs:
            size = count * prod(spec.shape) * spec.dtype.itemsize
            self.tensors[spec.name] = raw[offset : offset + size].view(spec.dtype).view(count, *spec.shape)
            offset += size
        self.kv_cache = tuple(self.tensors.values())


class NestedForCausalLM(nn.Module, HasInnerState, IsAttentionFree):  # type: ignore[misc]
    """A model family of ours as vLLM sees it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        torch.set_flush_denormal(True)  # decayed memories are slow otherwise; a setting of this thread
        self.config = vllm_config.model_config.hf_config
        self.model = build(*_fields(self.config.nested))
        self.memories: dict[str, SessionMemory] = {}
        known = vllm_config.compilation_config.static_forward_context
        for name, specs in _by_block(self.model.state_spec()).items():
            known[name] = self.memories[name] = SessionMemory(specs)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """vLLM's interface; the model embeds its tokens itself."""
        raise NotImplementedError("embeddings cannot be given to this model; give token ids")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Hidden states [T, D] of vLLM's packed tokens [T]; states are changed in place."""
        metadata = get_forward_context().attn_metadata
        hidden = torch.zeros(input_ids.shape[0], self.config.hidden_size, device=input_ids.device)
        if metadata is None:  # vLLM measures memory
            return hidden
        batch = self._batch(input_ids, metadata[next(iter(self.memories))])
        pool = {f"{name}.{key}": t for name, memory in self.memories.items() for key, t in memory.tensors.items()}
        out = self.model(batch, pool)
        self._position[batch.slots.long()] += batch.cu_seqlens.diff()
        hidden[: out.shape[0]] = out
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Next-token logits."""
        return self.model.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM's interface: the tensors of model.safetensors."""
        given = dict(weights)
        self.model.load_state_dict(given)
        self.requires_grad_(False)
        return {f"model.{name}" for name in given}

    @property
    def _position(self) -> torch.Tensor:
        """Session tokens in the state of every cache block, kept by the first layer."""
        return next(iter(self.memories.values())).tensors[POSITION.name]

    def _batch(self, tokens: torch.Tensor, metadata: Any) -> Batch:
        """vLLM's metadata as a Batch. Requests that have nothing in their block yet start from the fresh state."""
        bounds, slots = metadata.query_start_loc.int(), metadata.state_indices_tensor.int()
        fresh = slots[metadata.seq_lens[: len(slots)] == bounds.diff()].long()
        for memory in self.memories.values() if len(fresh) else ():
            for tensor in memory.tensors.values():
                tensor[fresh] = 0  # vLLM hands blocks out as the last request left them
        return Batch(tokens[: bounds[-1]], bounds, slots, self._position[slots.long()].long())

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """vLLM's interface: shapes of one block's state."""
        return tuple(spec.shape for spec in _block_specs(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """vLLM's interface: their types."""
        return tuple(spec.dtype for spec in _block_specs(vllm_config))

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """vLLM's interface, for prefix caching, which we refuse (connector.py)."""
        return (get_temporal_copy_spec,)


def _fields(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Family and fields of a config.json, as `build` takes them."""
    return str(config["family"]), {k: v for k, v in config.items() if k not in ("family", "name")}


def _by_block(specs: Iterable[TensorSpec]) -> dict[str, tuple[TensorSpec, ...]]:
    """The model's state tensors by the block they belong to, names without it."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        block, _, name = spec.name.rpartition(".")
        found.setdefault(block, []).append(TensorSpec(name, spec.shape, spec.dtype))
    return {block: tuple(of_block) for block, of_block in found.items()}


def _block_specs(vllm_config: VllmConfig) -> tuple[TensorSpec, ...]:
    with torch.device("meta"):
        model = build(*_fields(cast(Mapping[str, Any], vllm_config.model_config.hf_config.nested)))
    return (POSITION, *next(iter(_by_block(model.state_spec()).values())))

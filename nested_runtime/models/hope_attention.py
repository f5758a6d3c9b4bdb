"""Hope-Attention: softmax attention in place of the self-modifying memory, then the continuum memory (NL section 8).

With static levels only it is a Llama-type decoder: what `nested-convert` makes of Hugging Face checkpoints.

    x <- x + attention(norm(x)),   x <- x + mlp(norm(x));   Gemma 3 norms what is added, too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.memory.gated_mlp import GatedMLP
from nested_runtime.memory.paged_attention import AttentionShape, PagedAttention
from nested_runtime.memory.rope import Rope
from nested_runtime.models.base import LanguageModel, Pool
from nested_runtime.models.config import from_fields
from nested_runtime.state.spec import TensorSpec, prefixed

__all__ = ["HopeAttention", "HopeAttentionConfig"]


@dataclass(frozen=True)
class HopeAttentionConfig:
    """Shape of the model.

    hidden      width of the gated MLP
    context     tokens that attention sees at most; older ones slide out
    window      tokens that the blocks in `sliding` see (None = all blocks), where that is less than the context
    rope        see `memory/rope.py`; local_rope: of the sliding blocks, where it differs
    scale       factor on attention scores; None = head_dim^-1/2
    qkv_bias, out_bias, mlp_bias, qk_norm, post_norm, tied   parts that a model has or not
    embed_scale factor on embeddings
    """

    vocab_size: int
    dim: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int = 2048
    window: int | None = None
    sliding: list[int] | None = None
    rope: Mapping[str, Any] = field(default_factory=dict)
    local_rope: Mapping[str, Any] | None = None
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    tied: bool = True
    activation: str = "silu"
    embed_scale: float = 1.0
    norm_eps: float = 1e-6
    max_context: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("kv_heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config field {name!r} must be at least 1, got {getattr(self, name)}")
        wrong = [i for i in self.sliding or () if i not in range(self.blocks)]
        if wrong:
            raise ConfigError(f"config field 'sliding' names block {wrong[0]!r}; there are blocks 0..{self.blocks - 1}")

    def slides(self, block: int) -> bool:
        """Whether a block sees `window` tokens only."""
        return self.window is not None and (self.sliding is None or block in self.sliding)

    def attention(self, block: int) -> AttentionShape:
        """The attention layer of a block."""
        slides = self.slides(block)
        windows = [self.window if self.window and self.slides(i) else self.context for i in range(self.blocks)]
        window = min(windows[block], self.context)
        rope = self.local_rope if slides and self.local_rope is not None else self.rope
        return AttentionShape(
            self.dim, self.heads, self.kv_heads, self.head_dim, window, min(max(windows), self.context), Rope.of(rope),
            self.scale, self.qkv_bias, self.out_bias, self.qk_norm, self.norm_eps,
        )  # fmt: skip


class AttentionBlock(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, config: HopeAttentionConfig, index: int) -> None:
        super().__init__()
        self.memory = PagedAttention(config.attention(index))
        self.mlp = GatedMLP(config.dim, config.hidden, config.activation, config.mlp_bias)
        self.norm_memory = nn.Parameter(torch.ones(config.dim))
        self.norm_mlp = nn.Parameter(torch.ones(config.dim))
        self.post_memory = nn.Parameter(torch.ones(config.dim)) if config.post_norm else None
        self.post_mlp = nn.Parameter(torch.ones(config.dim)) if config.post_norm else None
        self.eps = config.norm_eps

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """RMS norm of x [.., D]; nothing without a weight."""
        return x if weight is None else rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)

    def add(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The stream after attention's output `read` and the MLP, [.., D]."""
        x = x + self.norm(read, self.post_memory)
        return x + self.norm(self.mlp(self.norm(x, self.norm_mlp)), self.post_mlp)


class HopeAttention(LanguageModel):
    """Attention language model whose keys and values are one row per token of the session."""

    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 24, "context": 24,
        "window": 5, "sliding": [0], "qk_norm": True, "qkv_bias": True, "tied": False,
    }  # fmt: skip

    def __init__(self, config: HopeAttentionConfig) -> None:
        super().__init__()
        self.config, self.chunk, self.vocab_size = config, 1, config.vocab_size
        self.embed = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        self.blocks = nn.ModuleList(AttentionBlock(config, i) for i in range(config.blocks))
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.head = None if config.tied else nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> HopeAttention:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(HopeAttentionConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads."""
        return asdict(self.config)

    def _stack(self) -> list[tuple[str, AttentionBlock]]:
        return [(f"blocks.{i}.memory", cast(AttentionBlock, block)) for i, block in enumerate(self.blocks)]

    def state_spec(self) -> tuple[TensorSpec, ...]:
        """See `LanguageModel.state_spec`."""
        return tuple(spec for name, block in self._stack() for spec in prefixed(name, block.memory.state()))

    def _turns(self, at: torch.Tensor) -> dict[Rope, torch.Tensor]:
        """cos and sin of the positions `at` for every rope of the model."""
        shapes = {block.memory.shape.rope: block.memory.shape for _, block in self._stack()}
        return {rope: rope.turns(at, shape.head_dim) for rope, shape in shapes.items()}

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        """See `LanguageModel.forward`."""
        counts = batch.cu_seqlens.diff()
        ahead = (batch.positions - batch.cu_seqlens[:-1]).repeat_interleave(counts)
        turns = self._turns(torch.arange(len(batch.token_ids), device=ahead.device) + ahead)
        x = self._enter(batch.token_ids)
        for name, block in self._stack():
            local = {s.name: pool[f"{name}.{s.name}"] for s in block.memory.state()}
            z = block.norm(x, block.norm_memory)
            x = block.add(x, block.memory.apply_packed(z, local, batch, turns[block.memory.shape.rope]))
        return rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), self.config.norm_eps)

    def scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor] | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LanguageModel.scan`."""
        turns = self._turns(torch.arange(position, position + tokens.shape[1], device=tokens.device))
        start = state if state is not None else self._fresh(tokens)
        x, new = self._enter(tokens), {}
        for name, block in self._stack():
            local = {s.name: start[f"{name}.{s.name}"] for s in block.memory.state()}
            z = block.norm(x, block.norm_memory)
            read, after = block.memory.scan(z, local, turns[block.memory.shape.rope])
            new.update({f"{name}.{key}": tensor for key, tensor in after.items()})
            x = block.add(x, read)
        return rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), self.config.norm_eps), new

    def _fresh(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(self.embed.dtype, torch.float32)
        shapes = {s.name: (tokens.shape[0], *s.fresh_shape) for s in self.state_spec()}
        return {name: torch.zeros(shape, dtype=dtype, device=tokens.device) for name, shape in shapes.items()}

    def _enter(self, token_ids: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = embedding(token_ids, self.embed)
        return scaled if self.config.embed_scale == 1 else scaled * self.config.embed_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.logits`."""
        out = linear(hidden, self.embed if self.head is None else self.head)
        return out if hidden.dtype == torch.float64 else out.float()

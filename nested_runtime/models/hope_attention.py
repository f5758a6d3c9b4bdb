"""Hope-Attention: softmax attention in place of the self-modifying memory, then the continuum memory (NL section 8).

With static levels only it is a Llama-type decoder: what `nested-convert` makes of Hugging Face checkpoints.

    x <- x + attention(norm(x)),   x <- x + mlp(norm(x));   Gemma 3 norms what is added, too
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn.functional import rms_norm

from nested_runtime.core import Batch, KVRows
from nested_runtime.errors import ConfigError
from nested_runtime.memory.cms import ContinuumMemory
from nested_runtime.memory.frozen import Weight, embedding, linear, quantize
from nested_runtime.memory.gated_mlp import GatedMLP
from nested_runtime.memory.level import Change, Level
from nested_runtime.memory.paged_attention import AttentionShape, PagedAttention
from nested_runtime.memory.rope import Rope
from nested_runtime.models.base import Pool
from nested_runtime.models.config import from_fields
from nested_runtime.models.level_fields import LevelFields, config_of, read_levels
from nested_runtime.models.leveled import LeveledBlock, LeveledModel, Place, Tensors
from nested_runtime.state.spec import TensorSpec

__all__ = ["HopeAttention", "HopeAttentionConfig"]


@dataclass(frozen=True)
class HopeAttentionConfig(LevelFields):
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
        chunk = int(self.levels[0]["chunk"]) if self.levels else 0
        windows = [self.window if self.window and self.slides(i) else self.context for i in range(self.blocks)]
        window = min(windows[block], self.context)
        rope = self.local_rope if slides and self.local_rope is not None else self.rope
        return AttentionShape(
            self.dim, self.heads, self.kv_heads, self.head_dim, window,
            min(max(windows), self.context) + chunk, Rope.of(rope), self.scale, self.qkv_bias, self.out_bias,
            self.qk_norm, self.norm_eps,
        )  # fmt: skip


class AttentionBlock(LeveledBlock):
    """Attention and a continuum memory around a gated MLP, each behind a norm."""

    def __init__(self, config: HopeAttentionConfig, index: int, levels: Sequence[Level] = ()) -> None:
        super().__init__()
        self.memory = PagedAttention(config.attention(index))
        mlp = GatedMLP(config.dim, config.hidden, config.activation, config.mlp_bias)
        self.cms = ContinuumMemory(config.dim, config.hidden, levels, config.cms, mlp)
        self.norm_memory = nn.Parameter(torch.ones(config.dim))
        self.norm_mlp = nn.Parameter(torch.ones(config.dim))
        self.post_memory = nn.Parameter(torch.ones(config.dim)) if config.post_norm else None
        self.post_mlp = nn.Parameter(torch.ones(config.dim)) if config.post_norm else None
        self.eps = config.norm_eps

    def state(self) -> tuple[TensorSpec, ...]:
        """See `LeveledBlock.state`."""
        return self.memory.state()

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """RMS norm of x [.., D]; nothing without a weight."""
        return x if weight is None else rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)

    def read_packed(self, x: torch.Tensor, pool: Tensors, batch: Batch, place: Place) -> torch.Tensor:
        """See `LeveledBlock.read_packed`; `place` are the turns of every rope."""
        z = self.norm(x, self.norm_memory)
        read = self.memory.apply_packed(z, pool, batch, place[self.memory.shape.rope])
        return x + self.norm(read, self.post_memory)

    def read(self, x: torch.Tensor, state: Tensors, place: Place) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `LeveledBlock.read`."""
        out, new = self.memory.scan(self.norm(x, self.norm_memory), state, place[self.memory.shape.rope])
        return x + self.norm(out, self.post_memory), new

    def mix(self, x: torch.Tensor, changes: Sequence[Change] | None = None) -> torch.Tensor:
        """See `LeveledBlock.mix`."""
        return x + self.norm(self.cms(self.norm(x, self.norm_mlp), changes), self.post_mlp)


class HopeAttention(LeveledModel):
    """Attention language model whose keys and values are one row per token of the session.

    When the levels step, the chunk is read again from the stream that entered the first of them, behind the rows of
    the tokens before it, which are still there: a session keeps a chunk more rows than any of its tokens sees.
    """

    TINY: ClassVar[dict[str, Any]] = {
        "vocab_size": 64, "dim": 16, "blocks": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 24, "context": 24,
        "window": 5, "sliding": [0], "qk_norm": True, "qkv_bias": True, "tied": False,
    }  # fmt: skip

    def __init__(self, config: HopeAttentionConfig) -> None:
        super().__init__()
        levels = read_levels(config, 1, config.blocks)
        if levels and levels[0].chunk > config.context:
            raise ConfigError(f"levels.0.chunk is {levels[0].chunk}, more than the context of {config.context} tokens")
        self.config, self.chunk, self.period, self.vocab_size = config, 1, 1, config.vocab_size
        self.embed: Weight = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        first = config.blocks - config.adaptive_blocks
        self.blocks = nn.ModuleList(
            AttentionBlock(config, i, levels if i >= first else ()) for i in range(config.blocks)
        )
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.head: Weight | None = None
        if not config.tied:
            self.head = nn.Parameter(torch.randn(config.vocab_size, config.dim) * 0.02)
        self.adapt(levels, config.dim, config)

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> HopeAttention:
        """Build from a config.json mapping; ConfigError names an unknown, missing or impossible field."""
        return cls(from_fields(HopeAttentionConfig, fields))

    def to_config(self) -> dict[str, Any]:
        """The mapping `from_config` reads."""
        return config_of(self.config)

    def quantize(self) -> None:
        """Let everything frozen be int8: the matrices of attention, static MLPs, embedding and head. For serving."""
        for _, block in self._attention():
            quantize(block.memory, "w_in", "w_out")
            quantize(cast(GatedMLP, block.cms.static), "w_in", "w_out")
        quantize(self, "embed", *(["head"] if self.head is not None else []))

    def enter(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `LeveledModel.enter`."""
        scaled: torch.Tensor = embedding(token_ids, self.embed)
        return scaled if self.config.embed_scale == 1 else scaled * self.config.embed_scale

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """See `LeveledModel.leave`."""
        return rms_norm(x, (x.shape[-1],), self.norm.to(x.dtype), self.config.norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.logits`."""
        out = linear(hidden, self.embed if self.head is None else self.head)
        return out if hidden.dtype == torch.float64 else out.float()

    # ---- where tokens stand: the turns of every rope ----------------------------------------------------------------

    def _turns(self, at: torch.Tensor) -> dict[Rope, torch.Tensor]:
        """cos and sin of the positions `at` for every rope of the model."""
        shapes = {block.memory.shape.rope: block.memory.shape for _, block in self._attention()}
        return {rope: rope.turns(at, shape.head_dim) for rope, shape in shapes.items()}

    def _attention(self) -> Iterator[tuple[str, AttentionBlock]]:
        return ((name, cast(AttentionBlock, block)) for name, block in self._stack())

    def packed_place(self, batch: Batch) -> Place:
        """See `LeveledModel.packed_place`."""
        ahead = (batch.positions - batch.cu_seqlens[:-1]).repeat_interleave(batch.cu_seqlens.diff())
        return self._turns(torch.arange(len(batch.token_ids), device=ahead.device) + ahead)

    def place(self, begin: int | torch.Tensor, length: int) -> Place:
        """See `LeveledModel.place`."""
        at = torch.arange(length, device=self.embed.device)
        return self._turns(at + begin if isinstance(begin, int) else begin[:, None] + at)

    # ---- the rows before a chunk: nothing is copied when it begins --------------------------------------------------

    def anchor(self, block: LeveledBlock) -> tuple[TensorSpec, ...]:
        """None: see the class."""
        return ()

    def before(self, state: Tensors) -> dict[str, torch.Tensor]:
        """See `LeveledModel.before`. Rows that were dropped between two turns are not seen again."""
        return {name: state[name][:, : -self.update_chunk] for name in self._learning_rows()}

    def before_packed(self, pool: Pool, slots: torch.Tensor, kv: KVRows | None) -> dict[str, torch.Tensor]:
        """See `LeveledModel.before_packed`: right-aligned, padded with rows that are not filled."""
        if kv is None:
            raise ConfigError("attention needs to know where the keys and values lie (kv)")
        known = (kv.num - self.update_chunk).clamp(min=0)
        rows = int(known.max())
        at = torch.arange(rows, device=known.device) + (known - rows)[:, None]
        where = torch.where(at < 0, 0, kv.read[:, :rows].gather(1, at.clamp(min=0)))  # row 0 is padding
        return {name: pool[name].flatten(0, 1)[where] for name in self._learning_rows()}

    def _learning_rows(self) -> list[str]:
        """State tensors with the rows of the adaptive blocks behind the first."""
        behind = list(self._stack())[self.first_adaptive + 1 :]
        return [f"{name}.{spec.name}" for name, block in behind for spec in block.state()]

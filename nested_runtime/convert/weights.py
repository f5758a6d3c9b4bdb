"""From a checkpoint's tensors to ours: which of theirs make up each of ours, every misfit listed before failing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nested_runtime.convert.source import Source
from nested_runtime.errors import CheckpointError

__all__ = ["Piece", "convert_weights", "pieces"]

IGNORED = ("rotary_emb.inv_freq",)  # computed, not learned; old checkpoints carry it


@dataclass(frozen=True)
class Piece:
    """One of our tensors: theirs, by name and shape, stacked on the first axis; `offset` is added (Gemma's 1 + w)."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    offset: float = 0.0


def pieces(config: Mapping[str, Any], *, one_plus: bool) -> Iterator[Piece]:
    """What a Hope-Attention model of `config` is made of. one_plus: norm weights are stored as w of 1 + w."""
    dim, offset = config["dim"], 1.0 if one_plus else 0.0
    yield Piece("embed", (("model.embed_tokens.weight", (config["vocab_size"], dim)),))
    if not config["tied"]:
        yield Piece("head", (("lm_head.weight", (config["vocab_size"], dim)),))
    yield Piece("norm", (("model.norm.weight", (dim,)),), offset)
    for i in range(config["blocks"]):
        yield from _block(config, f"model.layers.{i}", f"blocks.{i}", offset)


def _block(config: Mapping[str, Any], theirs: str, ours: str, offset: float) -> Iterator[Piece]:
    dim, size, hidden = config["dim"], config["head_dim"], config["hidden"]
    q, kv = config["heads"] * size, config["kv_heads"] * size
    rows = (("q", q), ("k", kv), ("v", kv))
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    yield Piece(f"{ours}.memory.w_in", tuple((f"{attention}.{n}_proj.weight", (r, dim)) for n, r in rows))
    yield Piece(f"{ours}.memory.w_out", ((f"{attention}.o_proj.weight", (dim, q)),))
    gates = ("gate", "up")
    yield Piece(f"{ours}.cms.static.w_in", tuple((f"{mlp}.{n}_proj.weight", (hidden, dim)) for n in gates))
    yield Piece(f"{ours}.cms.static.w_out", ((f"{mlp}.down_proj.weight", (dim, hidden)),))
    if config.get("qkv_bias"):
        yield Piece(f"{ours}.memory.b_in", tuple((f"{attention}.{n}_proj.bias", (r,)) for n, r in rows))
    if config.get("out_bias"):
        yield Piece(f"{ours}.memory.b_out", ((f"{attention}.o_proj.bias", (dim,)),))
    if config.get("mlp_bias"):
        yield Piece(f"{ours}.cms.static.b_in", tuple((f"{mlp}.{n}_proj.bias", (hidden,)) for n in gates))
        yield Piece(f"{ours}.cms.static.b_out", ((f"{mlp}.down_proj.bias", (dim,)),))
    if config.get("qk_norm"):
        for name in ("q", "k"):
            yield Piece(f"{ours}.memory.norm_{name}", ((f"{attention}.{name}_norm.weight", (size,)),), offset)
    norms = {"norm_memory": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    if config.get("post_norm"):
        norms = {"norm_memory": "input_layernorm", "post_memory": "post_attention_layernorm"}
        norms |= {"norm_mlp": "pre_feedforward_layernorm", "post_mlp": "post_feedforward_layernorm"}
    for name, their in norms.items():
        yield Piece(f"{ours}.{name}", ((f"{theirs}.{their}.weight", (dim,)),), offset)


def convert_weights(source: Source, config: Mapping[str, Any], *, one_plus: bool) -> dict[str, torch.Tensor]:
    """Our tensors, in the checkpoint's own types (norms float32); CheckpointError lists what is missing or too much."""
    wanted = list(pieces(config, one_plus=one_plus))
    shapes = {name: shape for piece in wanted for name, shape in piece.parts}
    ignored = {name for name in source.files if name.endswith(IGNORED)}
    extra = set(source.files) - set(shapes) - ignored
    if config["tied"] and "lm_head.weight" in extra:
        _check_tied(source, shapes["model.embed_tokens.weight"])
        extra.remove("lm_head.weight")
    missing = set(shapes) - set(source.files)
    if missing or extra:
        raise CheckpointError(
            f"{source.folder} does not fit its config.json: missing tensors {sorted(missing) or 'none'}; "
            f"unexpected tensors {sorted(extra) or 'none'}"
        )
    tensors = source.read(shapes)
    return {piece.name: _assemble(piece, tensors) for piece in wanted}


def _assemble(piece: Piece, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = [tensors.pop(name) for name, _ in piece.parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if whole.ndim == 1 and "norm" in piece.parts[0][0]:
        whole = whole.float() + piece.offset
    return whole.contiguous()


def _check_tied(source: Source, shape: tuple[int, ...]) -> None:
    both = source.read({"lm_head.weight": shape, "model.embed_tokens.weight": shape})
    if not torch.equal(*both.values()):
        raise CheckpointError(
            f"{source.folder}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding; "
            "set it to false in config.json"
        )

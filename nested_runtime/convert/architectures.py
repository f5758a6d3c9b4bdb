"""What the known architectures are as a Hope-Attention config: read from config.json, every field checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from nested_runtime.errors import CheckpointError

__all__ = ["ARCHITECTURES", "read_config"]

Config = Mapping[str, Any]
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
MAX_SIZE = 1 << 20


def read_config(config: Config) -> dict[str, Any]:
    """The fields of HopeAttentionConfig; CheckpointError names the field that cannot be had."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"config.json: model_type is {name!r}; known: {', '.join(sorted(ARCHITECTURES))}")
    shape = _shape(config)
    return {**shape, **ARCHITECTURES[name](config, shape)}


def _shape(config: Config) -> dict[str, Any]:
    heads = _count(config, "num_attention_heads")
    dim = _count(config, "hidden_size")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"config.json: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return {
        "vocab_size": _count(config, "vocab_size"),
        "dim": dim,
        "blocks": _count(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _count(config, "num_key_value_heads", heads),
        "head_dim": _count(config, "head_dim", dim // heads),
        "hidden": _count(config, "intermediate_size"),
        "context": _count(config, "max_position_embeddings"),
        "rope": _rope(config, config.get("rope_parameters")),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "activation": ACTIVATIONS[activation],
        "norm_eps": _number(config, "rms_norm_eps", 1e-6),
    }


def _llama(config: Config, _shape: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Config, shape: Config) -> dict[str, Any]:
    return _window(config, shape, every=True)


def _qwen2(config: Config, shape: Config) -> dict[str, Any]:
    return {"qkv_bias": True, **_window(config, shape, every=False)}


def _qwen3(config: Config, shape: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qk_norm": True, "qkv_bias": bias, "out_bias": bias, **_window(config, shape, every=False)}


def _gemma(config: Config, shape: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    tied = bool(config.get("tie_word_embeddings", True))
    activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    return {
        "embed_scale": math.sqrt(shape["dim"]),
        "qkv_bias": bias,
        "out_bias": bias,
        "tied": tied,
        "activation": "gelu_tanh" if activation in ("gelu", "gelu_pytorch_tanh") else shape["activation"],
    }


def _gemma3(config: Config, shape: Config) -> dict[str, Any]:
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(name):
            raise CheckpointError(f"config.json: {name} is {config[name]!r}, which is not supported")
    ropes = config.get("rope_parameters")
    if isinstance(ropes, dict) and "full_attention" in ropes:
        rope, local = _rope(config, ropes["full_attention"]), _rope(config, ropes.get("sliding_attention"))
    else:
        rope = {**_rope(config, None), "theta": _number(config, "rope_theta", 1e6)}
        local = {"theta": _number(config, "rope_local_base_freq", 1e4)}
    every = _count(config, "sliding_window_pattern", 6)
    types = config.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(shape["blocks"])
    ]
    return {
        **_gemma(config, shape),
        **_window({**config, "layer_types": types}, shape, every=False),
        "rope": rope,
        "local_rope": local,
        "qk_norm": True,
        "post_norm": True,
        "scale": _number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
    }


ARCHITECTURES: dict[str, Callable[[Config, Config], dict[str, Any]]] = {
    "llama": _llama,  # SmolLM and SmolLM2 are of this shape
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma3_text": _gemma3,
}


def _window(config: Config, shape: Config, *, every: bool) -> dict[str, Any]:
    """The sliding window and its blocks. `every`: all blocks slide where the config says nothing about layers."""
    if config.get("sliding_window") is None:
        return {}
    window, types = _count(config, "sliding_window"), config.get("layer_types")
    if every and types is None:
        return {"window": window}
    if types is None:
        if not config.get("use_sliding_window", False):
            return {}
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(shape["blocks"])]
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != shape["blocks"] or any(kind not in known for kind in types):
        raise CheckpointError(f"config.json: layer_types must name one of {', '.join(known)} for each layer")
    sliding = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    return {"window": window, "sliding": sliding} if sliding else {}


def _rope(config: Config, values: Any) -> dict[str, Any]:
    """A rope as our config writes it, from either generation of Hugging Face's fields."""
    old = config.get("rope_scaling") or {}
    if not isinstance(old, dict) or not isinstance(values, dict | None):
        raise CheckpointError(f"config.json: rope_scaling is {old!r}, expected an object")
    values = values or {"rope_theta": config.get("rope_theta", 10_000.0), **old}
    kind = values.get("rope_type") or values.get("type") or "default"
    theta = _number(values, "rope_theta", _number(config, "rope_theta", 10_000.0))
    if values.get("partial_rotary_factor", 1) != 1 or config.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError("config.json: partial_rotary_factor is not 1, which is not supported")
    if kind == "default":
        return {"theta": theta}
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not one of default, linear, llama3, yarn")
    rope: dict[str, Any] = {"type": kind, "theta": theta, "factor": _number(values, "factor")}
    if kind == "linear":
        return rope
    limit = config.get("max_position_embeddings")
    rope["original"] = _count(
        {"original_max_position_embeddings": limit, **_given(values)}, "original_max_position_embeddings"
    )
    if kind == "llama3":
        return rope | {name: _number(values, name) for name in ("low_freq_factor", "high_freq_factor")}
    rope |= {name: _number(values, name) for name in ("beta_fast", "beta_slow") if values.get(name)}
    if values.get("truncate") is False:
        rope["truncate"] = False
    length = _yarn_length(values, rope["factor"])
    return rope if length is None else {**rope, "length": length}


def _yarn_length(values: Config, factor: float) -> float | None:
    if values.get("attention_factor") is not None:
        return _number(values, "attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        above, below = (
            0.1 * _number(values, name) * math.log(factor) + 1 if factor > 1 else 1.0
            for name in ("mscale", "mscale_all_dim")
        )
        return above / below
    return None


def _given(values: Config) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _count(config: Config, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= MAX_SIZE * 16:
        raise CheckpointError(f"config.json: {name} is {value!r}, expected a whole number above 0")
    return value


def _number(config: Config, name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {name} is {value!r}, expected a number above 0")
    return float(value)

"""The plugin: registers our model and the format of our config.json with vLLM, in every process vLLM starts.

Entry point `nested` of the group `vllm.general_plugins`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
from vllm.transformers_utils import config as configs
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from nested_runtime.models.loading import resolve
from nested_runtime.tokenizer import END, SPECIAL

__all__ = ["ARCHITECTURE", "FORMAT", "NestedConfig", "NestedConfigParser", "register"]

ARCHITECTURE = "NestedForCausalLM"
FORMAT = "nested"  # of config.json, as --config-format has it


class NestedConfig(PreTrainedConfig):  # type: ignore[misc]  # vLLM and transformers are not installed where mypy runs
    """What vLLM asks of a model, and our own config as `nested`."""

    model_type = "nested"


class NestedConfigParser(ConfigParserBase):  # type: ignore[misc]
    """Reads a checkpoint folder's config.json."""

    def parse(self, model: str | Path, *_: Any, **__: Any) -> tuple[dict[str, Any], PreTrainedConfig]:
        """vLLM's interface: the config as a mapping and as an object."""
        fields = json.loads((resolve(str(model)) / "config.json").read_text(encoding="utf-8"))
        config = NestedConfig(
            architectures=[ARCHITECTURE],
            vocab_size=fields["vocab_size"],
            hidden_size=fields["dim"],
            num_hidden_layers=fields["blocks"],
            num_attention_heads=fields["heads"],
            max_position_embeddings=fields.get("max_context", 1 << 20),
            eos_token_id=SPECIAL.index(END),
            tie_word_embeddings=True,
            dtype="float32",
            nested=fields,
        )
        return config.to_dict(), config


def register() -> None:
    """Make everything known to vLLM; safe to call again."""
    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    here = __name__.rpartition(".")[0]
    ModelRegistry.register_model(ARCHITECTURE, f"{here}.model:NestedForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = MambaModelConfig
    configs.register_config_parser(FORMAT)(NestedConfigParser)

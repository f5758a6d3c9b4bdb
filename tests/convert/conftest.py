"""Small random checkpoints as `transformers` writes them, one per architecture and rope variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers", reason="the oracle of these tests is not installed")

from nested_runtime.convert.cli import convert  # noqa: E402
from nested_runtime.convert.levels import Stack  # noqa: E402
from nested_runtime.models import loading  # noqa: E402

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-biased-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm": ("Llama", {"num_attention_heads": 6, "hidden_size": 48, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 6, "layer_types": MIXED, "query_pre_attn_scalar": 20}),
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with ChatML tokens, saved by transformers."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello there, how are you today?", "I am fine; my name is Rex."] * 20, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(folder)


def write_checkpoint(folder: Path, case: str, **save: Any) -> Any:
    """A random model of a case, saved with its tokenizer; returns the transformers model."""
    kind, fields = CASES[case]
    torch.manual_seed(len(case))
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **fields})
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, **save)
    write_tokenizer(folder)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and transformers model of a case, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(case: str) -> tuple[Path, Any]:
        if case not in made:
            folder = tmp_path_factory.mktemp(case) / "source"
            made[case] = folder, write_checkpoint(folder, case)
        return made[case]

    return get


@pytest.fixture
def converted(tmp_path: Path, checkpoint: Callable[[str], tuple[Path, Any]]) -> Callable[..., Any]:
    """(transformers model, our LoadedModel) of a case."""

    def get(case: str, stack: Stack | None = None, **extra: Any) -> tuple[Any, loading.LoadedModel]:
        folder, theirs = checkpoint(case)
        convert(folder, tmp_path / case, extra, stack=stack)
        return theirs, loading.load(str(tmp_path / case))

    return get

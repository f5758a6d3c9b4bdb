"""A small trained tokenizer, and one TINY model of every registered family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import save_model
from nested_runtime.registry import FAMILIES
from nested_runtime.tokenizer import SPECIAL, Tokenizer

TEXT = ["my dog is called Rex, and my sister lives in Lisbon.", "naïve café, 10 % of 250 €; こんにちは 😀"] * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 entries: 5 special, 256 bytes and 39 merges."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return Tokenizer(backend)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every registered family's name."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LanguageModel]:
    """A float64 model of a family's TINY config with no parameter left at zero; fields can be overridden.

    The same weights whatever ran before.
    """

    def make(family: str, **fields: object) -> LanguageModel:
        kind = FAMILIES.get(family)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(5)
            model: LanguageModel = kind.from_config({**kind.TINY, **fields}).double()
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer, make_model: Callable[..., LanguageModel]) -> Path:
    """A saved Hope that fits the tokenizer."""
    save_model(tmp_path / "tiny", "hope", make_model("hope", vocab_size=300), tokenizer, dtype=torch.float32)
    return tmp_path / "tiny"

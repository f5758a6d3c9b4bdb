"""The price on writing idle text: which gates it judges, and that training by it shuts them and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.loading import build
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus
from nested_runtime.train.quiet import ETA, FAR, SHUT, Quiet
from nested_runtime.train.trainer import TrainConfig, Trainer

HOPE = {"vocab_size": 512, "dim": 32, "blocks": 2, "heads": 2, "head_dim": 16, "chunk": 16, "mlp_ratio": 2}
CONFIG = TrainConfig("hope", HOPE, tokens=4 * 32 * 40, lanes=4, length=32, warmup=2, bf16=False)
Gates = Callable[[torch.nn.Module], list[torch.Tensor]]
TOKENS = torch.arange(24).view(2, 12)


def watched(model: torch.nn.Module) -> list[torch.Tensor]:
    """Where the gates of later forwards appear."""
    seen: list[torch.Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.memory.gate_logits.register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


def test_the_price_is_the_formula_over_idle_tokens() -> None:
    model = build("hope", HOPE)
    quiet, seen = Quiet(model), watched(model)
    model.scan(TOKENS, None, 0)
    idle = torch.zeros(2, 12, dtype=torch.bool)
    idle[0, 3:7], idle[1, 11] = True, True
    expected = 0.0
    for gates in seen:
        for head in range(2):
            eta, alpha = (torch.cat([gates[0, 3:7, gate, head], gates[1, 11:, gate, head]]).double() for gate in (0, 1))
            keeps = torch.exp(FAR * torch.log(torch.sigmoid(alpha)).mean())
            expected += (keeps * (eta - SHUT).clamp(min=0).mean()).item() / len(seen)
    assert quiet.price(idle).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_nothing_idle_costs_nothing_and_every_forward_is_judged_once() -> None:
    model = build("hope", HOPE)
    quiet = Quiet(model)
    model.scan(TOKENS, None, 0)
    assert quiet.price(torch.zeros(2, 12, dtype=torch.bool)) == 0
    assert quiet.price(torch.ones(2, 12, dtype=torch.bool)) == 0, "the forward before was judged already"
    with torch.no_grad():
        model.scan(TOKENS, None, 0)
    assert quiet.price(torch.ones(2, 12, dtype=torch.bool)) == 0, "an evaluation is not trained on"


def test_heads_that_forget_are_free_to_write() -> None:
    model = build("hope", HOPE)
    for block in model.blocks:
        block.memory.gate_bias.data[1, 0] = 0.0  # half of the memory is gone after every token
    quiet = Quiet(model)
    model.scan(TOKENS, None, 0)
    torch.autograd.backward(quiet.price(torch.ones(2, 12, dtype=torch.bool)))
    gradient = model.blocks[-1].memory.gate_bias.grad  # no later gate sees what this block reads
    assert gradient[ETA, 0] == 0
    assert gradient[ETA, 1] > 0
    assert not gradient[1].any(), "the price is not lowered by forgetting"


def test_training_shuts_the_gates_for_idle_text(tmp_path: Path, corpus: Corpus, small_tokenizer: Tokenizer) -> None:
    def eta_of_idle(quiet: float) -> float:
        trainer = Trainer(replace(CONFIG, quiet=quiet), small_tokenizer, corpus, tmp_path, 0, 1)
        for _ in range(trainer.steps):
            trainer.train_step()
        seen = watched(trainer.model)
        found = []
        for _ in range(8):
            tokens, _, _, idle = (torch.from_numpy(array) for array in trainer.lanes.next())
            trainer.model.scan(tokens[:, :-1], None, 0)
            found += [gates[idle][:, ETA, -1] for gates in seen]
            seen.clear()
        return torch.cat(found).mean().item()

    assert eta_of_idle(0.5) < eta_of_idle(0.0) - 0.5


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(ConfigError, match="'quiet'"):
        replace(CONFIG, quiet=-1.0)

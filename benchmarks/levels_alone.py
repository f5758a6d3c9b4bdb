"""Do levels alone help with a user's next session, when keys and values are not kept? Carried, reset, foreign.

    python benchmarks/levels_alone.py --users 64 build/converted build/meta-trained

For converted models beside the transformer they were (`nested-eval adaptation` carries whole memories of any family).

Every user is a held-out memory dialogue (phrasings and values that training never draws), cut into two sessions: facts
told first, the rest later. The second is read with nothing of the first but what the levels learned:

    carried   levels of the user's own first session       still    no levels: the transformer, same context
    reset     fresh levels                                  context  no levels, and the first session in its context
    foreign   levels of another user's first session

Losses are nats a token over the second session, of all tokens and of answers' values alone. The bounds are 95 % of the
difference to "reset", over users.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nested_runtime.models import loading
from nested_runtime.models.base import LanguageModel
from nested_runtime.train.data import render_dialogue
from nested_runtime.train.dialogues import generate, stage
from nested_runtime.train.trainer import VALUE_WEIGHT

State = Mapping[str, torch.Tensor]
BATCH = 16


def users(tokenizer: object, count: int, first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [users, first + second + 1] and whether each is of a value that an answer gives."""
    rng = random.Random(2024)
    spec = replace(stage(0.5), facts=(5, 9), questions=(24, 36), small_talk=(0, 1))
    tokens, values, length = [], [], first + second + 1
    while len(tokens) < count:
        session = render_dialogue(generate(rng, "dev", spec), tokenizer)  # type: ignore[arg-type]  # ours or a hub's
        if len(session.tokens) >= length:
            tokens.append(session.tokens[:length].astype(np.int64))
            values.append(session.weights[:length] > VALUE_WEIGHT)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(values))


def only_levels(model: LanguageModel, state: State) -> dict[str, torch.Tensor]:
    """What a session keeps that keeps no keys and values: the levels and the chunk they wait for."""
    grows = {spec.name: spec.fresh_shape for spec in model.state_spec() if spec.grows}
    return {name: t.new_zeros(len(t), *grows[name]) if name in grows else t for name, t in state.items()}


def losses(model: LanguageModel, state: State | None, tokens: torch.Tensor, begin: int, skip: int = 0) -> torch.Tensor:
    """Of predicting tokens[:, skip + 1:] from `state` at `begin`, [B, T]."""
    hidden, _ = model.scan(tokens[:, :-1], state, begin)
    logits = model.logits(hidden[:, skip:])
    return cross_entropy(logits.transpose(1, 2), tokens[:, skip + 1 :], reduction="none")


@torch.no_grad()
def measure(model: LanguageModel, still: LanguageModel, tokens: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """Losses [B, second] of a batch of users in every condition."""
    cut = first + 1  # the level's last step of the first session needs the token after its chunk
    _, learned = model.scan(tokens[:, :cut], None, 0)
    learned = only_levels(model, learned)
    foreign = {name: t.roll(1, 0) for name, t in learned.items()}
    second = tokens[:, cut:]
    return {
        "carried": losses(model, learned, second, cut),
        "reset": losses(model, None, second, cut),
        "foreign": losses(model, foreign, second, cut),
        "still": losses(still, None, second, cut),
        "context": losses(still, None, tokens, 0, skip=cut),
    }


def without_levels(loaded: loading.LoadedModel) -> LanguageModel:
    """The same weights, nothing learning."""
    fields = {**loaded.model.to_config(), "levels": []}
    still = loading.build(loaded.config["family"], fields)
    still.load_state_dict(loaded.model.state_dict(), strict=False)
    return still.eval().requires_grad_(False)


def report(found: dict[str, torch.Tensor], values: torch.Tensor) -> dict[str, dict[str, float]]:
    """Mean losses, and the difference to "reset" with its 95 % bounds over users."""
    rows = {}
    for name, loss in found.items():
        row = {"loss": float(loss.mean()), "values": float(loss[values].mean())}
        difference = (loss - found["reset"]).mean(1)
        row |= {"minus_reset": float(difference.mean()), "bound": 1.96 * float(difference.std()) / len(loss) ** 0.5}
        rows[name] = {key: round(value, 4) for key, value in row.items()}
    return rows


def main() -> None:
    """Measure every model folder given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders with levels")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--first", type=int, default=512, help="tokens of the first session")
    parser.add_argument("--second", type=int, default=256, help="and of the second")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        loaded = loading.load(name)
        tokens, values = users(loaded.tokenizer, args.users, args.first, args.second)
        parts = [
            measure(loaded.model, without_levels(loaded), batch, args.first) for batch in torch.split(tokens, BATCH)
        ]
        rows = report({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, values[:, args.first + 2 :])
        print(name, json.dumps(loaded.config["levels"]))
        for key, row in rows.items():
            print(f"  {key:8} " + "  ".join(f"{n} {v:+.4f}" for n, v in row.items()), flush=True)


if __name__ == "__main__":
    main()

"""`nested-eval adaptation`: is what was read worth anything later? Loss of the next session with three memories.

A user has K sessions. In each some new facts are told and some facts of any earlier session are asked for, with small
talk between. After session k, session k+1 is read from the memory carried so far, from a reset one, and from the
memory of another user at the same place. Every memory reads the same tokens: a boundary (user, k) is won where the
carried memory's mean next-token loss is lower. A model with levels is measured with their steps (CMS on) and with step
size 0 (CMS off): everything else is equal.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nested_runtime.errors import ConfigError
from nested_runtime.evals.report import aligned, percent
from nested_runtime.evals.scoring import wilson
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import LoadedModel, build, load
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import render_dialogue
from nested_runtime.train.dialogues import Dialogue, DialogueSpec, ExhaustedError, Writer
from nested_runtime.train.messages import Weights

__all__ = ["WHAT", "Losses", "arguments", "compare", "run", "users", "without_steps"]

WHAT = "loss of a user's next session with carried memory, reset memory and another user's memory; levels on and off"
MEMORIES = ("carried", "reset", "other")
STYLE = DialogueSpec(p_pair=0.0)
TOLD, ASKED, CHATS = 2, 4, 1  # of a session: facts told, questions, exchanges of small talk
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Losses:
    """Mean losses in nats per memory, [users, boundaries]: of all tokens, and of values in answers (NaN if none)."""

    all: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--users", type=int, default=24, help="users, each with sessions of their own (default 24)")
    parser.add_argument("--sessions", type=int, default=6, help="sessions of a user (default 6)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a session (default 256)")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure a checkpoint; the table and its JSON."""
    if args.users < 2 or args.sessions < 2:
        raise ConfigError(f"--users and --sessions must be at least 2, got {args.users} and {args.sessions}")
    loaded = load(args.model or "hope-nano")
    if any(spec.grows for spec in loaded.model.state_spec()):
        raise ConfigError(
            f"adaptation compares memories of a fixed size, but that of {loaded.id!r} grows with its tokens"
        )
    tokens, weights = users(loaded.tokenizer, args.users, args.sessions, args.length, args.seed)
    models = {"as it is": loaded.model}
    if loaded.model.update_chunk:
        models = {"CMS on": loaded.model, "CMS off": without_steps(loaded)}
    rows = [row for name, model in models.items() for row in _rows(name, compare(model, tokens, weights))]
    model = {"name": loaded.id, "fingerprint": loaded.fingerprint, "where": str(loaded.folder)}
    return _table(loaded.id, rows), {"model": model, "rows": rows}


def without_steps(loaded: LoadedModel) -> LanguageModel:
    """The same weights with levels whose step size is 0."""
    fields = {name: value for name, value in loaded.config.items() if name not in ("family", "name")}
    fields["levels"] = [{**level, "rate": 0.0} for level in fields["levels"]]
    model = build(str(loaded.config["family"]), fields)
    model.load_state_dict(loaded.model.state_dict())
    return model.eval().requires_grad_(False)


# ---- what the users say ----------------------------------------------------------------------------------------------


def users(tokenizer: Tokenizer, count: int, sessions: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss weights [users, sessions, length + 1]; the last token is predicted, not read."""
    rendered = [_user(tokenizer, random.Random(f"{seed}:{i}"), sessions, length) for i in range(count)]
    tokens, weights = (np.stack(arrays) for arrays in zip(*rendered, strict=True))
    return tokens.astype(np.int64), weights


def _user(tokenizer: Tokenizer, rng: random.Random, sessions: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    for _ in range(100):
        try:
            parts = list(_sessions(tokenizer, Writer(rng, "dev", STYLE), sessions, length))
        except ExhaustedError:
            continue
        return np.stack([tokens for tokens, _ in parts]), np.stack([weights for _, weights in parts])
    raise ConfigError(f"no user of {sessions} sessions can be written; use fewer --sessions")


def _sessions(
    tokenizer: Tokenizer, writer: Writer, sessions: int, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sessions of exactly `length` tokens: more questions and small talk until it is full, then cut."""
    for _ in range(sessions):
        begin, known = len(writer.messages), bool(writer.facts)
        events = ["ask"] * (ASKED if known else 0) + ["tell"] * TOLD + ["chat"] * CHATS
        writer.rng.shuffle(events)
        size = 0
        while size <= length:
            event = events.pop() if events else writer.rng.choice(("ask", "chat"))
            _say(writer, event)
            session = render_dialogue(Dialogue(tuple(writer.messages[begin:]), ()), tokenizer)
            size = len(session.tokens)
        yield session.tokens[: length + 1], session.weights[: length + 1]


def _say(writer: Writer, event: str) -> None:
    if event == "tell":
        if (fact := writer.choose()) is None:
            raise ExhaustedError("no fact is left that could not be mistaken for another")
        writer.tell([fact])
    elif event == "ask" and writer.facts:
        writer.ask()
    else:
        writer.chat()


# ---- with which memory -----------------------------------------------------------------------------------------------


def compare(model: LanguageModel, tokens: np.ndarray, weights: np.ndarray) -> Losses:
    """Read every user's sessions one after the other and each of them from the three memories."""
    count, sessions, length = tokens.shape[0], tokens.shape[1], tokens.shape[2] - 1
    if length % (model.update_chunk or model.chunk):
        raise ConfigError(f"--length {length} must be a multiple of {model.update_chunk or model.chunk}, the chunk")
    _, state = _read(model, torch.from_numpy(tokens[:, 0]), None, 0)
    every: dict[str, list[np.ndarray]] = {name: [] for name in MEMORIES}
    values: dict[str, list[np.ndarray]] = {name: [] for name in MEMORIES}
    for k in range(1, sessions):
        memories = [state, _zeros(state), _next_users(state)]
        joined = {name: torch.cat([memory[name] for memory in memories]) for name in state}
        losses, after = _read(model, torch.from_numpy(np.tile(tokens[:, k], (3, 1))), joined, k * length)
        is_value = weights[:, k, 1:] >= Weights.value
        for name, part in zip(MEMORIES, np.split(losses, 3), strict=True):
            every[name].append(part.mean(1))
            hits = is_value.sum(1)
            values[name].append(np.where(hits, (part * is_value).sum(1) / np.maximum(hits, 1), np.nan))
        state = {name: tensor[:count] for name, tensor in after.items()}
    stacked = [{name: np.stack(rows, 1) for name, rows in figures.items()} for figures in (every, values)]
    return Losses(*stacked)


def _read(
    model: LanguageModel, tokens: torch.Tensor, state: State | None, position: int
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Losses [N, L] of predicting tokens[:, 1:] of [N, L + 1], and the state after the first L."""
    with torch.no_grad():  # not inference mode: levels take their gradients within
        hidden, after = model.scan(tokens[:, :-1], state, position)
        logits = model.logits(hidden.flatten(0, 1))
        losses = cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    return losses.numpy(), {name: tensor.detach() for name, tensor in after.items()}


def _zeros(state: State) -> State:
    """Fresh memories at the same place of the clock; the chunk of a level is full there, so it starts anew."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def _next_users(state: State) -> State:
    return {name: tensor.roll(1, 0) for name, tensor in state.items()}


# ---- figures ---------------------------------------------------------------------------------------------------------


def _rows(name: str, losses: Losses) -> Iterator[dict[str, Any]]:
    for what, figures in (("all tokens", losses.all), ("values in answers", losses.values)):
        carried = figures["carried"]
        counted = np.isfinite(carried)
        wins = {f"below_{other}": int((carried < figures[other])[counted].sum()) for other in MEMORIES[1:]}
        means = {memory: float(np.nanmean(figures[memory])) for memory in MEMORIES}
        by_boundary = {memory: np.nanmean(figures[memory], axis=0).tolist() for memory in MEMORIES}
        yield {
            "levels": name, "tokens": what, "boundaries": int(counted.sum()), **wins, "loss": means,
            "loss_by_boundary": by_boundary,
        }  # fmt: skip


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [(title, "tokens", *MEMORIES, "carried < reset", "carried < other", "of")]
    for row in rows:
        losses = [f"{row['loss'][memory]:.3f}" for memory in MEMORIES]
        total = row["boundaries"]
        shares = [_share(row[f"below_{other}"], total) for other in MEMORIES[1:]]
        lines.append((row["levels"], row["tokens"], *losses, *shares, str(total)))
    return aligned(lines)


def _share(wins: int, total: int) -> str:
    low, high = wilson(wins, total)
    return f"{percent(wins / total)} % ({percent(low)} - {percent(high)})" if total else "-"

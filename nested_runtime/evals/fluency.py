"""Perplexity on held-out text, inside a window of 512 tokens and beyond it.

Every stream starts with a fresh memory. A stream of prose is the beginning of one long document; a stream of chats is
one chat after the other, as a session brings them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import LoadedModel, load
from nested_runtime.train.data import Corpus

__all__ = ["run", "streams", "token_losses"]

WINDOW = 512
LENGTH = 4 * WINDOW  # tokens of a stream
SEGMENT = 256
STREAMS = 32  # of each kind of text, unless --limit says otherwise


def run(model: str, control: str | None, data: Path, limit: int | None) -> tuple[str, dict[str, Any]]:
    """Measure one or two checkpoints; the table and its JSON."""
    rows, models = [], []
    for name in filter(None, (model, control)):
        loaded = load(name)
        parameters = sum(p.numel() for p in loaded.model.parameters())
        about = {"name": loaded.id, "fingerprint": loaded.fingerprint, "where": str(loaded.folder)}
        models.append({**about, "parameters": parameters})
        rows += [{"where": str(loaded.folder), **row} for row in _rows(loaded, data, limit or STREAMS)]
    return _table(rows), {"model": models[0], "control": models[1] if len(models) > 1 else None, "rows": rows}


def _rows(loaded: LoadedModel, data: Path, count: int) -> Iterator[dict[str, Any]]:
    corpus = Corpus(data, loaded.tokenizer, held_out=True)
    for kind, texts, packed in (("chats", corpus.chats, True), ("prose", corpus.prose, False)):
        tokens = streams(texts, LENGTH + 1, packed=packed)[:count]
        if not len(tokens):
            raise ConfigError(f"--data {data} has too little held-out text for a stream of {LENGTH} tokens of {kind}")
        losses = token_losses(loaded.model, torch.from_numpy(tokens))
        figures = {"inside": _perplexity(losses[:, :WINDOW]), "beyond": _perplexity(losses[:, WINDOW:])}
        yield {"model": loaded.id, "text": kind, "streams": len(tokens), "tokens": losses.numel(), **figures}


def _perplexity(losses: torch.Tensor) -> float | None:
    """None where the memory of a stream diverged."""
    mean = float(losses.double().mean())
    return math.exp(mean) if math.isfinite(mean) else None


def streams(texts: Sequence[np.ndarray], length: int, *, packed: bool) -> np.ndarray:
    """Token streams [N, length]: of all texts one after the other, or of the beginning of every long enough text."""
    if packed:
        joined = np.concatenate([*texts, np.empty(0, dtype=np.uint32)])
        return joined[: len(joined) // length * length].reshape(-1, length).astype(np.int64)
    found = [text[:length] for text in texts if len(text) >= length]
    return np.stack(found).astype(np.int64) if found else np.empty((0, length), dtype=np.int64)


@torch.inference_mode()
def token_losses(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of predicting tokens[:, 1:] of [N, T + 1], in nats, [N, T]; the state is carried along."""
    state, out = None, []
    for start in range(0, tokens.shape[1] - 1, SEGMENT):
        piece = tokens[:, start : start + SEGMENT + 1]
        hidden, state = model.scan(piece[:, :-1], state, start)
        logits = model.logits(hidden.flatten(0, 1)).float()
        out.append(cross_entropy(logits, piece[:, 1:].flatten(), reduction="none").view(len(tokens), -1))
    return torch.cat(out, dim=1)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["where"]) for row in rows)
    lines = [f"{'perplexity':{width}}  {'text':6} {'tokens':>8} {'first 512':>10} {'beyond':>10}"]
    for row in rows:
        inside, beyond = (f"{row[f]:.2f}" if row[f] is not None else "diverged" for f in ("inside", "beyond"))
        lines.append(f"{row['where']:{width}}  {row['text']:6} {row['tokens']:>8} {inside:>10} {beyond:>10}")
    return "\n".join(lines)

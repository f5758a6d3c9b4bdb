"""Choosing tokens: batched over sequences, each with its own parameters and its own random generator.

Every operation works row by row, so what a sequence samples does not depend on its batch companions. A sampled token
costs exactly one random number, drawn from the sequence's own generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from nested_runtime.core import SamplingParams, TokenLogprobs
from nested_runtime.errors import RequestError

__all__ = ["Chooser", "choose", "token_logprobs", "validate"]

_MAX_LOGPROBS = 1024
_FEW = 64  # torch.topk is fast up to 1/64 of a vocabulary of 4096


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError (with `param`) for a value outside its range."""
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("max_tokens", params.max_tokens, 0, math.inf),
        ("min_tokens", params.min_tokens, 0, params.max_tokens),
        ("temperature", params.temperature, 0, 100),
        ("top_p", params.top_p, 0, 1),
        ("top_k", params.top_k, 0, math.inf),
        ("min_p", params.min_p, 0, 1),
        ("presence_penalty", params.presence_penalty, -2, 2),
        ("frequency_penalty", params.frequency_penalty, -2, 2),
        ("repetition_penalty", params.repetition_penalty, 0.01, 100),
        ("logprobs", params.logprobs or 0, 0, _MAX_LOGPROBS),
        ("prompt_logprobs", params.prompt_logprobs or 0, 0, _MAX_LOGPROBS),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    for token, bias in params.logit_bias.items():
        if not math.isfinite(bias):
            raise RequestError(f"logit_bias of token {token} must be finite, got {bias}", param="logit_bias")


def _check_ids(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name}: token id {token} is not in 0..{vocab_size - 1}", param=name)


class Chooser:
    """What one sequence brings to sampling: parameters, generator, and the tokens that penalties look at.

    params       presence and frequency penalties count sampled tokens, the repetition penalty prompt tokens as well
    prompt       tokens of this turn's prompt
    end_tokens   suppressed, as are params.stop_token_ids, while fewer than params.min_tokens are sampled
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int] = (), end_tokens: Iterable[int] = ()) -> None:
        self.params = params
        self.num_sampled = 0
        self._counts: dict[int, int] = {}
        self._seen = set(prompt) if params.repetition_penalty != 1.0 else set()
        self._stops = sorted({*end_tokens, *params.stop_token_ids})
        self._generator: torch.Generator | None = None
        if params.temperature > 0:
            self._generator = torch.Generator()
            # Bits of any Python integer, so that -1 and 2**64 - 1 are the same valid seed.
            seed = self._generator.seed() if params.seed is None else params.seed % 2**64
            self._generator.manual_seed(seed)
        self._has_counts = bool(params.presence_penalty or params.frequency_penalty)
        self._has_edits = bool(self._has_counts or params.repetition_penalty != 1.0 or params.logit_bias)

    @property
    def edits_logits(self) -> bool:
        """Whether `edit` would change a row now."""
        return self._has_edits or self.num_sampled < self.params.min_tokens

    def edit(self, row: torch.Tensor) -> None:
        """Apply penalties, bias and the minimum length to logits [V] in place."""
        params = self.params
        if self._seen:
            seen = torch.tensor(sorted(self._seen))
            values = row[seen]
            factor = params.repetition_penalty
            row[seen] = torch.where(values > 0, values / factor, values * factor)
        if self._counts:
            tokens = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=row.dtype)
            row[tokens] -= params.frequency_penalty * counts + params.presence_penalty
        if params.logit_bias:
            biased = torch.tensor(list(params.logit_bias))
            row[biased] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype)
        if self.num_sampled < params.min_tokens:
            row[self._stops] = -torch.inf

    def draw(self) -> float:
        """One uniform number in [0, 1) of this sequence's generator."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def accept(self, token: int) -> None:
        """Count a sampled token."""
        self.num_sampled += 1
        if self._has_counts:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.params.repetition_penalty != 1.0:
            self._seen.add(token)


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Sample one token per row of logits [N, V] (float32, CPU; not changed) and count it in its chooser."""
    edited = [row for row, chooser in enumerate(choosers) if chooser.edits_logits]
    if edited:
        logits = logits.clone()
        for row in edited:
            choosers[row].edit(logits[row])
    tokens: list[int] = logits.numpy().argmax(axis=-1).tolist()  # torch.argmax takes ten times as long here
    random = [row for row, chooser in enumerate(choosers) if chooser.params.temperature > 0]
    if random:
        for row, token in zip(random, _sample(logits[random], [choosers[row] for row in random]), strict=True):
            tokens[row] = token
    for chooser, token in zip(choosers, tokens, strict=True):
        chooser.accept(token)
    return tokens


def _sample(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse-CDF samples of the rows of logits [N, V]."""
    temperature = torch.tensor([[c.params.temperature] for c in choosers], dtype=torch.float64)
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature
    weights = scaled.softmax(dim=-1)
    cut = [row for row, c in enumerate(choosers) if c.params.top_k or c.params.top_p < 1 or c.params.min_p > 0]
    if cut:
        weights[cut] = _truncate(weights[cut], [choosers[row].params for row in cut])
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    draws = torch.tensor([[chooser.draw()] for chooser in choosers], dtype=torch.float64)
    # Strictly below the total, or rounding could point behind the last token that has weight.
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens: list[int] = torch.searchsorted(cumulative, target, right=True).squeeze(-1).tolist()
    return tokens


def _truncate(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero the weights [N, V] that min_p, top_k and top_p drop, in this order; the most likely token always stays.

    Of equal weights at the very limit any may stay.
    """
    vocab_size = weights.shape[-1]
    rows = [(p.top_k or vocab_size, p.min_p, p.top_p if p.top_p < 1 else math.inf) for p in params]
    limits = torch.tensor(rows, dtype=torch.float64)
    # Sorting a vocabulary costs far more than finding a few tokens, which mostly are enough.
    kept, is_whole = _keep(weights, limits, min(_FEW, vocab_size))
    if not bool(is_whole.all()):
        rest = ~is_whole
        kept[rest] = _keep(weights[rest], limits[rest], vocab_size)[0]
    return kept


def _keep(weights: torch.Tensor, limits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept weights [N, V] under limits [N, 3] (top_k, min_p, top_p), looking at the `width` most likely tokens only.

    Second result [N]: whether all kept tokens are among those.
    """
    top_k, min_p, top_p = limits.split_with_sizes([1, 1, 1], dim=-1)
    ordered, order = weights.topk(width, dim=-1)
    rank = torch.arange(width)
    kept = ordered * ((rank < top_k) & (ordered >= min_p * ordered[:, :1]))
    goes_on = (kept[:, -1:] > 0) & (rank[-1] + 1 < top_k) & (width < weights.shape[-1])
    # Rows that go on know the total of their candidates only if there is no other limit than top_p.
    is_free = (top_k >= weights.shape[-1]) & (min_p == 0)
    total = torch.where(goes_on, weights.sum(dim=-1, keepdim=True), kept.sum(dim=-1, keepdim=True))
    before = kept.cumsum(dim=-1) - kept
    inside = (before < top_p * total) | (rank == 0)
    is_whole = ~goes_on | (is_free & (kept.sum(dim=-1, keepdim=True) >= top_p * total))
    return torch.zeros_like(weights).scatter_(-1, order, kept * inside), is_whole.squeeze(-1)


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of one token per row under the model's own distribution (logits [N, V] before any edit).

    num_top: alternatives to list per row; None = no entry for that row.
    """
    rows = [row for row, count in enumerate(num_top) if count is not None]
    result: list[TokenLogprobs | None] = [None] * len(tokens)
    if not rows:
        return result
    logprobs = logits[rows].float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, torch.tensor([[tokens[row]] for row in rows]))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    width = min(max(num_top[row] or 0 for row in rows), logits.shape[-1])
    values, ids = logprobs.topk(width, dim=-1)
    columns = (chosen.squeeze(-1).tolist(), ranks.tolist(), values.tolist(), ids.tolist())
    for row, logprob, rank, top_values, top_ids in zip(rows, *columns, strict=True):
        top = tuple(zip(top_ids, top_values, strict=True))[: num_top[row]]
        result[row] = TokenLogprobs(tokens[row], logprob, top, rank)
    return result

"""The words of the system: what is asked (`SamplingParams`), what runs (`Sequence`, `Batch`), what comes back.

Field comments name who sets a field. Lengths are named by where the tokens are: `num_done` tokens are in the state,
`num_new` are read in this step.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["Batch", "FinishReason", "KVRows", "SamplingParams", "Sequence", "TokenEvent", "TokenLogprobs", "TurnResult"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Defaults are OpenAI's; `temperature` 0 is greedy and reproducible."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None  # number of alternatives beside the chosen token; None = no logprobs
    prompt_logprobs: int | None = None  # the same for every prompt token (echo, scoring)


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"  # end token, stop token or stop string
    LENGTH = "length"  # max_tokens
    ABORT = "abort"  # client gone, drain, lease lost
    ERROR = "error"  # the sequence failed; TokenEvent.error says why


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token and of the most likely alternatives (token id, logprob), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0  # 1 = the most likely token


@dataclass(eq=False)
class Sequence:
    """One turn in the engine: the tokens to read, then tokens sampled until a stop. Lives on the engine thread."""

    id: str  # caller; unique among running sequences
    prompt: list[int]  # caller: tokens the state has not read, `pending` first
    params: SamplingParams  # caller
    position: int = 0  # caller: session tokens in the start state; engine never changes it
    state: Mapping[str, torch.Tensor] | None = None  # caller: start state, None = fresh (zeros) or `fork_of`
    keep_state: bool = False  # caller: return the state when finished (sessions); False = thrown away
    keep_state_at_prompt: bool = False  # caller: return the state as it was when the prompt was read (learn="prompt")
    stop_check: Callable[[int], bool] | None = None  # caller: engine thread sees every new token; True = stop here
    fork_of: str | None = None  # caller: a sequence submitted before, same prompt and start; its prefill is shared
    cache_key: tuple[str, ...] | None = None  # caller: (tenant, start state ...) of prefixes others share; None = off
    cache_upto: int | None = None  # caller: longest prefix under cache_key; None = the whole prompt
    cache_own: tuple[str, ...] | None = None  # caller: (tenant, session, start state) of all longer ones; None = off
    cache_points: tuple[int, ...] = ()  # caller: prompt lengths worth caching (ends of messages)
    slot: int = 0  # engine: 0 = not admitted
    num_done: int = 0  # engine: tokens of prompt + output in the state
    output: list[int] = field(default_factory=list)  # engine: sampled tokens; the last one is never in the state
    prompt_result: TurnResult | None = None  # engine: see keep_state_at_prompt

    @property
    def tokens(self) -> list[int]:
        """Prompt and sampled tokens."""
        return self.prompt + self.output


@dataclass(frozen=True)
class KVRows:
    """Where the rows of growing tensors lie in their block pool, seen as [blocks * 16, ...].

    read   [B, N] int64   pool row of each of a sequence's rows, oldest first, the new ones last; 0 = none
    num    [B] int64      rows of each sequence after this step, its new tokens included
    write  [T] int64      pool row of each token of the batch
    """

    read: torch.Tensor
    num: torch.Tensor
    write: torch.Tensor


@dataclass
class Batch:
    """One packed engine step over B sequences and T tokens (decode = 1 token of a sequence, prefill = a run of them).

    token_ids   [T] int64     tokens, sequence after sequence
    cu_seqlens  [B+1] int32   sequence b owns token_ids[cu_seqlens[b]:cu_seqlens[b+1]]
    slots       [B] int32     pool slot of each sequence; 0 = padding (its results are ignored, its state stays zero)
    positions   [B] int64     session tokens absorbed before this step (chunk offset = positions % C)
    kv                        where growing state tensors lie; None where the model has none
    longest                   tokens of the longest sequence where the host knows it: 1 = a decode step
    """

    token_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    kv: KVRows | None = None
    longest: int | None = None


@dataclass(frozen=True)
class TokenEvent:
    """What an engine step says about one sequence. The last event of a sequence has `finish`."""

    sequence_id: str
    token: int | None = None  # None on events that carry no token (abort, error, prompt logprobs only)
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, with the first event, when asked for
    finish: FinishReason | None = None
    error: Exception | None = None
    result: TurnResult | None = None  # with `finish`, when the sequence asked to keep its state
    num_cached: int = 0  # with `finish`: prompt tokens that the prefix cache had read before


@dataclass(frozen=True)
class TurnResult:
    """The state a finished sequence leaves, detached from the pool.

    state     tensors by TensorSpec name (CPU copies)
    position  session tokens in `state`
    pending   the sampled token that is not in `state` yet and must be read first next time (None if none)
    updates   chunks of this turn after which levels learned; refused: chunks after which they diverged and did not
    """

    state: Mapping[str, torch.Tensor]
    position: int
    pending: int | None
    updates: int = 0
    refused: int = 0

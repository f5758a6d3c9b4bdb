"""Between our words and vLLM's: sampling parameters there, log-probabilities back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind

from nested_runtime.core import SamplingParams, TokenLogprobs

__all__ = ["MAX_LOGPROBS", "to_logprobs", "to_vllm"]

MAX_LOGPROBS = 1024


def to_vllm(params: SamplingParams, end_tokens: Collection[int], transfer: Mapping[str, str]) -> VllmParams:
    """vLLM's parameters. Stop strings are not among them: see backend.py. At least one token is sampled."""
    ends = () if params.ignore_eos else tuple(end_tokens)
    return VllmParams(
        max_tokens=max(1, params.max_tokens),
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p or 1e-9,  # ours may be 0: the most likely token alone
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        stop_token_ids=sorted({*ends, *params.stop_token_ids}),
        ignore_eos=True,  # our end tokens are among stop_token_ids
        seed=None if params.seed is None else params.seed % 2**63,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        skip_reading_prefix_cache=False,  # a state that is to be loaded is loaded, whatever else is asked
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": dict(transfer)} if transfer else None,
    )


def to_logprobs(token: int, found: Mapping[int, Any], count: int) -> TokenLogprobs:
    """vLLM's mapping of token -> Logprob at one place as ours, with `count` alternatives."""
    chosen = found[token]
    best = sorted(found.items(), key=lambda item: item[1].rank)[:count]
    return TokenLogprobs(token, chosen.logprob, tuple((other, entry.logprob) for other, entry in best), chosen.rank)

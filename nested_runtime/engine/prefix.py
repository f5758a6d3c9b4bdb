"""PrefixCache: states after prompt prefixes, so that a shared prefix is read once.

A key is (tenant, session or "", start state, position, digest of the tokens read from there): two prompts share an
entry only if the same tenant read the same tokens from the same start state, and beyond `cache_upto` only within one
session. All lengths count prompt tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping

import torch

from nested_runtime.core import Sequence
from nested_runtime.state.cache import StateCache

__all__ = ["PrefixCache"]

Key = tuple[str, ...]

_MIN_GRAIN = 16  # tokens between two possible lengths
_FIRST = 128  # tokens before the first point and between two; beyond 2,048 a sixteenth of the power of two below


class PrefixCache:
    """Which prefixes to keep, and the longest one kept.

    chunk      states are kept where the session's own token count is a multiple of it (no unfinished tail), and of a
               session's own prefixes also before the last token: the same turn again then reads that token only
    max_bytes  of all kept states; 0 = keep nothing
    """

    def __init__(self, chunk: int, max_bytes: int) -> None:
        self.grain = chunk * max(1, _MIN_GRAIN // chunk)
        self.num_queries = 0
        self.num_hits = 0
        self.num_hit_tokens = 0
        self.states = StateCache(max_bytes)

    def keys(self, sequence: Sequence) -> dict[int, Key]:
        """Length -> key of every prefix that could be kept, shortest first; the last token is always left to read."""
        # Prompt log-probabilities need every token read.
        if not self.states.max_bytes or sequence.params.prompt_logprobs is not None:
            return {}
        keys: dict[int, Key] = {}
        digest, done = hashlib.sha256(), 0
        for length in self._lengths(sequence):
            digest.update(array("q", sequence.prompt[done:length]).tobytes())
            whose = sequence.cache_key if length < _shared_end(sequence) else sequence.cache_own
            keys[length] = (*(whose or ()), str(sequence.position), digest.hexdigest())
            done = length
        return keys

    def _lengths(self, sequence: Sequence) -> list[int]:
        end = _shared_end(sequence) if sequence.cache_own is None else len(sequence.prompt)
        lengths = list(range(self.grain - sequence.position % self.grain, end, self.grain))
        last = len(sequence.prompt) - 1
        if sequence.cache_own is not None and last >= _MIN_GRAIN and last not in lengths:
            lengths.append(last)
        return lengths

    def points(self, sequence: Sequence, lengths: Iterable[int]) -> list[int]:
        """Those of `lengths` to keep: at the caller's points, the last, and what is shared so densely that no prefix of
        2,000 tokens or more is read again by more than a sixteenth, but never more than sixteen for a doubling.
        """
        available = sorted(lengths)
        wanted = [len(sequence.prompt), *sequence.cache_points]
        length = _FIRST
        while available and length <= min(available[-1], _shared_end(sequence)):
            wanted.append(length)
            length += max(_FIRST, (1 << length.bit_length() - 1) // 16)
        floors = (available[at - 1] if (at := bisect_right(available, want)) else 0 for want in wanted)
        return sorted(set(floors) - {0})

    def find(self, keys: Mapping[int, Key]) -> tuple[int, Mapping[str, torch.Tensor] | None]:
        """(length, state) of the longest kept prefix among `keys`; (0, None) if there is none."""
        self.num_queries += bool(keys)
        for length in sorted(keys, reverse=True):
            state = self.states.get(keys[length])
            if state is not None:
                self.num_hits += 1
                self.num_hit_tokens += length
                return length, state
        return 0, None


def _shared_end(sequence: Sequence) -> int:
    """Prefixes shorter than this are shared under cache_key."""
    if sequence.cache_key is None:
        return 0
    whole = len(sequence.prompt)
    return whole if sequence.cache_upto is None else min(whole, sequence.cache_upto + 1)

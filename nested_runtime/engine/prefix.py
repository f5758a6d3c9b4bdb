"""PrefixCache: states after prompt prefixes, so that a shared prefix is read once.

A key is (tenant, start state ..., position, digest of the tokens read from there): two prompts share an entry only if
the same tenant read the same tokens from the same start state. All lengths count prompt tokens.
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

    chunk      states are kept where the session's own token count is a multiple of it (no unfinished tail)
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
        if not self.states.max_bytes or sequence.cache_key is None or sequence.params.prompt_logprobs is not None:
            return {}
        end = (
            len(sequence.prompt) if sequence.cache_upto is None else min(len(sequence.prompt), sequence.cache_upto + 1)
        )
        keys: dict[int, Key] = {}
        digest, done = hashlib.sha256(), 0
        for length in range(self.grain - sequence.position % self.grain, end, self.grain):
            digest.update(array("q", sequence.prompt[done:length]).tobytes())
            keys[length] = (*sequence.cache_key, str(sequence.position), digest.hexdigest())
            done = length
        return keys

    def points(self, sequence: Sequence, lengths: Iterable[int]) -> list[int]:
        """Those of `lengths` to keep: at the caller's points, the last, and so densely that no shared prefix of 2,000
        tokens or more is read again by more than a sixteenth, but never more than sixteen for a doubling.
        """
        available = sorted(lengths)
        wanted = [len(sequence.prompt), *sequence.cache_points]
        length = _FIRST
        while available and length <= available[-1]:
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

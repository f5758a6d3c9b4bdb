"""Job: a sequence while it is in the engine."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nested_runtime.core import Sequence, TokenLogprobs
from nested_runtime.sampling import Chooser

__all__ = ["Job"]


@dataclass(eq=False)
class Job:
    """One sequence and what the engine needs beside it."""

    sequence: Sequence
    chooser: Chooser
    state: Mapping[str, torch.Tensor] | None  # loaded into the slot on admission
    cuts: list[int] = field(default_factory=list)  # prompt lengths that prefill stops at, ascending, all > num_done
    cache_keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # prompt length -> prefix cache key
    followers: list[Job] = field(default_factory=list)  # forks that wait for this prefill
    leader: Job | None = None  # the job whose prefill this fork waits for
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finishing: bool = False  # stop as soon as the prompt is read
    is_silent: bool = True  # no event sent yet

    @property
    def num_unread(self) -> int:
        """Tokens known but not in the state yet: the rest of the prompt, or one sampled token."""
        return len(self.sequence.prompt) + len(self.sequence.output) - self.sequence.num_done

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are still unread."""
        return self.sequence.num_done < len(self.sequence.prompt)

    @property
    def room(self) -> int:
        """Tokens this job may read in one step: up to the next cut or the prompt's end; 1 when decoding."""
        end = self.cuts[0] if self.cuts else len(self.sequence.prompt)
        return end - self.sequence.num_done if self.is_prefilling else 1

    @property
    def place(self) -> int:
        """Session tokens in the state now."""
        return self.sequence.position + self.sequence.num_done

    @property
    def wants_token(self) -> bool:
        """Whether another token shall be sampled once everything known is read."""
        return not self.finishing and len(self.sequence.output) < self.sequence.params.max_tokens

    def add_cut(self, length: int) -> None:
        """Make prefill stop when `length` prompt tokens are read, if that is still ahead and before the end."""
        if self.sequence.num_done < length < len(self.sequence.prompt) and length not in self.cuts:
            insort(self.cuts, length)

    def next_tokens(self, num_new: int) -> list[int]:
        """The next `num_new` tokens to read."""
        done, prompt = self.sequence.num_done, self.sequence.prompt
        if done < len(prompt):
            return prompt[done : done + num_new]
        return self.sequence.output[done - len(prompt) : done - len(prompt) + num_new]

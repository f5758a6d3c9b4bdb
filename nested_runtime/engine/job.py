"""Job: a sequence while it is in the engine."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nested_runtime.core import Sequence, TokenLogprobs
from nested_runtime.engine.runner import Span
from nested_runtime.errors import UpdateDiverged
from nested_runtime.sampling import Chooser

__all__ = ["Job"]

ONE_ROW, NO_ROW = range(1), range(0)  # of a step that reads one token


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
    chunk: int = 0  # C_1 of the model's levels; 0 = nothing adapts
    filled: int = 0  # tokens read of the present chunk; at `chunk` the levels must step before the next token
    due_since: int = 0  # step in which the chunk was full
    studied: int = 0  # tokens of the present chunk whose gradient is in `gradients`
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of one session, by name
    updates: int = 0  # steps of the levels in this turn
    refused: int = 0  # steps that diverged and were not taken
    num_cached: int = 0  # prompt tokens that were in the prefix cache
    finishing: bool = False  # stop as soon as the prompt is read
    is_silent: bool = True  # no event was sent yet

    @property
    def num_unread(self) -> int:
        """Tokens known but not in the state yet: the rest of the prompt, or one sampled token."""
        return len(self.sequence.prompt) + len(self.sequence.output) - self.sequence.num_done

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are still unread."""
        return self.sequence.num_done < len(self.sequence.prompt)

    @property
    def is_due(self) -> bool:
        """Whether the levels must step before the next token is read."""
        return 0 < self.chunk == self.filled

    @property
    def room(self) -> int:
        """Tokens this job may read in one step: up to the chunk's end, the next cut or the prompt's end; 1 decoding."""
        end = self.cuts[0] if self.cuts else len(self.sequence.prompt)
        room = end - self.sequence.num_done if self.is_prefilling else 1
        return min(room, self.chunk - self.filled) if self.chunk else room

    def advance(self, num_new: int, step: int) -> None:
        """`num_new` tokens were read in step number `step`."""
        self.sequence.num_done += num_new
        if self.chunk:
            self.filled += num_new
            self.due_since = step

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

    def can_lead(self, sequence: Sequence) -> bool:
        """Whether this job will read, from the same start, all but the last prompt token of `sequence`."""
        mine = self.sequence
        is_ahead = mine.num_done < len(mine.prompt) - 1
        is_same_start = mine.position == sequence.position and mine.state is sequence.state
        is_same_work = mine.params.prompt_logprobs == sequence.params.prompt_logprobs
        return is_ahead and is_same_start and is_same_work and mine.prompt == sequence.prompt

    def follow(self, leader: Job) -> None:
        """Wait until `leader` has read all but the last prompt token, to start from its state there."""
        self.leader = leader
        leader.followers.append(self)
        leader.add_cut(len(leader.sequence.prompt) - 1)

    def unfollow(self, state: Mapping[str, torch.Tensor]) -> None:
        """Start from the leader's state before the last prompt token."""
        if self.leader is not None:
            self.prompt_logprobs = list(self.leader.prompt_logprobs)
        self.leader, self.state = None, state
        self.sequence.num_done = len(self.sequence.prompt) - 1

    def span(self, num_new: int) -> Span:
        """The next `num_new` tokens, with the rows that a sampled token or prompt log-probabilities need."""
        if not self.is_prefilling:
            return Span(
                self.sequence.slot, self.place, self.sequence.output[-1:], ONE_ROW if self.wants_token else NO_ROW
            )
        is_last = num_new == self.num_unread
        end = num_new if self.wants_token or not is_last else num_new - 1
        first = num_new - 1 if is_last else num_new
        if self.sequence.params.prompt_logprobs is not None:
            first = 0
        return Span(self.sequence.slot, self.place, self.next_tokens(num_new), range(min(first, end), end))

    def next_tokens(self, num_new: int) -> list[int]:
        """The next `num_new` tokens to read; one, once the prompt is read."""
        done, prompt = self.sequence.num_done, self.sequence.prompt
        if done < len(prompt):
            return prompt[done : done + num_new]
        return self.sequence.output[done - len(prompt) : done - len(prompt) + num_new]

    def diverged(self) -> UpdateDiverged:
        """The error of a job whose results are not finite."""
        return UpdateDiverged(
            f"sequence {self.sequence.id!r} became non-finite between session tokens {self.sequence.position} and "
            f"{self.place + self.num_unread}; its state was dropped and the session keeps its old version"
        )

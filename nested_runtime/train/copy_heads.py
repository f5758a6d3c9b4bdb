"""Heads that carry a model, copied over heads that do nothing.

A head whose write gate training has closed gets no gradient any more and stays closed (docs/log.md). A copy of a head
that is in use is open, and reads and writes something useful from the first step; its key features are scaled at
random, so that it finds and confuses other things than the original and the two can share their work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import rows
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.blocks import Block

__all__ = ["copy_heads"]

WEIGHT = 0.5  # of the reads of a copy in another block, in units of the original's
SPREAD = 0.3  # standard deviation of the logarithm of a key feature's scale


@torch.no_grad()
def copy_heads(model: LanguageModel, copies: Mapping[str, str]) -> None:
    """Overwrite heads with others: `copies` maps "block.head" to the "block.head" it becomes a copy of.

    Inside a block an original and its copies have equal shares of the original's weight in the stream; in another block
    a copy weighs half of it, and there an original may be overwritten: it moves. ConfigError: no such head, another
    memory, or an original that would share with its copy but is overwritten.
    """
    places = {_place(model, copy): _place(model, original) for copy, original in copies.items()}
    if lost := [f"{a}.{b}" for (to, _), (a, b) in places.items() if a == to and (a, b) in places]:
        raise ConfigError(
            f"config field 'copy_heads' overwrites {lost[0]!r} and copies it inside its block; leave one out"
        )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    beside = Counter(original for copy, original in places.items() if copy[0] == original[0])
    for number, (copy, original) in enumerate(places.items(), 1):
        weight = 1 / (1 + beside[original]) if copy[0] == original[0] else WEIGHT
        _copy(model, before, original, copy, weight, torch.Generator().manual_seed(number))
    for (block, head), count in beside.items():
        memory = _memory(model, block)
        memory.w_out[:, _own(memory, head)] /= 1 + count


def _memory(model: LanguageModel, block: int) -> SelfModifying:
    found = model.get_submodule(f"blocks.{block}.memory")
    if not isinstance(found, SelfModifying):
        raise ConfigError(
            f"config field 'copy_heads' is for self-modifying memories; block {block} has {type(found).__name__}"
        )
    return found


def _place(model: LanguageModel, name: str) -> tuple[int, int]:
    block, _, head = str(name).partition(".")  # JSON may say 2.1
    if block.isdecimal() and head.isdecimal():
        place = int(block), int(head)
        blocks = [m for m in model.modules() if isinstance(m, Block)]
        if place[0] < len(blocks) and place[1] < _memory(model, place[0]).heads:
            return place
    raise ConfigError(f"config field 'copy_heads' names heads as \"block.head\", counted from 0; there is no {name!r}")


def _own(memory: SelfModifying, head: int, stream: int = 0) -> slice:
    """Rows of a head in `w_in` (streams q, k, v and the gate), its columns in the convolution and in `w_out`."""
    begin = (stream * memory.heads + head) * memory.head_dim
    return slice(begin, begin + memory.head_dim)


def _copy(
    model: LanguageModel, before: Mapping[str, torch.Tensor], original: tuple[int, int], copy: tuple[int, int],
    weight: float, generator: torch.Generator,
) -> None:  # fmt: skip
    (source, head), (target, place) = original, copy
    to, prefix = _memory(model, target), f"blocks.{source}.memory."
    # What differs between blocks is undone: the norm before the memory, and that of the reads.
    enter = before[f"blocks.{source}.norm_memory"] / before[f"blocks.{target}.norm_memory"]
    leave = before[prefix + "norm"] / before[f"blocks.{target}.memory.norm"]
    for stream in range(4):
        to.w_in[_own(to, place, stream)] = before[prefix + "w_in"][_own(to, head, stream)] * enter
    gates = 4 * to.heads * to.head_dim
    for gate in range(len(to.gate_bias)):
        at = gates + gate * to.heads
        to.w_in[at + place] = before[prefix + "w_in"][at + head] * enter
        to.gate_bias[gate, place] = before[prefix + "gate_bias"][gate, head]
    for stream in range(3):
        to.conv[:, _own(to, place, stream)] = before[prefix + "conv"][:, _own(to, head, stream)]
    to.base[place], to.rates[place] = before[prefix + "base"][head], before[prefix + "rates"][head]
    to.w_out[:, _own(to, place)] = before[prefix + "w_out"][:, _own(to, head)] * leave * weight
    scale = torch.exp(SPREAD * torch.randn(to.head_dim, generator=generator)).to(to.base)
    to.base[place, rows(to.head_dim)["k"]] *= scale[:, None]
    to.w_in[_own(to, place)] *= scale[:, None]

"""BlockPool: the rows of growing state tensors (keys and values), in blocks of 16 that belong to one slot each.

A slot is promised the blocks of its longest time when it is acquired, and takes them as its tokens come, so whoever
runs is never out of blocks and nobody has to give way. Rows that no later token sees any more are given back from the
front. Row r of a slot lies in its block r // 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from nested_runtime.core import KVRows
from nested_runtime.errors import ConfigError, NestedError, Overloaded
from nested_runtime.state.spec import TensorSpec

__all__ = ["BLOCK", "BlockPool", "blocks_for"]

BLOCK = 16


def blocks_for(rows: int) -> int:
    """Blocks that hold `rows` rows, wherever in a block the first one lies."""
    return (rows + 2 * BLOCK - 2) // BLOCK


class BlockPool:
    """`num_blocks` blocks and block 0, the padding, which stays zero.

    specs      growing tensors, all with the same most rows R = shape[0]
    num_slots  slots 1..num_slots can own blocks
    max_bytes  of all blocks; None = enough for every slot at its longest
    max_step   rows that one step may add to a slot
    tensors    by TensorSpec name, each [num_blocks + 1, 16, *shape[1:]]
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        num_slots: int,
        max_bytes: int | None = None,
        max_step: int = 512,
        device: torch.device | str = "cpu",
    ) -> None:
        if len({spec.shape[0] for spec in specs}) != 1:
            raise ConfigError(f"growing tensors need one length, got {sorted({spec.shape[0] for spec in specs})}")
        self.specs = tuple(specs)
        self.max_rows = specs[0].shape[0]
        self.max_step = max_step
        self.per_slot = blocks_for(self.max_rows + max_step)
        block_bytes = sum(spec.num_bytes // self.max_rows for spec in specs) * BLOCK
        affordable = num_slots * self.per_slot if max_bytes is None else max_bytes // block_bytes
        self.num_blocks = min(affordable, num_slots * self.per_slot)
        if self.num_blocks < 1:
            raise ConfigError(f"kv_bytes is {max_bytes}, less than one block of {BLOCK} tokens ({block_bytes} bytes)")
        self.tensors = {
            s.name: torch.zeros((self.num_blocks + 1, BLOCK, *s.shape[1:]), dtype=s.dtype, device=device) for s in specs
        }
        self._free = list(range(self.num_blocks, 0, -1))
        self._owned: dict[int, list[int]] = {}
        self._promised: dict[int, int] = {}
        self._rows = [0] * (num_slots + 1)
        self._tables = torch.zeros(num_slots + 1, self.per_slot, dtype=torch.int64, device=device)

    @property
    def num_free(self) -> int:
        """Blocks that are neither owned nor promised."""
        return self.num_blocks - sum(max(self._promised[s], len(owned)) for s, owned in self._owned.items())

    def needed(self, rows: int | None) -> int:
        """Blocks a slot owns at most while it comes to `rows` rows; None = as many as ever."""
        return self.per_slot if rows is None else min(self.per_slot, blocks_for(rows))

    def acquire(self, slot: int, rows: int | None) -> None:
        """Promise the slot the blocks for `rows` rows (None = the most it can have); Overloaded when they are short."""
        needed = self.needed(rows)
        if needed > self.num_free:
            raise Overloaded(f"{needed} KV blocks are needed and {self.num_free} are free; retry later")
        self._owned[slot], self._promised[slot], self._rows[slot] = [], needed, 0

    def release(self, slot: int) -> None:
        """Zero the slot's blocks and make them free."""
        self._drop(slot, len(self._owned[slot]))
        del self._owned[slot], self._promised[slot]
        self._rows[slot] = 0

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> KVRows:
        """Make room for `counts` more rows of each slot and say where they and the ones before lie."""
        for slot, count in zip(slots, counts, strict=True):
            if slot:
                self._extend(slot, count)
        device = self._tables.device
        num = torch.tensor([self._rows[slot] for slot in slots], device=device)
        width = -(-int(num.max()) // BLOCK) if len(slots) else 0
        blocks = self._tables[torch.tensor(slots, device=device), :width]
        read = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)[:, : int(num.max())]
        new = torch.tensor(counts, device=device)
        begins = torch.tensor([0, *accumulate(counts)][:-1], device=device)
        of = torch.repeat_interleave(torch.arange(len(slots), device=device), new)
        at = (num - new)[of] + torch.arange(len(of), device=device) - begins[of]
        return KVRows(read, num, read[of, at])

    def _extend(self, slot: int, count: int) -> None:
        if count > self.max_step:
            raise NestedError(f"slot {slot} reads {count} tokens in a step, the KV pool was made for {self.max_step}")
        self._drop(slot, max(0, self._rows[slot] - self.max_rows) // BLOCK)
        self._rows[slot] += count
        self._own(slot, -(-self._rows[slot] // BLOCK))

    def _own(self, slot: int, number: int) -> None:
        owned = self._owned[slot]
        missing = number - len(owned)
        spare = max(0, self._promised[slot] - len(owned)) + self.num_free
        if missing > spare:
            raise Overloaded(f"slot {slot} needs {missing} more KV blocks and {spare} are left; retry later")
        for _ in range(missing):
            block = self._free.pop()
            self._tables[slot, len(owned)] = block
            owned.append(block)

    def _drop(self, slot: int, number: int) -> None:
        """Give back the slot's first blocks, zeroed."""
        if not number:
            return
        owned = self._owned[slot]
        gone = owned[:number]
        for tensor in self.tensors.values():
            tensor[torch.tensor(gone, device=tensor.device)] = 0
        self._free.extend(gone)
        del owned[:number]
        self._rows[slot] = max(0, self._rows[slot] - number * BLOCK)
        self._tables[slot] = 0
        self._tables[slot, : len(owned)] = torch.tensor(owned, dtype=torch.int64, device=self._tables.device)

    def load(self, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """Make the rows of `state` the slot's rows."""
        self._drop(slot, len(self._owned[slot]))
        rows = len(state[self.specs[0].name])
        self._rows[slot] = rows
        self._own(slot, -(-rows // BLOCK))
        where = self._where(slot, rows)
        for name, tensor in self.tensors.items():
            tensor.flatten(0, 1)[where] = state[name].to(tensor.device)

    def save(self, slot: int) -> dict[str, torch.Tensor]:
        """The slot's newest rows, at most `max_rows`, on the pool's device."""
        where = self._where(slot, min(self._rows[slot], self.max_rows))
        return {name: tensor.flatten(0, 1)[where] for name, tensor in self.tensors.items()}

    def _where(self, slot: int, rows: int) -> torch.Tensor:
        """Pool rows of the slot's newest `rows` rows."""
        at = torch.arange(self._rows[slot] - rows, self._rows[slot], device=self._tables.device)
        return self._tables[slot][at // BLOCK] * BLOCK + at % BLOCK

    def check_integrity(self, *, deep: bool = False) -> None:
        """Raise NestedError unless every block is free or owned once; deep: and what is not owned is zero."""
        owned = [block for blocks in self._owned.values() for block in blocks]
        if sorted([*self._free, *owned]) != list(range(1, self.num_blocks + 1)):
            raise NestedError(
                f"KV block accounting is broken: {len(self._free)} free + {len(owned)} owned are not blocks "
                f"1..{self.num_blocks} once each; restart the engine"
            )
        for slot, blocks in self._owned.items():
            if len(blocks) != -(-self._rows[slot] // BLOCK):
                raise NestedError(f"slot {slot} has {self._rows[slot]} rows in {len(blocks)} KV blocks; restart it")
        if not deep:
            return
        idle = torch.tensor([0, *self._free])
        for name, tensor in self.tensors.items():
            if bool(tensor[idle.to(tensor.device)].any()):
                raise NestedError(f"a KV block that is not owned is not zero in tensor {name!r}; restart the engine")

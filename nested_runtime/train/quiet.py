"""A price on writing what tells nothing into memories that keep it.

What lies between a fact and its question overwrites it: with hope-nano's write gates open, facts were gone after
4,096 tokens of chat, and with the gates of one block shut during the chat nearly all came back (docs/log.md).
Backpropagation would have to reach over all these tokens to learn that. The gates can be told directly: for every
token of text that tells nothing, a hinge pushes the logit of eta below `SHUT`, in every head by how much of its
memory is left after `FAR` tokens. Heads that forget soon are free to write what they like.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, relu

from nested_runtime.memory.streams import GatedStreams

__all__ = ["FAR", "SHUT", "Quiet"]

SHUT = -7.0  # logit of eta: what 4,096 tokens write at random keys overwrites a tenth of a memory
FAR = 1000  # tokens over which a memory that keeps is told from one that forgets
ETA, ALPHA = 0, 1  # what writes and what keeps: the first two gates of every rule that has both


class Quiet:
    """Watches the gates of every memory of `model` that writes and keeps, in forwards that autograd records."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, GatedStreams) and len(module.gate_bias) > ALPHA:
                module.gate_logits.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: Any, logits: torch.Tensor) -> None:
        if logits.requires_grad:
            self._seen.append(logits)

    def price(self, idle: torch.Tensor) -> torch.Tensor:
        """Mean over `idle` tokens [B, T] of sum over heads of keeps * relu(logit of eta - SHUT) / number of memories.

        Also forgets the gates [B, T, G, H] it has judged. Zero after a forward that autograd did not record.
        """
        seen, self._seen = self._seen, []
        if not seen or not idle.any():
            return torch.zeros((), device=idle.device)
        gates = torch.stack([logits[idle] for logits in seen])  # [memories, N, G, H]
        keeps = (FAR * logsigmoid(gates[:, :, ALPHA]).mean(1)).exp().detach()  # [memories, H]
        return (keeps * relu(gates[:, :, ETA] - SHUT).mean(1)).sum() / len(seen)

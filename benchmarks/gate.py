"""No speed without correctness: the engine's packed, batched path against the differentiable reference."""

from __future__ import annotations

import sys

import torch

from benchmarks.systems.base import VOCAB, tokens
from nested_runtime.core import SamplingParams, Sequence, TurnResult
from nested_runtime.engine.engine import Engine
from nested_runtime.kernels.int8_linear.reference import int8_product
from nested_runtime.kernels.native.stack import Linear
from nested_runtime.models.hope import Hope

__all__ = ["check_engine", "check_int8"]

TOLERANCE = 2e-3  # of a tensor's largest element, after a hundred tokens in float32 through other kernels
LENGTHS = (1, 31, 70, 101)
NUM_SAMPLED = 9


def check_engine(model: Hope) -> None:
    """Exit unless ragged sessions, read together, end in the reference's states and say its tokens."""
    engine = Engine(model, capacity=len(LENGTHS), max_batch_tokens=96)
    params = SamplingParams(max_tokens=NUM_SAMPLED, temperature=0.0)
    asked = [Sequence(str(n), tokens(1, n)[0].tolist(), params, keep_state=True) for n in LENGTHS]
    for sequence in asked:
        engine.submit(sequence)
    results: dict[str, TurnResult] = {}
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.result is not None:
                results[event.sequence_id] = event.result
    for sequence in asked:
        _compare(model, sequence, results[sequence.id])


@torch.inference_mode()
def check_int8(model: Hope) -> None:
    """Exit unless the product with every matrix in int8 is that of the integers, to the bit."""
    for name, w in model.named_parameters():
        if w.ndim != 2 or name.endswith(("gate_bias", "rates", "conv")):
            continue
        x = torch.randn(17, w.shape[1])
        if not torch.equal(Linear(w, int8=True)(x), int8_product(x, w)):
            sys.exit(f"int8 products with {name} are not those of the integers; nothing is measured")


@torch.inference_mode()
def _compare(model: Hope, sequence: Sequence, result: TurnResult) -> None:
    read = torch.tensor([sequence.tokens[:-1]])
    hidden, state = model.scan(read, None, 0)
    for name, tensor in result.state.items():
        expected = state[name][0]
        error = float((tensor - expected).abs().max() / expected.abs().max().clamp(min=1e-2))
        if not error <= TOLERANCE:
            sys.exit(
                f"{name} after {read.shape[1]} tokens is off by {error:.1e}, over {TOLERANCE}; nothing is measured"
            )
    logits = model.logits(hidden[0, len(sequence.prompt) - 1 :])
    margin = logits.max(-1).values - logits[torch.arange(NUM_SAMPLED), torch.tensor(sequence.output)]
    if not bool((margin <= TOLERANCE * logits.abs().max()).all()):
        sys.exit(f"the engine's tokens of {VOCAB} are not the reference's: margin {float(margin.max()):.1e}")

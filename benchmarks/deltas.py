"""What levels of their own cost sessions that decode side by side: an attention model with and without its deltas.

    python benchmarks/deltas.py --sessions 16 --rank 16

Two models of the same weights decode in turns, step by step, so that whatever else the machine does meets both.
"decode" counts reading alone, "with updates" also the steps of the levels, one every C tokens of each session. Sizes of
states are those of the pool, checked against the formula. Prints a table and writes
build/bench/deltas.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from nested_runtime.engine.runner import Runner, Span, state_specs
from nested_runtime.models.adaptation import UPDATES, clock
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import build
from nested_runtime.state.codec import encode
from nested_runtime.state.pool import SlotPool
from nested_runtime.state.snapshot import Binding, Snapshot

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "5M": {"dim": 256, "blocks": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 704, "vocab_size": 4096},
    "30M": {"dim": 512, "blocks": 8, "heads": 8, "kv_heads": 2, "head_dim": 64, "hidden": 1408, "vocab_size": 8192},
    "135M": {"dim": 576, "blocks": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 1536, "vocab_size": 49152},
}


class Decoder:
    """Sessions of one model that decode together, each behind a context of its own."""

    def __init__(self, model: LanguageModel, sessions: int, context: int) -> None:
        self.model, self.place = model, context
        self.pool = SlotPool(state_specs(model), sessions, max_step=max(context, 16))
        self.slots = [self.pool.acquire() for _ in range(sessions)]
        self.runner = Runner(model, self.pool, max_tokens=sessions * context, max_sequences=sessions)
        generator = torch.Generator().manual_seed(1)
        texts = torch.randint(0, model.vocab_size, (sessions, context), generator=generator).tolist()
        step = model.update_chunk or context
        for begin in range(0, context, step):
            self._update(begin)
            self.runner.step(
                [Span(s, begin, t[begin : begin + step], range(0)) for s, t in zip(self.slots, texts, strict=True)]
            )
        if model.update_chunk and not all(self.pool.tensors[clock(0)][s, UPDATES] > 0 for s in self.slots):
            raise SystemExit("a session has not learned; give a longer --context")

    def _update(self, place: int) -> float:
        began = perf_counter()
        if self.model.update_chunk and place and place % self.model.update_chunk == 0:
            kv = self.pool.extend(self.slots, [0] * len(self.slots))
            slots, places = torch.tensor(self.slots), torch.full((len(self.slots),), place)
            good = self.model.update(slots, torch.ones_like(slots), places, self.pool.tensors, kv).good
            if not bool(good.all()):
                raise SystemExit("an update diverged; what follows would not be a measurement")
        return perf_counter() - began

    def step(self) -> tuple[float, float]:
        """Every session reads one token: seconds of reading, seconds of updates before."""
        updating = self._update(self.place)
        began = perf_counter()
        self.runner.step([Span(s, self.place, [(7 * self.place + s) % 1000], range(1)) for s in self.slots])
        self.place += 1
        return perf_counter() - began, updating


def two_models(shape: dict[str, int], levels: dict[str, Any]) -> tuple[LanguageModel, LanguageModel]:
    """The same weights without and with levels."""
    torch.manual_seed(0)
    fields = {**shape, "context": 1024}
    blocks = max(1, shape["blocks"] // 4)
    plain = build("hope-attention", fields)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.02 * torch.randn_like(p))
    learning = build("hope-attention", {**fields, "levels": [levels], "cms": "stacked", "adaptive_blocks": blocks})
    learning.load_state_dict(plain.state_dict(), strict=False)
    return plain.eval().requires_grad_(False), learning.eval().requires_grad_(False)


def quantized(model: LanguageModel, args: argparse.Namespace) -> Decoder:
    """The same model with int8 weights."""
    small = deepcopy(model)
    small.quantize()
    return Decoder(small, args.sessions, args.context)


def weight_bytes(model: LanguageModel) -> int:
    """Of parameters and buffers."""
    return sum(t.nbytes for t in model.state_dict().values())


def state_bytes(decoder: Decoder) -> dict[str, int]:
    """Bytes of a session's tensors by level, and of its encoded snapshot."""
    state = decoder.pool.save(decoder.slots[0])
    sizes: dict[str, int] = {}
    for spec in state_specs(decoder.model):
        sizes[spec.level] = sizes.get(spec.level, 0) + state[spec.name].nbytes
    snapshot = Snapshot.take(state, fingerprint="f", binding=Binding("t", "s", 1), position=decoder.place, pending=None)
    return {**sizes, "encoded": len(encode(snapshot))}


def computed_bytes(shape: dict[str, int], rank: int | None) -> int:
    """Of one stacked level: per block (2F + D) (D + F) of factors or 3 F D dense, and a clock of 3 counts."""
    width, dim, blocks = shape["hidden"], shape["dim"], max(1, shape["blocks"] // 4)
    floats = 3 * width * dim if rank is None else rank * (dim + 2 * width + width + dim)
    return blocks * floats * 4 + 24


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30M")
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16, help="0 = dense")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--quantize", action="store_true", help="int8 weights in a third model, without levels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape, rank = SHAPES[args.shape], args.rank or None
    models = two_models(shape, {"chunk": args.chunk, "rank": rank, "rate": 0.01})
    plain, learning = (Decoder(model, args.sessions, args.context) for model in models)
    seconds: dict[str, list[float]] = {"plain": [], "deltas": [], "updates": [], "int8": []}
    small = quantized(models[0], args) if args.quantize else None
    for _ in range(args.steps):
        seconds["int8"].append(small.step()[0] if small else 0.0)
        seconds["plain"].append(plain.step()[0])
        read, updated = learning.step()
        seconds["deltas"].append(read)
        seconds["updates"].append(updated)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = sum(seconds["deltas"]) + sum(seconds["updates"])
    result = {
        **vars(args),
        "decode_tokens_per_second_plain": round(args.sessions / median["plain"], 1),
        "decode_tokens_per_second_deltas": round(args.sessions / median["deltas"], 1),
        "ratio_decode": round(median["plain"] / median["deltas"], 3),
        "ratio_with_updates": round(sum(seconds["plain"]) / whole, 3),
        "ratio_int8": round(median["plain"] / median["int8"], 3) if small else None,
        "weight_bytes": weight_bytes(models[0]),
        "weight_bytes_int8": weight_bytes(small.model) if small else None,
        "update_ms_per_session": round(1e3 * sum(seconds["updates"]) / (args.steps // args.chunk) / args.sessions, 2),
        "state_bytes": state_bytes(learning),
        "level_bytes_computed": computed_bytes(shape, rank),
    }
    for name, value in result.items():
        print(f"{name:32} {value}")
    out = ROOT / "build" / "bench" / "deltas.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    if result["state_bytes"]["cms.1"] != result["level_bytes_computed"]:
        raise SystemExit("the level's bytes are not what they should be")


if __name__ == "__main__":
    main()

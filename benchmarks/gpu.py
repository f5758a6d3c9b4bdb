"""The Triton kernels on a GPU: correctness first, then decode, prefill, updates and the engine, against the roofline.

    python -m benchmarks.kernels --device cuda        (without a GPU: says so in build/bench/gpu.json and exits 0)

Times are medians of `triton.testing.do_bench`. Bytes are those an algorithm must move (the state read, and written
where it changes), over the copy bandwidth measured in the same run; FLOPs over the rate of a large bfloat16 product
measured in the same run. flash-linear-attention's kernels run beside ours where the package is installed:
`fused_recurrent_gated_delta_rule` with gather and scatter of the states, `chunk_gated_delta_rule` on equal shapes.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from nested_runtime.core import Batch, SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.models.hope import Hope

OUTPUT = Path(__file__).parents[1] / "build" / "bench" / "gpu.json"
NOT_MEASURED = "not measured on a GPU"
HEADS, CHUNK = 16, 32
SESSIONS = (1, 16, 64, 256)
PREFILLS = ((2048, 1), (8192, 4), (16384, 16), (65536, 1), (65536, 64))  # tokens in all, sessions
TOLERANCE = 1e-3
MODELS = {
    "nano": {"vocab_size": 8192, "dim": 384, "blocks": 8, "heads": 6, "head_dim": 64},
    "1.3B": {"vocab_size": 32768, "dim": 2048, "blocks": 24, "heads": 16, "head_dim": 128, "mlp_ratio": 4},
}


class Row(NamedTuple):
    """One measurement. `share` of the measured roofline: bandwidth where `bound` is "bytes", product rate else."""

    name: str
    system: str
    milliseconds: float
    bound: str
    share: float


class Case(NamedTuple):
    """One shape: systems by name, and what the algorithm must move or compute."""

    name: str
    systems: dict[str, Callable[[], Any]]
    bound: str
    amount: float  # bytes or FLOPs


def names() -> list[str]:
    """What is measured, for the report of a machine that cannot."""
    decodes = [
        f"{rule} decode d={d} sessions={n}" for rule in ("stacked", "plain") for d in (64, 128) for n in SESSIONS
    ]
    prefills = [f"{r} prefill d={d} tokens={t} sessions={n}" for r in ("stacked", "plain") for d in (64, 128)
                for t, n in PREFILLS]  # fmt: skip
    updates = [f"levels {what} sessions={n}" for what in ("dense 1024x4096", "low rank 16") for n in (1, 16)]
    engines = [f"engine {model} sessions={n}" for model in MODELS for n in (1, 64, 256)]
    return [*decodes, *prefills, *updates, *engines]


def pack(tokens: int, sessions: int, position: int, device: str = "cuda") -> Batch:
    """`sessions` runs of equal length."""
    ints = {"dtype": torch.int32, "device": device}
    ends = torch.arange(sessions + 1, **ints) * (tokens // sessions)
    places = torch.full((sessions,), position, dtype=torch.int64, device=device)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    return Batch(ids, ends, torch.arange(1, sessions + 1, **ints), places, longest=tokens // sessions)


# ---- the stacked rule ------------------------------------------------------------------------------------------------


def layer(dim: int) -> SelfModifying:
    torch.manual_seed(0)
    module = SelfModifying(HEADS * dim, HEADS, dim, RuleOptions(CHUNK)).requires_grad_(False)
    module.base += 0.02 * torch.randn_like(module.base)
    return module.cuda()


def pool_of(module: SelfModifying, sessions: int) -> dict[str, torch.Tensor]:
    return {s.name: torch.zeros(sessions + 1, *s.shape, device="cuda") for s in module.state()}


def check_stacked(dim: int) -> None:
    """A prefill and decode steps of ragged sessions against the differentiable path in float64."""
    module = layer(dim)
    exact = layer(dim).double()
    pools = pool_of(module, 3), {name: t.double() for name, t in pool_of(module, 3).items()}
    for counts, places in (((70, 33, 5), (0, 0, 0)), ((1, 1, 1), (70, 33, 5)), ((1, 30, 2), (71, 34, 6))):
        batch = pack(sum(counts), 3, 0)
        batch.cu_seqlens = torch.tensor([0, *counts], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
        batch.positions, batch.longest = torch.tensor(places, device="cuda"), max(counts)
        x = torch.randn(sum(counts), module.w_in.shape[1], device="cuda")
        out = module.apply_packed(x, pools[0], batch)
        compare(f"stacked d={dim}", out, UpdateRule.apply_packed(exact, x.double(), pools[1], batch))
    for name, tensor in pools[0].items():
        compare(f"stacked d={dim} {name}", tensor, pools[1][name])


def stacked(dim: int, tokens: int, sessions: int) -> Case:
    from nested_runtime.kernels.delta_rule.triton import packed_scan

    module, rows = layer(dim), 3 * dim + 2
    pool, batch = pool_of(module, sessions), pack(tokens, sessions, CHUNK // 2)
    mixed = torch.randn(tokens, 3, HEADS, dim, device="cuda")
    logits = torch.randn(tokens, 2, HEADS, device="cuda") + 4
    run = partial(packed_scan, mixed, logits, module.base, module.rates, pool, batch, module.options)
    if tokens == sessions:  # anchor read, half a tail read, a row of it written
        moved = 4.0 * sessions * HEADS * (rows * dim + (rows + dim) * (CHUNK // 2 + 1))
        return Case(f"stacked decode d={dim} sessions={sessions}", {"ours": run}, "bytes", moved)
    flops = tokens * HEADS * (2.0 * rows * dim * 4 + 2.0 * CHUNK * (rows + 2 * dim))
    return Case(f"stacked prefill d={dim} tokens={tokens} sessions={sessions}", {"ours": run}, "flops", flops)


# ---- the plain rule, beside flash-linear-attention -------------------------------------------------------------------


def plain_inputs(dim: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    q, k = (normalize(torch.randn(tokens, HEADS, dim, device="cuda"), dim=-1).to(dtype) for _ in range(2))
    log_alpha = -0.1 * torch.rand(tokens, HEADS, device="cuda")
    eta = 0.5 * log_alpha.exp() * torch.rand(tokens, HEADS, device="cuda")
    return [q, k, torch.randn(tokens, HEADS, dim, device="cuda").to(dtype), log_alpha, eta]


def check_plain(dim: int) -> None:
    from nested_runtime.kernels.gated_delta.reference import gated_delta
    from nested_runtime.kernels.gated_delta.triton import packed_gated_delta

    for tokens in (3, 210):
        inputs, batch = plain_inputs(dim, tokens, torch.bfloat16), pack(tokens, 3, 0)
        pool = torch.zeros(4, HEADS, dim, dim, device="cuda")
        out = packed_gated_delta(*inputs, pool, batch.slots, batch.cu_seqlens, longest=batch.longest)
        exact = [t.double().unflatten(0, (3, -1)) for t in inputs]
        read, state = gated_delta(*exact, torch.zeros(3, HEADS, dim, dim, dtype=torch.float64, device="cuda"))
        compare(f"plain d={dim} tokens={tokens}", out, read.flatten(0, 1), 1e-2)  # operands rounded to 8 bits
        compare(f"plain d={dim} tokens={tokens} state", pool[1:], state, 1e-2)


def plain(dim: int, tokens: int, sessions: int) -> Case:
    from nested_runtime.kernels.gated_delta.triton import packed_gated_delta

    q, k, v, log_alpha, eta = plain_inputs(dim, tokens, torch.bfloat16)
    pool, batch = torch.zeros(sessions + 1, HEADS, dim, dim, device="cuda"), pack(tokens, sessions, 0)
    systems: dict[str, Callable[[], Any]] = {
        "ours": lambda: packed_gated_delta(
            q, k, v, log_alpha, eta, pool, batch.slots, batch.cu_seqlens, longest=batch.longest
        )
    }
    fla = flash_linear_attention()
    if fla is not None:
        beta = (eta / log_alpha.exp()).to(q.dtype)
        shape = (sessions, 1) if tokens == sessions else (1, tokens)
        args = [t.view(*shape, *t.shape[1:]) for t in (q, k, v, log_alpha, beta)]
        index, bounds = batch.slots.long(), batch.cu_seqlens.long()

        def theirs() -> None:
            state = pool[index].transpose(2, 3).contiguous()
            op = fla.fused_recurrent_gated_delta_rule if tokens == sessions else fla.chunk_gated_delta_rule
            more = {} if tokens == sessions else {"cu_seqlens": bounds}
            _, last = op(*args, initial_state=state, output_final_state=True, **more)
            pool[index] = last.transpose(2, 3)

        systems["flash-linear-attention"] = theirs
    if tokens == sessions:
        return Case(f"plain decode d={dim} sessions={sessions}", systems, "bytes", 8.0 * sessions * HEADS * dim * dim)
    flops = tokens * HEADS * (6.0 * dim * dim + 6.0 * CHUNK * dim)
    return Case(f"plain prefill d={dim} tokens={tokens} sessions={sessions}", systems, "flops", flops)


def flash_linear_attention() -> Any:
    try:
        return importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError:
        return None


# ---- levels ----------------------------------------------------------------------------------------------------------


def updates(sessions: int) -> Iterator[Case]:
    from nested_runtime.kernels.levels import triton as levels

    slots = torch.arange(1, sessions + 1, dtype=torch.int32, device="cuda")
    rate = torch.full((sessions,), 1e-3, device="cuda")
    dense = torch.zeros(sessions + 1, 4096, 1024, device="cuda")
    errors, inputs = (torch.randn(sessions, 512, n, device="cuda").bfloat16() for n in (4096, 1024))
    yield Case(f"levels dense 1024x4096 sessions={sessions}",
               {"ours": lambda: levels.outer_step(dense, errors, inputs, slots, rate)}, "bytes",
               sessions * (8.0 * 4096 * 1024 + 2.0 * 512 * 5120))  # fmt: skip
    tokens, batch = 512 * sessions, pack(512 * sessions, sessions, 0)
    x, y, start = (torch.randn(*s, device="cuda") for s in ((tokens, 1024), (tokens, 4096), (16, 1024)))
    inner, outer = (torch.randn(sessions + 1, *s, device="cuda") for s in ((16, 1024), (4096, 16)))
    yield Case(f"levels low rank 16 sessions={sessions}",
               {"ours": lambda: levels.low_rank_apply(x, y, start, inner, outer, slots, batch.cu_seqlens)}, "bytes",
               4.0 * tokens * (1024 + 2 * 4096))  # fmt: skip


# ---- the whole engine ------------------------------------------------------------------------------------------------


def engine_rows() -> Iterator[dict[str, Any]]:
    """Tokens a second of greedy replies, decode graphs included."""
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = Hope.from_config(config).requires_grad_(False).cuda()
        for sessions in (1, 64, 256):
            engine = Engine(model, capacity=sessions, max_batch_tokens=4096, device="cuda")
            engine.warm_up()
            params = SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True)
            for i in range(sessions):
                engine.submit(Sequence(str(i), [1 + i] * 64, params))
            began, events = time.perf_counter(), 0
            while engine.has_work:
                events += sum(event.token is not None for event in engine.step())
            torch.cuda.synchronize()
            rate = events / (time.perf_counter() - began)
            print(f"engine {name} sessions={sessions}: {rate:.0f} tokens/s")
            yield {"name": f"engine {name} sessions={sessions}", "system": "ours", "tokens_per_s": rate}


# ---- measuring -------------------------------------------------------------------------------------------------------


def compare(name: str, found: torch.Tensor, expected: torch.Tensor, bound: float = TOLERANCE) -> None:
    error = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2))
    if not error <= bound:
        sys.exit(f"{name} is off by {error:.1e}, over {bound}; nothing was measured")


def rooflines() -> dict[str, float]:
    """Bytes a second of a large copy (read and written), FLOPs a second of a large bfloat16 product."""
    from triton.testing import do_bench

    source = torch.zeros(1 << 28, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda").bfloat16()
    copy = do_bench(lambda: target.copy_(source), return_mode="median")
    product = do_bench(lambda: square @ square, return_mode="median")
    return {"bytes": 2e3 * 4 * source.numel() / copy, "flops": 2e3 * 8192**3 / product}


def cases() -> Iterator[Case]:
    for make in (stacked, plain):
        for dim in (64, 128):
            yield from (make(dim, n, n) for n in SESSIONS)
            yield from (make(dim, tokens, n) for tokens, n in PREFILLS)
    for sessions in (1, 16):
        yield from updates(sessions)


@torch.inference_mode()
def main() -> None:
    """Measure, or say that nothing can be measured here."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        rows = [{"name": name, "measured": NOT_MEASURED} for name in names()]
        OUTPUT.write_text(json.dumps({"device": None, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"{NOT_MEASURED}: torch {torch.__version__} sees none; {len(rows)} rows say so in {OUTPUT.name}")
        return
    from triton.testing import do_bench

    for dim in (64, 128):
        check_stacked(dim)
        check_plain(dim)
    limits, rows = rooflines(), []
    device = torch.cuda.get_device_name()
    print(f"{device}: copy {limits['bytes'] / 1e12:.2f} TB/s, bf16 product {limits['flops'] / 1e12:.0f} TFLOP/s")
    for case in cases():
        for system, run in case.systems.items():
            milliseconds = do_bench(run, return_mode="median")
            share = case.amount / (milliseconds / 1e3) / limits[case.bound]
            print(f"{case.name:48}{system:24}{milliseconds:10.3f} ms{share:8.1%} of {case.bound}", flush=True)
            rows.append(Row(case.name, system, milliseconds, case.bound, share)._asdict())
    rows += engine_rows()
    OUTPUT.write_text(json.dumps({"device": device, **limits, "rows": rows}, indent=1) + "\n", encoding="utf-8")

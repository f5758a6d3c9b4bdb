"""Training: tokens/s of hope-nano beside a Llama-style transformer of equal size, step by step in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.train --data ../shared/data [--steps 20] [--threads 1]

Both read the same corpus with the same lanes, optimizers and weights of the loss; the two take turns, so that a busy
machine disturbs both alike. Medians over steps; the ratio is of CPU time, tokens/s are given in CPU and in wall time.
Writes build/bench/train.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from nested_runtime.errors import NestedError
from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import build, load
from nested_runtime.train.cli import load_config
from nested_runtime.train.data import Corpus
from nested_runtime.train.trainer import Trainer

OUTPUT = Path(__file__).parents[1] / "build" / "bench" / "train.json"
SYSTEMS = ("hope-nano", "transformer-nano")
WARM = 3  # steps before the clock
TOLERANCE = 1e-9


def check_gradients() -> None:
    """Exit unless the chunk form's gradients are those of the plain recurrence, in float64."""
    torch.manual_seed(0)
    model = build("hope", Hope.TINY | {"chunk": 8}).double()
    with torch.no_grad():  # the start has no second-order terms worth checking
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.randint(0, 64, (2, 33))
    found = []
    for cuts in ((0, 32), tuple(range(33))):  # whole chunks at once; token by token
        state, hidden = None, []
        for begin, end in itertools.pairwise(cuts):
            out, state = model.scan(tokens[:, begin:end], state, begin)
            hidden.append(out)
        loss = torch.nn.functional.cross_entropy(
            model.logits(torch.cat(hidden, 1)).flatten(0, 1), tokens[:, 1:].flatten()
        )
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for (name, _), ours, plain in zip(model.named_parameters(), *found, strict=True):
        if ours is None or plain is None:
            continue
        error = float((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-12))
        if not error <= TOLERANCE:
            sys.exit(f"the gradient of {name} is off by {error:.1e}, over {TOLERANCE}; nothing is measured")


def trainer(name: str, corpus: Corpus, folder: Path) -> Trainer:
    """A fresh run of a shipped config."""
    config = load_config(Path(str(resources.files("nested_runtime.train").joinpath("configs", f"{name}.json"))))
    tokenizer = load("hope-nano").tokenizer
    return Trainer(replace(config, eval_every=1 << 30, save_every=1 << 30), tokenizer, corpus, folder, 0, 1)


def measure(systems: dict[str, Trainer], steps: int) -> list[dict[str, Any]]:
    """Steps in turns; one row per system."""
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    wall: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(WARM + steps):
        for name, system in systems.items():
            begun, begun_wall = time.process_time(), time.perf_counter()
            system.train_step()
            if number >= WARM:
                cpu[name].append(time.process_time() - begun)
                wall[name].append(time.perf_counter() - begun_wall)
    rows = []
    for name, system in systems.items():
        spent = statistics.median(cpu[name])
        rows.append({
            "system": name,
            "parameters": sum(p.numel() for p in system.model.parameters()),
            "tokens_per_cpu_s": system.per_step / spent,
            "tokens_per_s": system.per_step / statistics.median(wall[name]),
            "ratio_to_transformer": statistics.median(cpu[SYSTEMS[1]]) / spent,
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="data folder, as for nested-train")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    check_gradients()
    try:
        corpus = Corpus(args.data, load("hope-nano").tokenizer)
    except NestedError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure({name: trainer(name, corpus, Path(folder)) for name in SYSTEMS}, args.steps)
    for row in rows:
        print(f"{row['system']:18}{row['parameters']:>10,} parameters {row['tokens_per_s']:8.0f} tokens/s")
        share = row["ratio_to_transformer"]
        print(f"{'':18}{row['tokens_per_cpu_s']:8.0f} per CPU second, {share:.2f} of the transformer")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

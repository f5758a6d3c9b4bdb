"""`nested-eval ablation`: what each part of HOPE is worth, in the trainer's small setting (the rows of NL Table 6).

The full model has everything: self-modifying memories with DGD, decay and momentum, and a level that learns (CMS).
Parts of the rule are ablated and changed without CMS: with it no row leaves the prior in so few tokens (docs/log.md).
The controls are other families of equal shape. All rows of a seed read the same tokens; every cell (row, seed) is a
file of its own, so that a run can be split over processes and continued.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nested_runtime.errors import ConfigError
from nested_runtime.evals.report import aligned, write
from nested_runtime.evals.small_setting import SmallTrainer, small_config

__all__ = ["ROWS", "WHAT", "arguments", "run"]

WHAT = "train HOPE without its parts and the controls in a small setting, over several seeds"
TOKENS = 70_000
CHUNK = {"chunk": 32}
CMS = {"levels": [{"chunk": 64, "hidden": 64, "rate": 0.02}]}


def _hope(*changes: str, levels: bool = False) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {**CHUNK, **(CMS if levels else {})}
    return "hope", {**fields, "changes": list(changes)} if changes else fields


ROWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "HOPE": _hope("momentum", levels=True),
    "- CMS": _hope("momentum"),
    "- CMS - DGD": _hope("momentum", "gd"),
    "- CMS - momentum (as shipped)": _hope(),
    "- CMS - decay": _hope("momentum", "no-decay"),
    "- CMS, fixed k": _hope("momentum", "fixed-k"),
    "- CMS, fixed v": _hope("momentum", "fixed-v"),
    "- CMS, adaptive q": _hope("momentum", "adaptive-q"),
    "titans": ("titans", {}),
    "delta": ("delta", {}),
    "transformer": ("transformer", {"window": 64}),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of every run (default {TOKENS})")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, counted from --seed (default 3)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="only these rows")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Train what is missing; the table and its JSON."""
    if unknown := [name for name in args.rows if name not in ROWS]:
        raise ConfigError(f"--rows {unknown[0]!r} is not a row; known: {', '.join(ROWS)}")
    seeds = range(args.seed, args.seed + args.seeds)
    cells = [_cell(args.out / "ablation", name, args.tokens, seed) for seed in seeds for name in args.rows]
    rows = [_row(name, [cell for cell in cells if cell["row"] == name]) for name in args.rows]
    return _table(rows, args.tokens), {"rows": rows, "cells": cells}


def _cell(folder: Path, name: str, tokens: int, seed: int) -> dict[str, Any]:
    """One trained model; read from its file where the same run has been made."""
    family, fields = ROWS[name]
    config = small_config(family, fields, tokens, seed)
    said = json.loads(json.dumps(asdict(config)))
    path = folder / f"{name.replace(' ', '_')}-{seed}.json"
    if path.exists() and (cell := json.loads(path.read_text(encoding="utf-8")))["config"] == said:
        return dict(cell)
    began = time.process_time()
    trainer = SmallTrainer(config)
    figures = trainer.fit()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    cell = {"row": name, "seed": seed, "parameters": parameters, "cpu_seconds": time.process_time() - began, **figures}
    write(path, {**cell, "config": said})
    return cell


def _row(name: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "seeds": len(cells), "parameters": cells[0]["parameters"]}
    for figure in ("dev_loss", "dev_value"):
        values = [cell[figure] for cell in cells]
        row[figure] = statistics.fmean(values)
        row[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def _table(rows: Sequence[Mapping[str, Any]], tokens: int) -> str:
    lines = [(f"{tokens:,} tokens", "parameters", "seeds", "dev loss", "value tokens right, %")]
    for row in rows:
        loss = _spread(row["dev_loss"], row["dev_loss_std"], 3)
        share = _spread(100 * row["dev_value"], None if row["seeds"] < 2 else 100 * row["dev_value_std"], 1)
        lines.append((row["name"], f"{row['parameters']:,}", str(row["seeds"]), loss, share))
    return aligned(lines)


def _spread(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if std is None else f" +- {std:.{digits}f}")

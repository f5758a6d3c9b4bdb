"""`nested-train`: train a model from a config file and a data folder."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from nested_runtime.errors import ConfigError, NestedError
from nested_runtime.kernels.denormals import flushed_denormals
from nested_runtime.models.config import from_fields
from nested_runtime.models.loading import load, load_tokenizer
from nested_runtime.train.copy_blocks import copy_blocks
from nested_runtime.train.copy_heads import copy_heads
from nested_runtime.train.data import Corpus, Mixture, texts
from nested_runtime.train.start import check_start, levels_of, start_from
from nested_runtime.train.trainer import TrainConfig, Trainer, process_group
from nested_runtime.train.vocabulary import train_tokenizer

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nested-train", description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        help="training config (JSON, see nested_runtime/train/configs); with --from it may be left out: only the "
        "levels of the model are trained then",
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help="folder of pretrain_1*.jsonl[.zst] with `text` and chat_1* with `messages`",
    )
    parser.add_argument("--out", required=True, type=Path, help="run folder; an existing run is resumed")
    parser.add_argument(
        "--from",
        dest="start",
        help="model folder or shipped name whose weights a new run starts from; the config may add levels to it",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its own lanes")
    parser.add_argument("--tokens", type=int, help="override the config's number of tokens")
    return parser


def load_config(path: Path) -> TrainConfig:
    """Read a training config; ConfigError names the file or field."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold an object, got {type(values).__name__}")
    try:
        if isinstance(mixture := values.get("mixture"), dict):
            values["mixture"] = from_fields(Mixture, mixture)
        config = from_fields(TrainConfig, values)
        config.build()
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    return config


def _prepare(args: argparse.Namespace, config: TrainConfig) -> None:
    """Make sure the run folder has a tokenizer, and that --from fits the config."""
    start = load(args.start) if args.start else None
    if start is not None:
        model = config.build()
        try:
            check_start(copy_blocks(start, config.copy_blocks), config.family, model)
            copy_heads(model, config.copy_heads)
        except ConfigError as error:
            raise ConfigError(f"--from {args.start}: {error}") from None
    elif config.copy_heads or config.copy_blocks:
        raise ConfigError(
            "config fields 'copy_blocks' and 'copy_heads' copy parts of a trained model; name it with --from"
        )
    if (args.out / "tokenizer.json").exists():
        return
    args.out.mkdir(parents=True, exist_ok=True)
    vocab_size = int(config.model.get("vocab_size", 4096))
    tokenizer = start.tokenizer if start is not None else train_tokenizer(texts(args.data), vocab_size)
    tokenizer.save(args.out)


def _work(rank: int, args: argparse.Namespace, config: TrainConfig, port: int) -> None:
    torch.set_num_threads(1 if args.workers > 1 else max(1, torch.get_num_threads()))
    tokenizer = load_tokenizer(args.out)
    corpus = Corpus(args.data, tokenizer)
    with flushed_denormals(), process_group(rank, args.workers, port):
        trainer = Trainer(config, tokenizer, corpus, args.out, rank, args.workers)
        if not trainer.resume() and args.start:
            start_from(trainer.model, copy_blocks(load(args.start), config.copy_blocks))
            copy_heads(trainer.model, config.copy_heads)
        bar = tqdm(total=trainer.steps, initial=trainer.step, disable=rank > 0, mininterval=5, unit="step")
        with (args.out / "log.jsonl").open("a") as log:
            for record in trainer.run():
                if rank == 0:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    bar.set_postfix({k: f"{v:.3g}" for k, v in record.items() if k in ("loss", "value", "dev_value")})
                    bar.update()


def main(argv: list[str] | None = None) -> None:
    """Entry point; a bad config is one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    try:
        config = levels_of(args.start) if args.config is None else load_config(args.config)
        if args.workers < 1:
            raise ConfigError(f"--workers must be at least 1, got {args.workers}")
        if args.tokens is not None:
            config = replace(config, tokens=args.tokens)
        _prepare(args, config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if args.workers == 1:
            _work(0, args, config, port)
        else:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            spawn(_work, (args, config, port), nprocs=args.workers)  # type: ignore[no-untyped-call]  # torch has no types here
    except (NestedError, OSError) as error:
        print(f"nested-train: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

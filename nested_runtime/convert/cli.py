"""`nested-convert`: make a model folder of a Hugging Face checkpoint (Llama, Mistral, Qwen, SmolLM, Gemma).

With --levels, MLPs of the last blocks learn while a session reads (ad-hoc level stacking, NL 7.3).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_runtime.convert.architectures import read_config
from nested_runtime.convert.chat import read_tokenizer
from nested_runtime.convert.levels import BLOCKS, OPTIMIZER, RANK, RATE, Stack, fresh_starts, stacked_levels
from nested_runtime.convert.source import Source
from nested_runtime.convert.weights import convert_weights
from nested_runtime.errors import CheckpointError, ConfigError, NestedError
from nested_runtime.models import loading

__all__ = ["convert", "main"]

FAMILY = "hope-attention"


def convert(
    source: Path, out: Path, extra: Mapping[str, Any], name: str | None = None, stack: Stack | None = None
) -> dict[str, Any]:
    """Write model folder `out` from checkpoint folder `source`; returns its config.

    extra: config fields to set; stack: levels to add. CheckpointError or ConfigError says what is wrong; nothing is
    written then.
    """
    read = Source(source)
    fields = read_config(read.config)
    if extra.get("context", 1) > fields["context"]:
        raise ConfigError(f"--context {extra['context']} is over max_position_embeddings, {fields['context']}")
    fields |= extra
    if stack is not None:
        fields |= stacked_levels(stack, fields["blocks"])
    model = loading.build(FAMILY, fields, empty=True)
    tokenizer = read_tokenizer(read)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{source}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json says {model.vocab_size}"
        )
    tensors = convert_weights(read, fields, one_plus=read.config["model_type"].startswith("gemma"))
    tensors |= fresh_starts({name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tensors})
    loading.save_tensors(out, FAMILY, tensors, model.to_config(), tokenizer, name or source.resolve().name)
    return model.to_config()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nested-convert", description=__doc__)
    parser.add_argument("source", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--name", help="name of the model (default: the folder's)")
    parser.add_argument("--context", type=int, help="tokens attention sees at most (default: max_position_embeddings)")
    group = parser.add_argument_group("levels that learn (off without --levels)")
    group.add_argument(
        "--levels", metavar="C[,C..]", help="session tokens between two steps of each level, fastest first"
    )
    group.add_argument("--rank", default=str(RANK), help=f"rank of a session's deltas, or dense (default: {RANK})")
    group.add_argument(
        "--blocks", default=BLOCKS, help=f"which learn: all, last-half, last-quarter, last-N (default: {BLOCKS})"
    )
    group.add_argument("--optimizer", default=OPTIMIZER, help=f"how levels step (default: {OPTIMIZER})")
    group.add_argument("--rate", type=float, default=RATE, help=f"step size; 0 = never change (default: {RATE})")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; a checkpoint that cannot be converted is one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    extra = {} if args.context is None else {"context": args.context}
    try:
        stack = None
        if args.levels is not None:
            stack = Stack.of(args.levels, args.rank, args.blocks, args.optimizer, args.rate)
        config = convert(args.source, args.out, extra, args.name, stack)
    except (NestedError, OSError) as error:
        print(f"nested-convert: {error}", file=sys.stderr)
        sys.exit(2)
    shape = f"{config['blocks']} blocks of {config['dim']}, {config['vocab_size']} tokens"
    learns = f", {config['adaptive_blocks']} of them learn" if config.get("levels") else ""
    print(f"{args.out}: {shape}{learns}, context {config['context']}")


if __name__ == "__main__":
    main()

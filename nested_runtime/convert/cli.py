"""`nested-convert`: make a model folder of a Hugging Face checkpoint (Llama, Mistral, Qwen, SmolLM, Gemma)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_runtime.convert.architectures import read_config
from nested_runtime.convert.chat import read_tokenizer
from nested_runtime.convert.source import Source
from nested_runtime.convert.weights import convert_weights
from nested_runtime.errors import CheckpointError, ConfigError, NestedError
from nested_runtime.models import loading

__all__ = ["convert", "main"]

FAMILY = "hope-attention"


def convert(source: Path, out: Path, extra: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Write model folder `out` from checkpoint folder `source`; returns its config. `extra`: config fields to set.

    CheckpointError or ConfigError says what is wrong; nothing is written then.
    """
    read = Source(source)
    fields = read_config(read.config)
    if extra.get("context", 1) > fields["context"]:
        raise ConfigError(f"--context {extra['context']} is over max_position_embeddings, {fields['context']}")
    fields |= extra
    model = loading.build(FAMILY, fields, empty=True)
    tokenizer = read_tokenizer(read)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{source}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json says {model.vocab_size}"
        )
    tensors = convert_weights(read, fields, one_plus=read.config["model_type"].startswith("gemma"))
    loading.save_tensors(out, FAMILY, tensors, model.to_config(), tokenizer, name or source.resolve().name)
    return model.to_config()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nested-convert", description=__doc__)
    parser.add_argument("source", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--name", help="name of the model (default: the folder's)")
    parser.add_argument("--context", type=int, help="tokens attention sees at most (default: max_position_embeddings)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; a checkpoint that cannot be converted is one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    extra = {} if args.context is None else {"context": args.context}
    try:
        config = convert(args.source, args.out, extra, args.name)
    except (NestedError, OSError) as error:
        print(f"nested-convert: {error}", file=sys.stderr)
        sys.exit(2)
    shape = f"{config['blocks']} blocks of {config['dim']}, {config['vocab_size']} tokens"
    print(f"{args.out}: {shape}, context {config['context']}")


if __name__ == "__main__":
    main()

"""A plain Hope-Attention model as a Hugging Face Llama checkpoint, to have one that was trained here.

    python benchmarks/export_llama.py build/run/model build/llama

The inverse of `nested-convert` for models of Llama's shape. Where transformers is installed, its logits are compared.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from nested_runtime.convert.weights import pieces
from nested_runtime.models import loading

THEIRS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "hidden": "intermediate_size", "blocks": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "context": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
NOT_LLAMA = ("levels", "window", "qk_norm", "post_norm", "qkv_bias", "out_bias", "mlp_bias", "scale")


def export(name: str, out: Path) -> None:
    """Write the checkpoint folder."""
    loaded = loading.load(name)
    fields = loaded.model.to_config()
    odd = [field for field in NOT_LLAMA if fields.get(field)]
    if odd or loaded.config["family"] != "hope-attention" or fields["embed_scale"] != 1:
        raise SystemExit(f"{name} is not of Llama's shape: {odd or loaded.config['family']}")
    ours, tensors = loaded.model.state_dict(), {}
    for piece in pieces(fields, one_plus=False):
        parts = torch.split(ours[piece.name], [shape[0] for _, shape in piece.parts])
        tensors |= {their: part.contiguous() for (their, _), part in zip(piece.parts, parts, strict=True)}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {their: fields[our] for our, their in THEIRS.items()}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "eos_token_id": 4}
    config |= {"rope_theta": fields["rope"].get("theta", 10_000.0), "pad_token_id": 0, "bos_token_id": 4}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    loaded.tokenizer.save(out)
    if find_spec("transformers"):
        compare(loaded, out)


@torch.no_grad()
def compare(loaded: loading.LoadedModel, out: Path) -> None:
    """Exit unless transformers computes the same logits of the checkpoint."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(5, loaded.model.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    ours = loaded.model.logits(loaded.model.scan(tokens, None, 0)[0])
    worst = float((theirs(tokens).logits - ours).abs().max())
    print(f"{out}: transformers' logits differ by at most {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("the export is wrong")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder of a plain hope-attention model")
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    export(**{"name" if k == "model" else k: v for k, v in vars(parser.parse_args()).items()})

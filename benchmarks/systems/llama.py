"""Hugging Face's Llama of the same size, with the cache it calls static: the measure of everything else."""

from __future__ import annotations

from collections.abc import Callable

from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.systems.base import BLOCKS, DIM, HEADS, VOCAB, Case, tokens

__all__ = ["Llama"]

ROOM = 512  # tokens that may be decoded after the context


class Llama:
    """See `System`."""

    name = "hf-llama"

    def __init__(self) -> None:
        self._config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, intermediate_size=672, tie_word_embeddings=True, max_position_embeddings=32768,
        )  # fmt: skip
        self._model = LlamaForCausalLM(self._config).eval()
        self.num_parameters = sum(p.numel() for p in self._model.parameters())

    def prepare(self, case: Case) -> Callable[[], None]:
        """See `System`. Keys and values of the context are random: attention costs the same whatever they are."""
        if not case.context:
            prompt = tokens(1, case.num_tokens)
            return lambda: self._read(prompt, StaticCache(config=self._config, max_cache_len=case.num_tokens))
        cache = StaticCache(config=self._config, max_cache_len=case.context + ROOM)
        last = tokens(case.sessions, 1)
        self._read(last, cache)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(case.context)

        def decode() -> None:
            nonlocal last
            last = self._read(last, cache)

        return decode

    def _read(self, ids, cache):  # type: ignore[no-untyped-def]  # another library's
        return self._model(ids, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

"""Tokenizers of Hugging Face checkpoints: `tokenizer.json` and `chat.json` (template, end tokens) in a model folder.

A conversation is rendered by the checkpoint's own chat template. What a session has read already is left out: the text
of all messages minus the text of those read. Byte-level BPE (Llama 3, Qwen, SmolLM) and metaspace BPE with byte
fallback (Llama 2, Mistral, Gemma) are known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Backend

from nested_runtime.chat_template import ChatTemplate
from nested_runtime.errors import CheckpointError, RequestError
from nested_runtime.tokenizer import BYTE_OF, Tokenizer

__all__ = ["HubTokenizer"]

FILE = "chat.json"
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})


class HubTokenizer(Tokenizer):
    """A checkpoint's tokenizer behind the interface of ours.

    chat  {"template": text, "bos_token": text, "eos_token": text, "end_tokens": [ids, the first ends a message]}
    """

    def __init__(self, backend: _Backend, chat: Mapping[str, Any]) -> None:
        self._backend, self.chat = backend, dict(chat)
        self._guarded = _Backend.from_str(backend.to_str())
        self._guarded.encode_special_tokens = True  # text of users: what spells a special token stays text
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._added = {i: str(token.content) for i, token in added.items()}
        self._is_byte_level = "ByteLevel" in json.dumps(json.loads(backend.to_str()).get("decoder") or {})
        self.opens_with_space = not self._is_byte_level
        self.end_ids = self._ends()
        self.end_id = self.end_ids[0]
        names = {"bos_token": chat.get("bos_token") or "", "eos_token": chat.get("eos_token") or ""}
        self.bos = names["bos_token"]
        self.template = ChatTemplate(chat.get("template") or PLAIN, names)

    def _ends(self) -> tuple[int, ...]:
        ends = self.chat.get("end_tokens")
        if not isinstance(ends, list) or not ends or not all(type(i) is int and i >= 0 for i in ends):
            raise CheckpointError(f"{FILE}: end_tokens is {ends!r}, expected a list of token ids")
        for end in ends:
            if self._backend.id_to_token(end) is None:
                raise CheckpointError(f"{FILE}: end token {end} is not in tokenizer.json")
        return tuple(ends)

    @classmethod
    def load(cls, folder: str | Path) -> HubTokenizer:
        """Read `folder/tokenizer.json` and `folder/chat.json`."""
        texts = {}
        for name in ("tokenizer.json", FILE):
            try:
                texts[name] = (Path(folder) / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{Path(folder) / name}: {error}") from None
        try:
            chat = json.loads(texts[FILE])
        except ValueError as error:
            raise CheckpointError(f"{Path(folder) / FILE}: {error}") from None
        if not isinstance(chat, dict):
            raise CheckpointError(f"{Path(folder) / FILE} must hold an object")
        return cls(backend_of(texts["tokenizer.json"], Path(folder) / "tokenizer.json"), chat)

    def save(self, folder: str | Path) -> None:
        """Write `folder/tokenizer.json` and `folder/chat.json`."""
        super().save(folder)
        part = Path(folder) / "chat.part"
        part.write_text(json.dumps(self.chat, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(Path(folder) / FILE)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Text that spells a special token is encoded as text, never as that token."""
        ids: list[int] = self._run(self._guarded, text).ids
        return ids

    def encode_offsets(self, text: str) -> list[tuple[int, int]]:
        """Token ids of plain text, each with the character offset where it ends."""
        encoding = self._run(self._guarded, text)
        return [(i, end) for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _run(self, backend: _Backend, text: str) -> Any:
        try:
            return backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise RequestError(f"text is not valid Unicode (a lone surrogate?): {text[:40]!a}") from None

    def token(self, token_id: int) -> str:
        """The vocabulary entry of one id; empty for ids that only pad the model's vocabulary."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (special tokens: their name)."""
        entry = self.token(token_id)
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._is_byte_level:
            return bytes(BYTE_OF[c] for c in entry)
        byte = _BYTE.fullmatch(entry)
        return bytes([int(byte[1], 16)]) if byte else entry.replace("▁", " ").encode()

    def render(
        self, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = True, *, num_read: int = 0,
        goes_on: bool = False,
    ) -> list[int]:  # fmt: skip
        """See `Tokenizer.render`. Text after the last end token of what was read belongs to what comes next."""
        messages = list(messages)
        if num_read:
            text = self._unread(messages, num_read, add_generation_prompt)
        elif goes_on:
            text = self._more(messages, add_generation_prompt)
        else:
            text = self.template.render(messages, add_generation_prompt)
        return self._encode_rendered(text, messages)

    def render_offsets(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation as the template writes it, and its tokens with the character where each ends."""
        text = self.template.render(messages, False)
        encoding = self._run(self._backend, text)
        return text, [(i, end) for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _more(self, messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        """Messages as they follow an exchange: without what a template writes at the start of a conversation."""
        try:
            return self._unread([*_PROBE, *messages], len(_PROBE), answer)
        except RequestError:  # a system message, say, that this template wants at the start only
            return self._separator() + self.template.render(messages, answer).removeprefix(self.bos)

    def _unread(self, messages: Sequence[Mapping[str, str]], num_read: int, answer: bool) -> str:
        """What follows the end token of the last message read."""
        text = self.template.render(messages, answer)
        read = self.template.render(messages[:num_read], False)
        head, end, _ = read.rpartition(self.token(self.end_id))
        if end and text.startswith(head + end):
            return text[len(head + end) :]
        # The template writes old messages otherwise when new ones follow (it drops their thinking, say).
        return self._separator() + self.template.render(messages[num_read:], answer).removeprefix(self.bos)

    def _separator(self) -> str:
        """What the template writes between the end token of a reply and the next message."""
        _, end, rest = self.template.render(_PROBE, False).rpartition(self.token(self.end_id))
        return rest if end else ""

    def _encode_rendered(self, text: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of rendered text. Special tokens that a message spells out are split off and stay text."""
        names = [name for i, name in self._added.items() if i in self.special_ids]
        spelled = [m["content"].strip() for m in messages if any(name in m["content"] for name in names)]
        if not spelled:
            ids: list[int] = self._run(self._backend, text).ids
            return ids
        parts = re.split("(" + "|".join(re.escape(s) for s in sorted(set(spelled), key=len, reverse=True)) + ")", text)
        ids = []
        for i, part in enumerate(parts):
            ids += self._run(self._guarded if i % 2 else self._backend, part).ids if part else []
        return ids


def backend_of(text: str, path: Path) -> _Backend:
    """The tokenizer in a tokenizer.json; CheckpointError names the file."""
    try:
        return _Backend.from_str(text)
    except Exception as error:  # noqa: BLE001  # the library raises bare Exception on malformed files
        raise CheckpointError(f"{path} is not a tokenizer file: {error}") from None

"""Byte-level BPE tokens, the chat template and incremental decoding.

A message is `<|role|> content<|end|>`: one space before the content, so that a word has the same token at the start
of a message as inside it (copying a name back is then the same token). The reply's leading space is stripped again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as _Backend

from nested_runtime.errors import CheckpointError, RequestError

__all__ = ["ROLES", "SPECIAL", "IncrementalDecoder", "Tokenizer"]

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, SYSTEM, USER, ASSISTANT, END)
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}


class Tokenizer:
    """A `tokenizers` byte-level BPE with our five special tokens at ids 0-4."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        backend.encode_special_tokens = True  # in text they are text
        ids = [backend.token_to_id(token) for token in SPECIAL]
        if ids != list(range(len(SPECIAL))):
            raise CheckpointError(f"tokenizer.json: special tokens {SPECIAL} must have ids 0-4, found {ids}")
        vocabulary: dict[str, int] = backend.get_vocab()
        foreign = [entry for entry in vocabulary if entry not in SPECIAL and not BYTE_OF.keys() >= set(entry)]
        if foreign:
            raise CheckpointError(f"tokenizer.json: {min(foreign)!r} is not a byte-level entry; use a byte-level BPE")
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps; the model needs a row for the highest
        self.end_id = SPECIAL.index(END)
        self.end_ids: tuple[int, ...] = (self.end_id,)  # all that end a reply
        self.opens_with_space = True  # a reply's text begins with one, which is not part of it
        self.special_ids = frozenset(range(len(SPECIAL)))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `folder/tokenizer.json`."""
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(_Backend.from_str(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; a model folder needs it") from None
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001  # the library raises bare Exception on malformed files
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write `folder/tokenizer.json`."""
        part = Path(folder) / "tokenizer.part"
        part.write_text(self._backend.to_str(), encoding="utf-8")
        part.replace(Path(folder) / "tokenizer.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Text that spells a special token is encoded as text, never as that token."""
        ids: list[int] = self._encoding(text).ids
        return ids

    def encode_offsets(self, text: str) -> list[tuple[int, int]]:
        """Token ids of plain text, each with the character offset where it ends."""
        encoding = self._encoding(text)
        return [(i, end) for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _encoding(self, text: str) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise RequestError(f"text is not valid Unicode (a lone surrogate?): {text[:40]!a}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False)
        return text

    def token(self, token_id: int) -> str:
        """The vocabulary entry of one id."""
        entry: str | None = self._backend.id_to_token(token_id)
        if entry is None:
            raise RequestError(f"token id {token_id} is not in the vocabulary (0-{self.vocab_size - 1})")
        return entry

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (special tokens: their name)."""
        entry = self.token(token_id)
        if token_id in self.special_ids:
            return entry.encode()
        return bytes(BYTE_OF[c] for c in entry)

    def render_message(self, role: str, content: str) -> list[int]:
        """One message with its role token and end token."""
        if role not in ROLES:
            raise RequestError(f"unknown role {role!r}; use one of {', '.join(ROLES)}", param="messages")
        return [self.role_id(role), *self.encode(f" {content}"), self.end_id]

    def role_id(self, role: str) -> int:
        """The token that opens a message of `role`."""
        return SPECIAL.index(ROLES[role])

    def render(
        self, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = True, *, num_read: int = 0,
        goes_on: bool = False,
    ) -> list[int]:  # fmt: skip
        """Messages ({"role", "content"}) as tokens; with the generation prompt the reply comes next.

        num_read  messages to leave out because they were read, up to and with the end token of the last one
        goes_on   whether something was read before these messages
        """
        unread = list(messages)[num_read:]
        ids = [token for m in unread for token in self.render_message(m["role"], m["content"])]
        return [*ids, self.role_id("assistant")] if add_generation_prompt else ids


def _byte_of() -> dict[str, int]:
    """GPT-2's byte <-> printable character table, inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in set(plain)]
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


BYTE_OF = _byte_of()


class IncrementalDecoder:
    """Text of a growing token list: emits only whole UTF-8 characters, strips one leading space if `strip`."""

    def __init__(self, tokenizer: Tokenizer, *, strip: bool = True) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()
        self._strip = strip

    def push(self, token_id: int) -> str:
        """Add one token, return the text that became certain."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._bytes += self._tokenizer.token_bytes(token_id)
        return self._take(_complete(self._bytes))

    def flush(self) -> str:
        """The rest, broken characters replaced."""
        return self._take(len(self._bytes))

    def _take(self, size: int) -> str:
        text = self._bytes[:size].decode("utf-8", errors="replace")
        del self._bytes[:size]
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text


def _complete(data: bytearray) -> int:
    """Length of the prefix that holds no unfinished UTF-8 character."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if need > back else len(data)
    return len(data)

"""Training data: text and chats from a data folder, memory dialogues from the generator, packed into carried lanes.

`--data` names a folder of zstd or plain JSONL files: pretrain_1*.jsonl[.zst] of rows with `text` (prose) and chat_1* of
rows with `messages` ([{role, content}], chats).
Turns of chats that ask what memory would be asked are left out, see `ASKS`.
Files whose name holds `CC-BY-SA` are left out: shipped weights are trained on permissive rows only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from nested_runtime.errors import ConfigError, RequestError
from nested_runtime.hub_tokenizer import HubTokenizer
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.dense import echo_drill, pairs_drill
from nested_runtime.train.dialogues import Writer, compose, copy_drill
from nested_runtime.train.messages import Dialogue, DialogueSpec, Message, Span, Weights, stage
from nested_runtime.train.templated import FIRST, templated

__all__ = ["Corpus", "Lanes", "Mixture", "Segment", "Session", "read_rows", "render_dialogue"]

TONES = ("caring", "enthusiastic", "professional", "witty")  # the same questions in other tones: one tone is kept
HELD_OUT = 100  # one document in so many is never trained on (fluency evaluation)
DRILLS = {"echo": echo_drill, "pairs": pairs_drill, "drill": copy_drill}
SHORT = 192  # sessions below so many tokens get another part before the filler
NEAREST = 64  # tokens of the shortest stretch of chat inside a dialogue
FEW_SHARE, MANY_SHARE = 0.12, 0.4  # dialogues with one or two facts; with up to 22 (at the end)
AMONG = 0.5  # share of the turns behind such a stretch that have some more of it before them
SCRAPS = 0.5  # share of the stretches that are made of exchanges from everywhere instead of whole chats
PAUSE = 0.02  # share of texts among the turns that fill a session's last segment
# What memory would be asked, too: for who, when or which, and not about the assistant.
ASKS = re.compile(
    r"(?:^|[.!?,] )(?:(?:and|so|but|ok|okay|oh|well|wow|hmm|yes|no|hi|hello),? )*"
    r"(?:(?:who|what|when|where|which|whose|how (?:many|much|old|long|far|tall|big))\b"
    r"(?![^.!?]*\b(?:you|your|yours|u|we|us)\b)|(?:do|did) you (?:know|remember)\b|(?:can|could) you tell\b)"
    r"[^.!?]*\?\s*$",
    re.IGNORECASE,
)
PROSE_FILES, CHAT_FILES = ("pretrain_1",), ("chat_1",)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one `.jsonl` or `.jsonl.zst` file."""
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as plain:
            yield from _parsed(plain, path)
        return
    with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as raw:
        yield from _parsed(io.TextIOWrapper(raw, encoding="utf-8"), path)


def _parsed(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{path} line {number}: a row is an object with `text` or `messages`, got {line[:40]!r}"
                )
            yield row
    except (ValueError, zstandard.ZstdError) as error:
        raise ConfigError(f"{path} near line {number}: {error}") from None


@dataclass(frozen=True)
class Document:
    """One text or chat. `messages` is empty for prose."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether this document is kept for evaluation."""
        content = self.text or "\n".join(c for _, c in self.messages)
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest()) % HELD_OUT == 0


def documents(folder: Path, names: tuple[str, ...]) -> Iterator[Document]:
    """Permissive documents of the files whose name starts with one of `names`."""
    if not folder.is_dir():
        raise ConfigError(f"--data {folder} is not a folder; it must hold .jsonl or .jsonl.zst files")
    for path in sorted(folder.iterdir()):
        if ".jsonl" not in path.name or "CC-BY-SA" in path.name or not path.name.startswith(names):
            continue
        for row in read_rows(path):
            if "messages" in row:
                if row.get("source", "").removeprefix("ms-chitchat/") in TONES or _is_reading(row):
                    continue
                yield Document("", tuple((m["role"], m["content"].strip()) for m in row["messages"]))
            elif "text" in row:
                yield Document(row["text"].strip())


def _is_reading(row: dict[str, Any]) -> bool:
    """Passage questions and instructions: long, and not how people chat."""
    return str(row.get("source", "")).startswith(("fairytaleqa", "gpteacher", "rasbt", "chatterbot/coding"))


class Corpus:
    """Tokenised prose and chats, and short exchanges to serve as small talk inside dialogues."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, held_out: bool = False) -> None:
        """Raises ConfigError where the folder holds no prose or no chats; `held_out` is for evaluation."""
        self.prose = [
            np.array([*tokenizer.encode(d.text), tokenizer.end_id], dtype=np.uint32)
            for d in documents(folder, PROSE_FILES)
            if d.held_out == held_out
        ]
        self.chats: list[np.ndarray] = []
        self.small_talk: list[list[tuple[str, str]]] = []
        for d in documents(folder, CHAT_FILES):
            if d.held_out != held_out:
                continue
            messages = d.messages if held_out else _without_asks(d.messages)
            if not messages:
                continue
            try:
                ids = tokenizer.render(({"role": r, "content": c} for r, c in messages), add_generation_prompt=False)
            except RequestError:  # a chat template that wants other roles
                continue
            self.chats.append(np.array(ids, dtype=np.uint32))
            self.small_talk.append(_exchanges(messages))
        self.small_talk = [s for s in self.small_talk if s]
        if not self.prose or not self.chats:
            raise ConfigError(f"--data {folder} holds no prose ({PROSE_FILES}) or no chats ({CHAT_FILES})")


def _without_asks(messages: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The chat without turns that ask what memory would be asked and get an answer that nobody told.

    A model that learned these would take a question about memory for chat after some minutes of chat.
    """
    out: list[tuple[str, str]] = []
    asked = False
    for role, content in messages:
        asked = ASKS.search(content) is not None if role == "user" else asked and role == "assistant"
        if not asked:
            out.append((role, content))
    return tuple(out)


def _exchanges(messages: tuple[tuple[str, str], ...], longest: int = 120) -> list[tuple[str, str]]:
    """(user, assistant) pairs short enough to serve as small talk."""
    pairs = zip(messages[::2], messages[1::2], strict=False)
    return [
        (u[1], a[1]) for u, a in pairs if u[0] == "user" and a[0] == "assistant" and len(u[1]) + len(a[1]) < longest
    ]


@dataclass
class Session:
    """Tokens of one session, the loss weight of predicting each of them, and which of them tell nothing."""

    tokens: np.ndarray
    weights: np.ndarray
    idle: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # empty: none is

    def __post_init__(self) -> None:
        if not len(self.idle):
            self.idle = np.zeros(len(self.tokens), dtype=bool)


def _joined(parts: Sequence[Session]) -> Session:
    """One session after the other, as one."""
    return Session(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "weights", "idle")))


class Segment(NamedTuple):
    """What all lanes read in one step.

    tokens [B, T+1] int64, weights [B, T] of predicting tokens[:, 1:], fresh [B] bool (a session starts), idle [B, T]
    bool (which of tokens[:, :-1] tell nothing).
    """

    tokens: np.ndarray
    weights: np.ndarray
    fresh: np.ndarray
    idle: np.ndarray


def render_dialogue(dialogue: Dialogue, tokenizer: Tokenizer) -> Session:
    """Tokens and weights of a dialogue. Spans are encoded together and weights follow character offsets.

    Under a checkpoint's own chat template no token counts as idle: such models have no gate the price could close.
    """
    tokens: list[int] = []
    weights: list[float] = []
    idle: list[bool] = []
    if isinstance(tokenizer, HubTokenizer):
        tokens, weights = templated(dialogue, tokenizer)
        return Session(np.array(tokens, dtype=np.uint32), np.array(weights, dtype=np.float32))
    for message in dialogue.messages:
        text = " " + message.content
        encoding = tokenizer.encode_offsets(text)
        borders: list[tuple[int, int, float]] = []
        at = 1
        for span in message.spans:
            borders.append((at if borders else 0, at + len(span.text), span.weight))  # the first has the leading space
            at += len(span.text)
        tokens.append(tokenizer.role_id(message.role))
        weights.append(0.1 if message.role == "user" else 0.3)
        last = 0
        for token, end in encoding:
            tokens.append(token)
            begin, weight = next(((b, w) for b, e, w in borders if b < end <= e), (0, borders[-1][2] if borders else 0))
            if weight == Weights.value and last <= begin:
                weight *= FIRST
            elif weight == Weights.answer and last == 0 and message.role == "assistant":
                weight = Weights.opening
            weights.append(weight)
            last = end
        tokens.append(tokenizer.end_id)
        weights.append(1.0 if message.role == "assistant" else 0.1)
        idle += [message.idle] * (len(tokens) - len(idle))
    return Session(np.array(tokens, dtype=np.uint32), np.array(weights, dtype=np.float32), np.array(idle))


KINDS = ("echo", "pairs", "drill", "dialogue", "chat", "prose")


def _shares(*shares: float) -> Callable[[], Mapping[str, float]]:
    return lambda: dict(zip(KINDS, shares, strict=True))


@dataclass(frozen=True)
class Mixture:
    """Shares of session kinds: `first` at the start, `then` at progress `dense`, `last` at the end, linear between."""

    first: Mapping[str, float] = field(default_factory=_shares(0.12, 0.35, 0.10, 0.35, 0.05, 0.03))
    then: Mapping[str, float] = field(default_factory=_shares(0.03, 0.10, 0.07, 0.64, 0.10, 0.06))
    last: Mapping[str, float] = field(default_factory=_shares(0.02, 0.03, 0.03, 0.62, 0.20, 0.10))
    dense: float = 0.12
    far: float = 0.2  # share of dialogues with a stretch of chat inside, at the end
    farthest: int = 1500  # tokens of the longest one

    def __post_init__(self) -> None:
        for name in ("first", "then", "last"):
            shares = getattr(self, name)
            if set(shares) != set(KINDS) or not all(isinstance(v, int | float) and v >= 0 for v in shares.values()):
                raise ConfigError(
                    f"config field 'mixture.{name}' needs a share of each of {', '.join(KINDS)}: {shares}"
                )
        if not 0 <= self.far <= 1:
            raise ConfigError(f"config field 'mixture.far' must be between 0 and 1, got {self.far}")
        if self.farthest < NEAREST:
            raise ConfigError(f"config field 'mixture.farthest' must be at least {NEAREST}, got {self.farthest}")
        if not 0 < self.dense < 1:
            raise ConfigError(f"config field 'mixture.dense' must be between 0 and 1, got {self.dense}")

    def at(self, progress: float) -> list[float]:
        """Shares in the order of KINDS at `progress` in 0..1."""
        if progress < self.dense:
            a, b, f = self.first, self.then, progress / self.dense
        else:
            a, b, f = self.then, self.last, (progress - self.dense) / (1 - self.dense)
        return [a[k] * (1 - f) + b[k] * f for k in KINDS]


class Lanes:
    """B lanes of sessions, cut into segments of T tokens; a lane's memory is carried until its session ends."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        lanes: int,
        length: int,
        seed: int,
        mixture: Mixture,
        split: str = "train",
        progress: float = 0.0,
    ) -> None:
        self.split = split
        self.corpus, self.tokenizer, self.length, self.mixture = corpus, tokenizer, length, mixture
        self.rng = random.Random(seed)
        self.progress = progress
        self._writer: Writer | None = None  # of the session being drawn
        self._lanes: list[Session] = [self._new() for _ in range(lanes)]
        self._at = [0] * lanes

    def _new(self) -> Session:
        self._writer = None
        parts = [self._draw()]
        size = len(parts[0].tokens)
        while size < SHORT:
            parts.append(self._draw())
            size += len(parts[-1].tokens)
        segments = -(-(size - 1) // self.length)
        while size < segments * self.length + 1:
            parts.append(self._more())
            size += len(parts[-1].tokens)
        whole, end = _joined(parts), segments * self.length + 1
        return Session(whole.tokens[:end], self._thin(whole.weights[:end]), whole.idle[:end])

    def _more(self) -> Session:
        """What fills a session's last segment: further facts and questions, with text between them."""
        if self._writer is not None and self.rng.random() >= PAUSE:
            return render_dialogue(self._writer.more(), self.tokenizer)
        return self._text(self.rng.random() < 0.6)

    def _thin(self, weights: np.ndarray) -> np.ndarray:
        """Weights below 1 become rare ones of 1: the same expectation with fewer vocabulary projections."""
        draw = np.random.default_rng(self.rng.getrandbits(32)).random(len(weights))
        return np.where(weights < 1.0, draw < weights, weights).astype(np.float32)

    def _draw(self) -> Session:
        kind = self.rng.choices(KINDS, self.mixture.at(self.progress))[0]
        if kind in DRILLS:
            return render_dialogue(DRILLS[kind](self.rng, self.split), self.tokenizer)
        return self._dialogue() if kind == "dialogue" else self._text(kind == "chat")

    def _dialogue(self) -> Session:
        """A memory dialogue; some have unrelated chat between two of their turns, and then before many later ones.

        Every question behind it has to be told from chat, not only the first one.
        """
        dialogue, self._writer = compose(self.rng, self.split, self._spec(), self._talk())
        if self.rng.random() >= self.mixture.far * self.progress or len(dialogue.messages) < 4:
            return render_dialogue(dialogue, self.tokenizer)
        cut = 2 * self.rng.randint(1, len(dialogue.messages) // 2 - 1)
        parts = [render_dialogue(replace(dialogue, messages=dialogue.messages[:cut]), self.tokenizer)]
        left = math.exp(self.rng.uniform(math.log(NEAREST), math.log(self.mixture.farthest)))
        scraps = self.rng.random() < SCRAPS
        while left > 0:
            parts.append(self._scraps() if scraps else self._text(chat=True))
            left -= len(parts[-1].tokens)
        for at in range(cut, len(dialogue.messages), 2):
            if at > cut and self.rng.random() < AMONG:
                parts.append(self._scraps())
            parts.append(render_dialogue(replace(dialogue, messages=dialogue.messages[at : at + 2]), self.tokenizer))
        return _joined(parts)

    def _spec(self) -> DialogueSpec:
        spec = stage(self.progress * self.rng.random() ** 0.5)
        shape = self.rng.random()
        if shape < FEW_SHARE:
            return replace(spec, facts=(1, 2), questions=(1, 4))
        if shape < FEW_SHARE + MANY_SHARE * self.progress:
            return replace(spec, facts=(9, 22), questions=(4, 14), small_talk=(0, 1))
        return spec

    def _talk(self) -> list[list[tuple[str, str]]]:
        return self.rng.choices(self.corpus.small_talk, k=8)

    def _scraps(self) -> Session:
        """A few exchanges, each of another chat."""
        messages: list[Message] = []
        for _ in range(self.rng.randint(1, 4)):
            user, assistant = self.rng.choice(self.rng.choice(self.corpus.small_talk))
            messages.append(Message("user", (Span(user, Weights.user),), idle=True))
            messages.append(Message("assistant", (Span(assistant, Weights.small_talk),), idle=True))
        return render_dialogue(Dialogue(tuple(messages), ()), self.tokenizer)

    def _text(self, chat: bool) -> Session:
        ids = self.rng.choice(self.corpus.chats if chat else self.corpus.prose)[: 4 * self.length]
        return Session(ids, np.full(len(ids), 0.5, dtype=np.float32), np.ones(len(ids), dtype=bool))

    def next(self) -> Segment:
        """The next segment of every lane."""
        tokens, weights, fresh, idle = [], [], [], []
        for i, session in enumerate(self._lanes):
            if self._at[i] + self.length + 1 > len(session.tokens):
                session = self._lanes[i] = self._new()
                self._at[i] = 0
            at = self._at[i]
            fresh.append(at == 0)
            tokens.append(session.tokens[at : at + self.length + 1])
            weights.append(session.weights[at + 1 : at + self.length + 1])
            idle.append(session.idle[at : at + self.length])
            self._at[i] = at + self.length
        return Segment(np.stack(tokens).astype(np.int64), np.stack(weights), np.array(fresh), np.stack(idle))


def texts(folder: Path) -> Iterable[str]:
    """Plain text of prose and chats, to train a tokenizer on."""
    for d in documents(folder, PROSE_FILES + CHAT_FILES):
        yield d.text or "\n".join(f" {content}" for _, content in d.messages)

"""Templates of sentences and the relations made of them, each phrasing of the user's side in one split."""

import functools
import hashlib
import random
import re
import string
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from nested_runtime.train.keys import KEY_KINDS, VERB_KINDS
from nested_runtime.train.values import SPLITS, Values, capital, has_lines, lines, split_of, vowel_sound, words

__all__ = [
    "Relation",
    "Template",
    "by_split",
    "conflicts",
    "decorations",
    "filler",
    "normalised",
    "pairs",
    "parse_relation",
    "relations",
]

Variation = Callable[[list[str]], list[str]]  # of the literal pieces of one sentence
LISTS = ("tells", "asks", "acks", "answers", "corrections", "unknowns")
USER_LISTS = ("tells", "asks", "corrections")
FOLDER = resources.files("nested_runtime.train").joinpath("relations")
EXTRAS = ("names", "clauses")  # of training alone
PEOPLE = frozenset({"person", "name", "relative", "fullname"})
DETERMINERS = ("a", "an", "the", "my", "your", "our")
STARTERS = frozenset(
    ("My", "Our", "The", "We", "You", "It", "There", "Of", "For", "If", "In", "On", "At", "When", "No", "Nothing", "As",
     "People", "By", "These", "What", "What's", "Who", "Who's", "Where", "Where's", "When's", "Which", "How", "Do",
     "Can", "Could", "Tell", "Remind")
)  # fmt: skip
# Relations that tell the same thing in other words, beside those that share a question.
PETS = ("dog_name", "cat_name", "parrot_name", "horse_name")
ALIKE = (*(("pet_kind", pet) for pet in PETS), ("employer", "company_name"), ("spouse_of_name", "generic_relative_of"))
INDIRECT = (
    (re.compile(r"(what|who|where|when|how old|which \w+) (is|was) ((?:my|the|our|i|\{s\})\b.*?)( called| named)?\?"),
     r"\1 \3 \2\4"),
    (re.compile(r"((?:what|who|where|when|how|which)(?: \w+)?) do i (.*)\?"), r"\1 I \2"),
)  # fmt: skip
NOT_INDIRECT = re.compile(r",|\b(it|again|born|by|at the moment|be|from|in my)\b|\w(ing|ed)\b")


@dataclass(frozen=True)
class Template:
    """A sentence with fields, cut into (literal, field) pairs so that drawing needs no parsing."""

    text: str
    parts: tuple[tuple[str, str], ...]
    lowerable: bool  # may follow "By the way, " with a small letter
    prefixable: bool

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Cut ``text``; an article before a field is left to the drawing."""
        parts = tuple((lit, field or "") for lit, field, _, _ in string.Formatter().parse(text))
        first = text.split(" ", 1)[0]
        prefixable = first in STARTERS or first in ("I", "I'm", "I've") or first.startswith(("{s}", "{v}"))
        return cls(text, parts, first in STARTERS, prefixable and not text.startswith(("By the way", "As you")))

    @property
    def starts_with_value(self) -> bool:
        """Whether nothing stands before the value."""
        return self.parts[0] == ("", "v")

    @property
    def fields(self) -> frozenset[str]:
        """The names of the fields."""
        return frozenset(field for _, field in self.parts if field)

    def pieces(self, values: Mapping[str, str], lower: bool = False) -> list[tuple[str, str]]:
        """(text, field) pairs in order; the blank before a field goes with the field, as tokenizers cut."""
        out: list[tuple[str, str]] = []
        for i, (literal, field) in enumerate(self.parts):
            text = literal.lower() if lower else literal
            if not field:
                out.append((text, ""))
                continue
            value = values[field]
            head, blank, last = text[:-1].rpartition(" ") if text.endswith(" ") else ("", "", "")
            if last in ("a", "an", "A", "An"):
                text = f"{head}{blank}{last[0]}" + ("n " if vowel_sound(value) else " ")
            if i == 0 and not literal and field not in ("v", "w") and not lower:
                value = capital(value)
            spaced = text.endswith(" ")
            out += [(text[:-1] if spaced else text, ""), (f" {value}" if spaced else value, field)]
        return out

    def render(self, values: Mapping[str, str], lower: bool = False, vary: Variation | None = None) -> str:
        """The sentence as one string; `vary` may change the words that are no fields."""
        pieces = self.pieces(values, lower)
        if vary is None:
            return "".join([text for text, _ in pieces])
        literals = iter(vary([text for text, field in pieces if not field]))
        return "".join([text if field else next(literals) for text, field in pieces])


@functools.cache
def _composed(text: str) -> Template:
    return Template.parse(capital(text))


def normalised(text: str) -> str:
    """Two spellings of one phrasing become the same text."""
    small = text.lower().replace("what's", "what is").replace("favourite", "favorite").replace("colour", "color")
    return re.sub(r"[^\w{}]+", " ", small).strip()


@dataclass(frozen=True)
class Extra:
    """Ways to say it that only training draws, from `relations/train_only`: sentences made around noun phrases."""

    names: tuple[str, ...] = ()  # what is asked for: "my dog's name"
    clauses: tuple[str, ...] = ()  # the same as an indirect question: "what my dog is called"
    held_out: frozenset[str] = frozenset()  # what other splits are measured with; never composed

    def draw(self, frames: str, rng: random.Random) -> Template | None:
        """A noun phrase in a frame of a word file; None where there is none, or the sentence is held out."""
        return self._fill(frames, "{n}", self.names, rng)

    def ask(self, rng: random.Random) -> Template | None:
        """An indirect question in a frame."""
        return self._fill("more_wrappers", "{q}", self.clauses, rng)

    def _fill(self, frames: str, field: str, phrases: tuple[str, ...], rng: random.Random) -> Template | None:
        if not phrases:
            return None
        text = rng.choice(lines(frames)).replace(field, rng.choice(phrases))
        return None if normalised(text) in self.held_out else _composed(text)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how users tell, ask and correct it, how the assistant replies."""

    name: str
    value: str
    subjects: tuple[str, ...]
    generic: bool
    bare_value: bool  # templates bring the article of {v} themselves
    bare_subject: bool
    tells: Mapping[str, tuple[Template, ...]]  # by split, as asks, indirect and corrections
    asks: Mapping[str, tuple[Template, ...]]
    indirect: Mapping[str, tuple[Template, ...]]
    corrections: Mapping[str, tuple[Template, ...]]
    acks: tuple[Template, ...]
    answers: tuple[Template, ...]
    unknowns: tuple[Template, ...]
    extra: "Extra"

    @functools.cached_property
    def usual_ack(self) -> Template:
        """The acknowledgement that says what the usual answer, the first, will say in the same words."""
        answer = self.answers[0].text.lower()
        return next((ack for ack in self.acks if ack.text.lower().endswith(answer)), self.acks[0])

    def withheld(self, fields: Mapping[str, str]) -> str:
        """The usual answer up to its value, which is missing: "Your horse is called"; without the value's article.

        Nothing where the key is not complete by then. `fields` need no "v".
        """
        pieces = self.answers[0].pieces({**fields, "v": "-"})
        at = next(i for i, (_, name) in enumerate(pieces) if name == "v")
        if any(name for _, name in pieces[at + 1 :]):
            return ""
        return re.sub(r"(^| )an?$", "", "".join([text for text, _ in pieces[:at]]))

    @property
    def plain(self) -> bool:
        """Whether the name alone says what is meant: about the user, and not an open key."""
        return not self.generic and not self.subjects

    @property
    def label(self) -> str:
        """The name as words, for terse forms."""
        return self.name.replace("_", " ")

    @property
    def about_things(self) -> bool:
        """Whether the key is more than a person."""
        return bool(set(self.subjects) - PEOPLE)


def by_split(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every text in one split by a stable hash; from six texts on, no split is empty."""
    texts = tuple(dict.fromkeys(texts))
    split = {text: split_of(text, "phrasing", 84, 8) for text in texts}
    for name in SPLITS:
        if len(texts) >= 6 and name not in split.values():
            counts = {s: sum(v == s for v in split.values()) for s in SPLITS}
            spare = [text for text in texts if counts[split[text]] > 1]
            split[min(spare, key=lambda text: hashlib.blake2b(f"{name}:{text}".encode()).digest())] = name
    out = {name: tuple(text for text in texts if split[text] == name) for name in SPLITS}
    return {name: found or texts for name, found in out.items()}


def _indirect(text: str) -> str:
    """'what my dog is called' from 'What is my dog called?', or nothing where that would not be English."""
    small = text[0].lower() + text[1:]
    for pattern, form in INDIRECT:
        match = pattern.fullmatch(small.replace(" I ", " i "))
        if match and not NOT_INDIRECT.search(match[0].removesuffix("called?").removesuffix("named?")):
            return re.sub(r"\bi\b", "I", match.expand(form))
    return ""


def _determined(field: str, texts: Iterable[str]) -> bool:
    return any(re.search(rf"(?i)\b(?:{'|'.join(DETERMINERS)}) \{{{field}\}}", text) for text in texts)


def parse_relation(
    name: str, table: Mapping[str, Any], where: str, more: Mapping[str, list[str]] | None = None
) -> Relation:
    """A relation from its TOML table, and what only training draws; raises ValueError naming file, relation and field.

    A phrasing of `more` that another split holds is left out. Its noun phrases and clauses may stand in the table too.
    """

    def fail(field: str, why: str) -> ValueError:
        return ValueError(f"{where}: relation {name!r}: field {field!r}: {why}")

    for field in table.keys() - {"value", "subjects", *LISTS, *EXTRAS}:
        raise fail(field, "unknown field")
    value, subject = table.get("value"), table.get("subjects", "")
    kinds = Values.of("train").kinds()
    if not isinstance(value, str) or value not in kinds:
        raise fail("value", f"not a value kind: {value!r}")
    if not isinstance(subject, str) or set(subject.split()) - kinds - KEY_KINDS:
        raise fail("subjects", f"not subject kinds: {subject!r}")
    subjects = tuple(subject.split())
    known = {"v", *(["s"] if subjects else []), *subjects[1:], *(f"{k}s" for k in subjects[1:] if k in VERB_KINDS)}
    lists: dict[str, list[str]] = {}
    for field in LISTS:
        texts = table.get(field)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise fail(field, "must be a list of strings, not empty")
        extra = {"old"} if field == "corrections" else set()
        for text in texts:
            found = Template.parse(text).fields
            if found - known - extra:
                raise fail(field, f"unknown placeholder in {text!r}")
            if field in ("tells", "corrections", "answers") and "v" not in found:
                raise fail(field, f"no {{v}} in {text!r}")
            if field in ("asks", "unknowns") and "v" in found:
                raise fail(field, f"{{v}} given away in {text!r}")
        lists[field] = texts
    split = {field: by_split(lists[field]) for field in USER_LISTS}
    held_out = frozenset(
        normalised(text) for by in split.values() for other in SPLITS if other != "train" for text in by[other]
    )
    more = {field: table[field] for field in EXTRAS if field in table} | dict(more or {})
    for field, texts in more.items():
        if field not in (*USER_LISTS, *EXTRAS):
            raise fail(field, "unknown field of a train-only file")
        for text in texts:
            if Template.parse(text).fields - known - {"old"} or (
                field in ("tells", "corrections") and "{v}" not in text
            ):
                raise fail(field, f"wrong placeholders in {text!r}")
    for field in USER_LISTS:
        fresh = [t for t in more.get(field, []) if normalised(t) not in held_out and t not in split[field]["train"]]
        split[field] = {**split[field], "train": (*split[field]["train"], *fresh)}
    ways = Extra(tuple(more.get("names", ())), tuple(more.get("clauses", ())), held_out)
    indirect = {s: tuple(filter(None, map(_indirect, texts))) for s, texts in split["asks"].items()}
    everything = [text for texts in lists.values() for text in texts]
    user = {
        field: {s: tuple(map(Template.parse, texts)) for s, texts in by.items()}
        for field, by in (split | {"indirect": indirect}).items()
    }
    return Relation(
        name,
        value,
        subjects,
        generic=name.startswith("generic_"),
        bare_value=_determined("v", everything) or _determined("old", everything),
        bare_subject=_determined("s", everything),
        tells=user["tells"],
        asks=user["asks"],
        indirect=user["indirect"],
        corrections=user["corrections"],
        acks=tuple(map(Template.parse, lists["acks"])),
        answers=tuple(map(Template.parse, lists["answers"])),
        unknowns=tuple(map(Template.parse, lists["unknowns"])),
        extra=ways,
    )


@functools.cache
def relations(split: str = "dev") -> dict[str, Relation]:
    """All relations of ``split`` by name; training has more of its own, in the folder ``relations/more``."""
    if split != "train":
        return _measured()
    measured, more = _measured(), _read(FOLDER.joinpath("more"), {})
    if known := measured.keys() & more.keys():
        raise ValueError(f"relations/more: a relation of this name is measured already: {min(known)!r}")
    return measured | more


@functools.cache
def _measured() -> dict[str, Relation]:
    """The relations that every split tells."""
    return _read(FOLDER, _train_only(FOLDER.joinpath("train_only")))


def _read(folder: Traversable, more: Mapping[str, Mapping[str, list[str]]]) -> dict[str, Relation]:
    """The relations of a folder's files, by name, with what only training draws."""
    merged: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml"):
            continue
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file.name}: {error}") from error
        for name, table in tables.items():
            parse_relation(name, table, file.name)
            merged[name] = _merge(name, merged[name], table, file.name) if name in merged else table
            origin[name] = file.name
    if unknown := more.keys() - merged.keys():
        raise ValueError(f"train_only: no relation of this name: {min(unknown)!r}")
    return {name: parse_relation(name, table, origin[name], more.get(name)) for name, table in merged.items()}


def _train_only(folder: Traversable) -> dict[str, dict[str, list[str]]]:
    """Relation -> field -> phrasings, over the files of the folder."""
    out: dict[str, dict[str, list[str]]] = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        for name, table in tomllib.loads(file.read_text(encoding="utf-8")).items():
            fields = out.setdefault(name, {})
            for field, texts in table.items():
                fields[field] = fields.get(field, []) + texts
    return out


def _merge(name: str, old: Mapping[str, object], new: Mapping[str, object], where: str) -> dict[str, object]:
    """Two files may add phrasings to the same relation, as long as they mean the same kind of fact."""
    for field in ("value", "subjects"):
        if old.get(field, "") != new.get(field, ""):
            raise ValueError(f"{where}: relation {name!r}: field {field!r}: differs from an earlier file")

    def texts(table: Mapping[str, object], field: str) -> list[object]:
        found = table[field]
        return found if isinstance(found, list) else []

    return {**new, **{field: texts(old, field) + texts(new, field) for field in LISTS}}


@functools.cache
def conflicts(split: str) -> dict[str, frozenset[str]]:
    """For every relation those that share a question with it: two of them would be ambiguous in one dialogue."""
    asked: dict[str, set[str]] = {}
    for name, relation in relations(split).items():
        kind = relation.subjects[:1]
        people = tuple(f"my {r}" for r in words("relatives")) if kind == ("person",) else ()
        for subject in words("relatives") if kind == ("relative",) else ("{s}", *people):
            texts = {t.text for ts in relation.asks.values() for t in ts}
            if split == "train":
                texts |= {*relation.extra.names, *relation.extra.clauses}
            for text in texts:
                question = text.replace("{s}", subject).lower().replace("what's", "what is").rstrip("?.!")
                asked.setdefault(question, set()).add(name)
    out = {name: set[str]() for name in relations(split)}
    for names in [*asked.values(), *[set(group) & out.keys() for group in ALIKE]]:
        for name in names:
            out[name] |= names - {name}
    return {name: frozenset(others) for name, others in out.items()}


class _Drawn(dict[str, str]):
    """Draws a value of the kind that a field names."""

    def __init__(self, values: Values, rng: random.Random) -> None:
        super().__init__()
        self.drawer, self.rng = values, rng

    def __missing__(self, kind: str) -> str:
        return self.drawer.draw(kind, self.rng)


@functools.cache
def _distractors() -> tuple[Template, ...]:
    return tuple(map(Template.parse, lines("distractors")))


def filler(values: Values, rng: random.Random) -> str:
    """A sentence that tells no fact of the user, but may name things."""
    if rng.random() < 0.5:
        return rng.choice(lines("filler"))
    return rng.choice(_distractors()).render(_Drawn(values, rng))


@functools.cache
def decorations(name: str, split: str) -> tuple[str, ...]:
    """The prefixes, suffixes or wrappers of one word file that belong to ``split``; training has more of its own."""
    found = by_split(lines(name))
    if split != "train" or not has_lines(f"train_only/{name}"):
        return found[split]
    held_out = {normalised(text) for other in SPLITS if other != "train" for text in found[other]}
    more = [text for text in lines(f"train_only/{name}") if normalised(text) not in held_out]
    return tuple(dict.fromkeys((*found["train"], *more)))


@functools.cache
def pairs(split: str) -> tuple[tuple[str, str, Template], ...]:
    """Sentences of ``split`` that tell two facts, {v} of the first relation and {w} of the second."""
    out = [tuple(map(str.strip, line.split("|"))) for line in decorations("pairs", split)]
    return tuple((first, second, Template.parse(text)) for first, second, text in out)

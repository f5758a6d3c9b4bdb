"""Templates of sentences and the relations made of them, each phrasing of the user's side in one split."""

import functools
import hashlib
import re
import string
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

from nested_runtime.train.values import SPLITS, Values, capital, lines, split_of, words

__all__ = ["Relation", "Template", "by_split", "parse_relation", "relations"]

LISTS = ("tells", "asks", "acks", "answers", "corrections", "unknowns")
USER_LISTS = ("tells", "asks", "corrections")
KEY_KINDS = frozenset({"person", "relative", "my_noun", "the_noun", "noun", "verb"})
DETERMINERS = ("a", "an", "the", "my", "your", "our")
STARTERS = {"My", "Our", "The", "We", "You", "It", "There", "Of", "For", "If", "In", "On", "At", "Nothing", "People"}
NO_PREFIX = {"Hi", "Hello", "Hey", "By", "Please", "So", "Actually", "Remember:", "FYI", "Fyi", "Guess", "Just", "Oh"}
INDIRECT = (
    (re.compile(r"(what|who|where|when|how old|which \w+) (is|are|was|were) ((?:my|the|our|i|\{s\}).*?)( called| named)?\?"),
     r"\1 \3 \2\4"),
    (re.compile(r"((?:what|who|where|when|how|which)(?: \w+)?) do i (.*)\?"), r"\1 I \2"),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A sentence with fields, cut into (literal, field) pairs so that drawing needs no parsing."""

    text: str
    parts: tuple[tuple[str, str], ...]
    lowerable: bool                                                   # may follow "By the way, " with a small letter
    prefixable: bool

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Cut ``text``; an article before a field is left to the drawing."""
        parts = tuple((lit, field or "") for lit, field, _, _ in string.Formatter().parse(text))
        first = text.split(" ", 1)[0]
        subject = first.startswith(("{s}", "{v}", "I", "I'"))
        return cls(text, parts, first in STARTERS, (first in STARTERS or subject) and first not in NO_PREFIX)

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
            if text.endswith((" a ", " an ")) or text in ("A ", "a ", "An ", "an "):
                stem = text[: text.rindex("a" if text[0] not in "A" or len(text) > 3 else "A") + 1]
                text = stem + ("n " if value[:1].lower() in "aeiou" else " ")
            if i == 0 and not literal and field != "v" and not lower:
                value = capital(value)
            blank = text.endswith(" ")
            out += [(text[:-1] if blank else text, ""), (f" {value}" if blank else value, field)]
        return out

    def render(self, values: Mapping[str, str], lower: bool = False) -> str:
        """The sentence as one string."""
        return "".join([text for text, _ in self.pieces(values, lower)])


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how users tell, ask and correct it, how the assistant replies."""

    name: str
    value: str
    subjects: tuple[str, ...]
    generic: bool
    bare_value: bool                                                  # templates bring the article of {v} themselves
    bare_subject: bool
    tells: Mapping[str, tuple[Template, ...]]                         # by split, as asks, indirect and corrections
    asks: Mapping[str, tuple[Template, ...]]
    indirect: Mapping[str, tuple[Template, ...]]
    corrections: Mapping[str, tuple[Template, ...]]
    acks: tuple[Template, ...]
    answers: tuple[Template, ...]
    unknowns: tuple[Template, ...]


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
        if (match := pattern.fullmatch(small.replace(" I ", " i "))) and not re.search(r"\w(?:ing|ed)\b", match[0]):
            return re.sub(r"\bi\b", "I", match.expand(form)).replace("I am", "I am")
    return ""


def _determined(field: str, texts: Iterable[str]) -> bool:
    return any(re.search(rf"(?i)\b(?:{'|'.join(DETERMINERS)}) \{{{field}\}}", text) for text in texts)


def parse_relation(name: str, table: Mapping[str, object], where: str) -> Relation:
    """A relation from its TOML table; raises ValueError naming file, relation and field."""
    def fail(field: str, why: str) -> ValueError:
        return ValueError(f"{where}: relation {name!r}: field {field!r}: {why}")

    for field in table.keys() - {"value", "subjects", *LISTS}:
        raise fail(field, "unknown field")
    value, subject = table.get("value"), table.get("subjects", "")
    kinds = Values("train").kinds()
    if not isinstance(value, str) or value not in kinds:
        raise fail("value", f"not a value kind: {value!r}")
    if not isinstance(subject, str) or set(subject.split()) - kinds - KEY_KINDS:
        raise fail("subjects", f"not subject kinds: {subject!r}")
    subjects = tuple(subject.split())
    known = {"v"} | ({"s"} if subjects else set()) | {f for k in subjects[1:] for f in ((k, "verbs") if k == "verb" else (k,))}
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
    indirect = {s: tuple(filter(None, map(_indirect, texts))) for s, texts in split["asks"].items()}
    everything = [text for texts in lists.values() for text in texts]
    parsed = {f: {s: tuple(map(Template.parse, t)) for s, t in d.items()} for f, d in (split | {"indirect": indirect}).items()}
    return Relation(
        name, value, subjects, name.startswith("generic_"), _determined("v", everything) or _determined("old", everything),
        _determined("s", everything), parsed["tells"], parsed["asks"], parsed["indirect"], parsed["corrections"],
        *(tuple(map(Template.parse, lists[f])) for f in ("acks", "answers", "unknowns")),
    )  # fmt: skip


@functools.cache
def relations() -> dict[str, Relation]:
    """All relations of the folder ``relations``, by name."""
    merged: dict[str, dict[str, object]] = {}
    origin: dict[str, str] = {}
    folder = resources.files("nested_runtime.train").joinpath("relations")
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
    return {name: parse_relation(name, table, origin[name]) for name, table in merged.items()}


def _merge(name: str, old: Mapping[str, object], new: Mapping[str, object], where: str) -> dict[str, object]:
    """Two files may add phrasings to the same relation, as long as they mean the same kind of fact."""
    for field in ("value", "subjects"):
        if old.get(field, "") != new.get(field, ""):
            raise ValueError(f"{where}: relation {name!r}: field {field!r}: differs from an earlier file")
    out = dict(new)
    for field in LISTS:
        first, second = old[field], new[field]
        assert isinstance(first, list) and isinstance(second, list)
        out[field] = [*first, *second]
    return out


@functools.cache
def conflicts() -> dict[str, frozenset[str]]:
    """For every relation those that share a question with it: two of them would be ambiguous in one dialogue."""
    asked: dict[str, set[str]] = {}
    for name, relation in relations().items():
        people = tuple(f"my {r}" for r in words("relatives")) if relation.subjects[:1] == ("person",) else ()
        for subject in people or (words("relatives") if relation.subjects[:1] == ("relative",) else ("{s}",)):
            for template in {t for ts in relation.asks.values() for t in ts}:
                question = template.text.replace("{s}", subject).lower().replace("what's", "what is").rstrip("?.!")
                asked.setdefault(question, set()).add(name)
    out = {name: set[str]() for name in relations()}
    for names in asked.values():
        for name in names:
            out[name] |= names - {name}
    return {name: frozenset(others) for name, others in out.items()}


@functools.cache
def decorations(name: str, split: str) -> tuple[str, ...]:
    """The prefixes, suffixes or wrappers of one word file that belong to ``split``."""
    return by_split(lines(name))[split]

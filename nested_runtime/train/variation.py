"""Variation of what users say: synonyms, dropped small words, slips of the keyboard. Training only.

A relation has a few dozen phrasings; a model that has seen each a hundred times knows them by heart. Values, people
and things are never touched.
"""

import functools
import random
import re

from nested_runtime.train.values import lines, vowel_sound

__all__ = ["vary"]

SMALL = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "do",
        "did",
        "does",
        "of",
        "to",
        "that",
        "you",
        "me",
        "my",
        "please",
        "i",
        "was",
        "so",
        "for",
        "it",
        "in",
        "on",
        "at",
        "this",
    ]
)
ARTICLE = re.compile(r"\b([aA])n? (\w+)")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@functools.cache
def _synonyms() -> tuple[re.Pattern[str], dict[str, tuple[str, ...]]]:
    groups = [tuple(line.split("|")) for line in lines("synonyms")]
    table = {first: others for first, *others in groups}
    longest_first = sorted(table, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w'])(?:{'|'.join(map(re.escape, longest_first))})(?![\w'])", re.IGNORECASE)
    return pattern, {first: tuple(others) for first, others in table.items()}


def _replace(text: str, rng: random.Random) -> str:
    """Each word or phrase that has synonyms becomes one of them half of the time."""
    pattern, table = _synonyms()

    def other(match: re.Match[str]) -> str:
        found = match[0]
        if rng.random() < 0.5:
            return found
        word = rng.choice(table[found.lower()])
        return word[0].upper() + word[1:] if found[0].isupper() and found != "I" else word

    return ARTICLE.sub(_article, pattern.sub(other, text))


def _article(match: re.Match[str]) -> str:
    """The article that the word behind it now needs."""
    return f"{match[1]}{'n' if vowel_sound(match[2]) else ''} {match[2]}"


def _drop(text: str, rng: random.Random) -> str:
    """Without some of the small words; the blanks at both ends stay."""
    words = text.split(" ")
    kept = [w for i, w in enumerate(words) if not (w.lower() in SMALL and i > 0 and rng.random() < 0.4)]
    return " ".join(kept)


def _slip(text: str, rng: random.Random) -> str:
    """One letter doubled, lost, exchanged or another."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    changed = (text[i] * 2, "", text[i + 1], rng.choice(LETTERS))[rng.randrange(4)]
    return text[:i] + changed + text[i + 1 :]


def vary(literals: list[str], rng: random.Random) -> list[str]:
    """The literal pieces of one sentence, varied together: mostly synonyms, sometimes dropped words or a slip."""
    shape = rng.random()
    out = [_replace(text, rng) for text in literals]
    if shape < 0.25:
        out = [_drop(text, rng) for text in out]
    if shape > 0.85 and any(text.strip() for text in out):
        i = max(range(len(out)), key=lambda n: len(out[n]))
        out[i] = _slip(out[i], rng)
    return out

"""Keys: whom or what a fact is about, as the user says it and as the assistant says it."""

import functools
import random
from collections.abc import Sequence

from nested_runtime.train.values import Values, capital, invent

__all__ = ["KEY_KINDS", "VERB_KINDS", "Fields", "draw_key", "identity", "third_person"]

Fields = dict[str, str]
VERB_KINDS = {"verb": "verbs", "act": "place_verbs"}
LISTED = VERB_KINDS | {"topic": "topics"}
UNHEARD = 0.08  # share of the relatives in training that are invented words
SAME_PERSON = {"mom": "mother", "dad": "father", "grandma": "grandmother", "grandpa": "grandfather", "wife": "partner",
               "husband": "partner", "girlfriend": "partner", "boyfriend": "partner", "fiance": "partner",
               "flatmate": "roommate", "manager": "boss", "best friend": "friend"}  # fmt: skip
SIBLINGS = ("sister", "brother")
KEY_KINDS = frozenset({"person", "my_noun", "the_noun", "noun", "event", "plural", "relative", *LISTED})


@functools.cache
def third_person(verb: str) -> str:
    """The verb with "he" or "she"; also the plural of a noun."""
    verb, blank, rest = verb.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return f"{verb}es{blank}{rest}"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies{blank}{rest}"
    return "has" + blank + rest if verb == "have" else f"{verb}s{blank}{rest}"


def _noun(kind: str, values: Values, rng: random.Random) -> tuple[str, str]:
    own = values.own
    noun = rng.choice(own("events")) if kind == "event" else values.noun(rng)
    if kind == "plural":
        plural = third_person(noun)
        return plural, plural
    if kind == "noun":
        return noun, noun
    if rng.random() < 0.3:
        noun = f"{rng.choice(own('adjectives'))} {noun}"
    elif kind != "the_noun" and rng.random() < 0.15:
        owner = capital(invent(rng)) if rng.random() < 0.3 else rng.choice(own("names"))
        return f"{owner}'s {noun}", f"{owner}'s {noun}"
    mine = kind != "the_noun" and rng.random() < 0.7
    return (f"my {noun}", f"your {noun}") if mine else (f"the {noun}", f"the {noun}")


def _relative(values: Values, rng: random.Random) -> str:
    """Who somebody is to the user; in training now and then by a word that does not exist, as no list has them all."""
    if values.split == "train" and rng.random() < UNHEARD:
        return values.invent(rng)
    return rng.choice(values.own("relatives"))


def _subject(kind: str, values: Values, rng: random.Random) -> tuple[str, str]:
    if kind == "person" and rng.random() < 0.4:
        relative = _relative(values, rng)
        return f"my {relative}", f"your {relative}"
    if kind == "relative":
        relative = _relative(values, rng)
        return relative, relative
    if kind in LISTED:
        word = rng.choice(values.own(LISTED[kind]))
        return word, word
    if kind in KEY_KINDS and kind != "person":
        return _noun(kind, values, rng)
    value = values.draw("name" if kind == "person" else kind, rng)
    return value, value


def draw_key(kinds: Sequence[str], bare: bool, values: Values, rng: random.Random) -> tuple[Fields, Fields]:
    """The fields of a key of ``kinds``: the first is {s}, the others are named as their kind."""
    user: Fields = {}
    assistant: Fields = {}
    for i, kind in enumerate(kinds):
        field = "s" if i == 0 else kind
        mine, yours = _subject(kind, values, rng)
        if bare and mine.startswith(("a ", "an ")):
            mine = yours = mine.split(" ", 1)[1]
        user[field], assistant[field] = mine, yours
        if kind in VERB_KINDS:
            user[kind + "s"] = assistant[kind + "s"] = third_person(mine)
    return user, assistant


def identity(kinds: Sequence[str], user: Fields) -> tuple[str, ...]:
    """What a key comes down to: keys of one identity (my mom, my mother; the icy kilt, my kilt) would be ambiguous."""
    out = []
    for i, kind in enumerate(kinds):
        text = user["s" if i == 0 else kind].lower()
        bare = text.removeprefix("my ").removeprefix("the ")
        if kind == "relative" or (text.startswith("my ") and kind == "person"):
            last = bare.rpartition(" ")[2]
            bare = SAME_PERSON.get(bare, last if last in SIBLINGS else bare)
        elif kind in ("my_noun", "the_noun", "event"):
            bare = bare.rpartition(" ")[2]
        out.append(bare)
    return tuple(out)

"""Open-vocabulary values: very large spaces of strings, so that copying is the only way to answer.

Every concrete string belongs to one split (train, dev, test) by a stable hash; ``CLOSED`` kinds are too small to be
divided and are shared by all splits.
"""

import functools
import hashlib
import random
from collections.abc import Callable
from importlib import resources

__all__ = ["CLOSED", "SPLITS", "Values", "has_lines", "invent", "lines", "split_of", "vowel_sound", "words"]

SPLITS = ("train", "dev", "test")
CLOSED = frozenset({"weekday", "month", "small_number"})
Draw = Callable[[random.Random], str]
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
NUMERALS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
ONSETS = (
    ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"),
    ("br", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "qu", "sk", "sl", "sp", "st", "str", "sw", "th", "tr", "w", "y"),
    ("b", "bl", "ch", "d", "f", "h", "j", "k", "kn", "l", "m", "n", "ph", "r", "sh", "sn", "t", "v", "wh", "x", "z"),
    ("k", "m", "n", "r", "s", "t", "h", "y", "ts", "ch", "sh"),
)
VOWELS = (
    ("a", "e", "i", "o", "u"),
    ("a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou"),
    ("a", "e", "i", "o", "u", "y", "ia", "io", "eu"),
    ("a", "i", "u", "e", "o"),
)
CODAS = (
    ("", "", "n", "r", "l", "s"),
    ("", "ck", "ft", "ld", "m", "n", "nd", "nk", "p", "rd", "sh", "st", "t"),
    ("", "", "b", "d", "g", "l", "m", "n", "rn", "rt", "s", "th", "x", "z"),
    ("", "", "", "n"),
)
BLENDED = 0.3  # share of invented words in training that are made of two
PREPOSITIONS = ("in", "on", "under", "behind", "next to", "near", "inside", "above", "below", "beside", "in front of")


def split_of(text: str, salt: str, train: int = 80, dev: int = 10) -> str:
    """The split of ``text`` by a hash that is the same in every process; ``train`` and ``dev`` are per cent."""
    point = int.from_bytes(hashlib.blake2b(f"{salt}:{text.lower()}".encode(), digest_size=4).digest(), "big") % 100
    return "train" if point < train else "dev" if point < train + dev else "test"


@functools.cache
def lines(name: str) -> tuple[str, ...]:
    """The lines of a word file as they stand, spaces at the ends included."""
    text = resources.files("nested_runtime.train").joinpath("words", f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.split("\n") if line)


def has_lines(name: str) -> bool:
    """Whether there is a word file of this name."""
    return resources.files("nested_runtime.train").joinpath("words", f"{name}.txt").is_file()


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """The entries of a word file, separated by commas or line ends, without repeats."""
    return tuple(dict.fromkeys(w for line in lines(name) for w in map(str.strip, line.split(",")) if w))


@functools.cache
def _pool(name: str, split: str) -> tuple[str, ...]:
    """The entries of a word file; training has more of its own."""
    more = words(f"train_only/{name}") if split == "train" and has_lines(f"train_only/{name}") else ()
    return tuple(dict.fromkeys((*words(name), *more)))


@functools.cache
def _own(name: str, split: str) -> tuple[str, ...]:
    return tuple(w for w in _pool(name, split) if split_of(w, "value") == split) or words(name)


def invent(rng: random.Random, syllables: int = 0) -> str:
    """A pronounceable word that most likely does not exist, of one to four syllables."""
    style = rng.randrange(len(ONSETS))
    count = syllables or rng.choice((1, 2, 2, 2, 3, 3, 4))
    onsets, vowels, codas = ONSETS[style], VOWELS[style], CODAS[style]
    word = "" if rng.random() < 0.15 else rng.choice(onsets)
    for i in range(count):
        word += (rng.choice(onsets) if i else "") + rng.choice(vowels)
        if i == count - 1 or rng.random() < 0.3:
            word += rng.choice(codas)
    return word if len(word) > 2 else word + rng.choice(onsets) + rng.choice(vowels)


def vowel_sound(phrase: str) -> bool:
    """Whether "an" goes before ``phrase``, as far as spelling tells."""
    small = phrase.lower()
    if small.startswith(("uni", "use", "eu", "one", "ukr", "uga", "uru")):
        return False
    return small.startswith(("a", "e", "i", "o", "u", "8", "11", "18", "hour", "honest", "heir", "herb"))


def article(phrase: str) -> str:
    """``phrase`` behind its indefinite article."""
    return f"{'an' if vowel_sound(phrase) else 'a'} {phrase}"


def capital(phrase: str) -> str:
    """``phrase`` with its first letter in upper case, the others as they are."""
    return phrase[:1].upper() + phrase[1:]


def _code(rng: random.Random) -> str:
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    head = "".join(rng.choice(letters) for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    tail = rng.choice(letters) + rng.choice("0123456789")
    return rng.choice((f"{head}-{digits}", f"{head}{digits}", f"{digits}-{head}", f"{head}-{digits}-{tail}"))


def _phone(rng: random.Random) -> str:
    d = "".join(rng.choice("0123456789") for _ in range(10))
    return rng.choice((f"555-{d[:4]}", f"{d[:3]}-{d[3:7]}", f"0{d[:3]} {d[3:9]}", f"+{d[:2]} {d[2:5]} {d[5:]}", d[:7]))


def _number(rng: random.Random) -> str:
    size = rng.randint(1, 6)
    return str(rng.randrange(10 ** (size - 1), 10**size))


def _date(rng: random.Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    ordinal = f"{day}{'th' if 4 <= day <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
    return rng.choice((f"the {ordinal} of {month}", f"{month} {day}", f"{month} {ordinal}", f"{day} {month}"))


def _time(rng: random.Random) -> str:
    hour, minute = rng.choice(NUMERALS), rng.randrange(0, 60, 5)
    clock = f"{rng.randint(1, 23)}:{minute:02d}"
    oral = f"{rng.choice(('half past', 'quarter past', 'quarter to', 'ten past', 'five to', 'twenty to'))} {hour}"
    return rng.choice((clock, clock, f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}", oral, f"{hour} o'clock"))


def _price(rng: random.Random) -> str:
    n = rng.choice((rng.randint(2, 99), rng.randint(100, 9999)))
    return rng.choice((f"${n}", f"{n} dollars", f"{n} euros", f"{n} pounds", f"${n}.{rng.randint(0, 99):02d}"))


def _small(rng: random.Random) -> str:
    return rng.choice(NUMERALS) if rng.random() < 0.25 else str(rng.randint(2, 99))


def _when(rng: random.Random) -> str:
    part = rng.choice(("", "", " morning", " afternoon", " evening", " night"))
    return _date(rng) if rng.random() < 0.5 else rng.choice(WEEKDAYS) + part


class Values:
    """Draws values of every kind that belong to one split."""

    def __init__(self, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
        self.split = split
        plain = {"animal": "animals", "job": "jobs", "hobby": "hobbies", "word": "nouns"}
        names = {"name": "names", "surname": "surnames", "place": "places", "country": "countries"}
        self._draws: dict[str, Draw] = {kind: self._mixed(self._listed(name)) for kind, name in plain.items()}
        self._draws |= {kind: self._mixed(self._listed(name), capital) for kind, name in names.items()}
        self._draws |= {
            "color": self._mixed(self._color), "food": self._mixed(self._food), "invented": self.invent,
            "fullname": self._fullname, "thing": self._thing, "title": self._title, "phrase": self._phrase,
            "number": _number, "code": _code, "phone": _phone, "date": _date, "time": _time, "price": _price,
            "weekday": lambda r: r.choice(WEEKDAYS), "month": lambda r: r.choice(MONTHS),
            "year": lambda r: str(r.randint(1850, 2080)), "small_number": _small, "when": _when, "spot": self._spot,
            "any": self._any, "any_name": self._any_name, "any_code": self._any_code, "object": self._object,
        }  # fmt: skip

    @staticmethod
    @functools.cache
    def of(split: str) -> "Values":
        """The one drawer of a split."""
        return Values(split)

    def kinds(self) -> frozenset[str]:
        """The kinds that ``draw`` knows."""
        return frozenset(self._draws)

    def draw(self, kind: str, rng: random.Random) -> str:
        """A value of ``kind`` that belongs to this split."""
        make = self._draws[kind]
        if kind in CLOSED:
            return make(rng)
        for _ in range(10_000):
            value = make(rng)
            if split_of(value, "value") == self.split:
                return value
        raise RuntimeError(f"no value of kind {kind!r} in split {self.split!r}")

    def own(self, name: str) -> tuple[str, ...]:
        """The entries of a word file that belong to this split."""
        return _own(name, self.split)

    def _any_of(self, name: str, rng: random.Random) -> str:
        """An entry of a word file, of any split: part of a value that belongs to one as a whole."""
        return rng.choice(_pool(name, self.split))

    def invent(self, rng: random.Random) -> str:
        """A word that most likely does not exist; in training also the head of one word with the tail of another."""
        if self.split != "train" or rng.random() > BLENDED:
            return invent(rng)
        head, tail = (rng.choice(self.own("nouns")) for _ in range(2))
        return head[: rng.randint(2, len(head))] + tail[-rng.randint(2, len(tail)) :]

    def _listed(self, name: str) -> Draw:
        entries = self.own(name)
        return lambda rng: rng.choice(entries)

    def _mixed(self, listed: Draw, style: Callable[[str], str] = str) -> Draw:
        """Listed values, but often an invented one or any common word: the kind never tells the value."""
        common = tuple(w for name in ("nouns", "more_nouns") for w in self.own(name))
        if style is capital:
            common += self.own("adjectives")

        def draw(rng: random.Random) -> str:
            chance = rng.random()
            if chance < 0.35:
                return style(self.invent(rng))
            return style(rng.choice(common)) if chance < 0.5 else listed(rng)

        return draw

    def _phrase(self, rng: random.Random) -> str:
        return f"{self._any_of('adjectives', rng)} {self._any_of('nouns', rng)}"

    def _thing(self, rng: random.Random) -> str:
        chance = rng.random()
        if chance < 0.2:
            return article(f"{self._any_of('adjectives', rng)} {self.invent(rng)}")
        return article(self._phrase(rng) if chance < 0.75 else self.noun(rng))

    def noun(self, rng: random.Random) -> str:
        """A noun, listed or invented."""
        return self.draw("invented", rng) if rng.random() < 0.35 else rng.choice(self.own("nouns"))

    def _color(self, rng: random.Random) -> str:
        color = self._any_of("colors", rng)
        return f"{rng.choice(('dark', 'light', 'pale', 'bright', 'deep'))} {color}" if rng.random() < 0.25 else color

    def _food(self, rng: random.Random) -> str:
        food = self._any_of("foods", rng)
        return f"{rng.choice(('fried', 'spicy', 'baked', 'fresh', 'grilled'))} {food}" if rng.random() < 0.2 else food

    def _fullname(self, rng: random.Random) -> str:
        first = capital(self.invent(rng)) if rng.random() < 0.3 else self._any_of("names", rng)
        return f"{first} {capital(self.invent(rng)) if rng.random() < 0.4 else self._any_of('surnames', rng)}"

    def _title(self, rng: random.Random) -> str:
        adjective, noun = capital(self._any_of("adjectives", rng)), capital(self._any_of("nouns", rng))
        name = capital(self.invent(rng)) if rng.random() < 0.6 else self._any_of("names", rng)
        forms = (f"The {adjective} {noun}", f"{adjective} {noun}", f"The {noun} of {name}", name, f"{name} {noun}")
        return rng.choice(forms)

    def _spot(self, rng: random.Random) -> str:
        noun = self._phrase(rng) if rng.random() < 0.35 else self.noun(rng)
        return f"{rng.choice(PREPOSITIONS)} the {noun}"

    def _any(self, rng: random.Random) -> str:
        kinds = ("invented", "invented", "word", "name", "place", "thing", "thing", "number", "color", "code", "title")
        return self._draws[rng.choice(kinds)](rng)

    def _any_name(self, rng: random.Random) -> str:
        return self._draws[rng.choice(("name", "name", "invented", "title", "place", "fullname"))](rng)

    def _object(self, rng: random.Random) -> str:
        return self._draws[rng.choice(("food", "thing", "thing", "invented", "hobby", "word"))](rng)

    def _any_code(self, rng: random.Random) -> str:
        return self._draws[rng.choice(("code", "number", "invented", "word", "phrase", "name"))](rng)

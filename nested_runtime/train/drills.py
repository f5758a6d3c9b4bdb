"""Copy drills: short dialogues of invented words and codes, to be said back letter by letter."""

import random

from nested_runtime.train.messages import Dialogue, Message, Probe, Span, Weights
from nested_runtime.train.phrasing import decorations
from nested_runtime.train.values import Values

__all__ = ["copy_drill"]

KINDS = ("invented",) * 4 + ("name", "code", "number", "phone", "title", "thing", "word", "surname")
KEYS = "ABCDEFGHKLMNPRSTUVWXYZ"


class _Drill:
    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng, self.split, self.values = rng, split, Values.of(split)
        self.messages: list[Message] = []
        self.probes: list[Probe] = []
        self.told: dict[str, str] = {}

    def value(self) -> str:
        """A value that is no part of an earlier one."""
        while True:
            value = self.values.draw(self.rng.choice(KINDS), self.rng)
            if not any(value.lower() in old.lower() or old.lower() in value.lower() for old in self.told.values()):
                return value

    def shape(self, name: str) -> str:
        return self.rng.choice(decorations(name, self.split))

    def exchange(self, user: str, before: str, value: str, told_at: int) -> None:
        turn = len(self.messages)
        others = tuple(old for old in self.told.values() if old != value)
        self.probes.append(Probe(turn, "copy_drill", "recall", value, (turn - told_at) // 2, others))
        self.messages.append(Message("user", (Span(user, Weights.question),)))
        spans = (Span(before, Weights.answer), Span(f" {value}", Weights.value), Span(".", Weights.answer))
        self.messages.append(Message("assistant", spans))

    def repeat(self) -> None:
        """Say a value straight back."""
        value = self.value()
        self.told[value] = value
        self.exchange(self.shape("repeat").replace("{v}", value), "You said", value, len(self.messages))

    def single(self) -> None:
        """Tell a key and ask for it in the same message or in the next one."""
        noun, value = self.values.noun(self.rng), self.value()
        self.told[noun] = value
        tell = self.shape("drill_tells").replace("{k}", f"the {noun}").replace("{v}", value)
        tell = tell[0].upper() + tell[1:]
        ask = self.shape("drill_asks").replace("{k}", f"the {noun}")
        turn = len(self.messages)
        if self.rng.random() < 0.5:
            self.exchange(f"{tell} {ask}", f"The {noun} is", value, turn)
            return
        self.messages.append(Message("user", (Span(tell, Weights.user),)))
        spans = (
            Span(f"Okay, the {noun} is", Weights.ack),
            Span(f" {value}", Weights.ack_value),
            Span(".", Weights.ack),
        )
        self.messages.append(Message("assistant", spans))
        self.exchange(ask, f"The {noun} is", value, turn)

    def listing(self) -> None:
        """Tell several keys at once and ask for some of them."""
        rng, turn = self.rng, len(self.messages)
        letters = rng.random() < 0.6
        free = [key for key in KEYS if key not in self.told]
        size = rng.randint(2, 5)
        keys = rng.sample(free, size) if letters else list({self.values.noun(rng): None for _ in range(size)})
        before = set(self.told)
        for key in keys:
            self.told.setdefault(key, self.value())
        keys = [key for key in keys if key not in before]
        if not keys:
            return
        link, comma = rng.choice((" is ", " is ", " = ", ": ")), rng.choice((", ", ", ", "; ", ". "))
        text = comma.join(f"{key}{link}{self.told[key]}" for key in keys) + rng.choice((".", ".", ""))
        self.messages.append(Message("user", (Span(text, Weights.user),)))
        self.messages.append(Message("assistant", (Span(rng.choice(("Okay.", "Got it.")), Weights.ack),)))
        for key in rng.sample(keys, rng.randint(1, len(keys))):
            ask = self.shape("drill_asks").replace("{k}", key)
            subject = key if letters else key[0].upper() + key[1:]
            self.exchange(ask, f"{subject} is", self.told[key], turn)


def copy_drill(rng: random.Random, split: str) -> Dialogue:
    """A short dialogue in which every answer is a value said before."""
    drill = _Drill(rng, split)
    for _ in range(rng.randint(2, 5)):
        rng.choice((drill.repeat, drill.single, drill.listing))()
    return Dialogue(tuple(drill.messages), tuple(drill.probes))

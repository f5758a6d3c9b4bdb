"""Dense drills: most assistant tokens are copies from memory, so that copying is learned in the first million tokens.

`echo_drill` asks for lists back in the order told (copying token by token), `pairs_drill` asks for the values of keys
in another order (recall by key). Natural dialogues hold a few such tokens in hundreds, which teaches recall slowly.
"""

import random

from nested_runtime.train.messages import Dialogue, Message, Span, Weights
from nested_runtime.train.values import Values

__all__ = ["echo_drill", "pairs_drill"]

KINDS = ("invented", "invented", "word", "word", "name", "surname", "place", "number", "code", "thing", "food", "title")
OWNERS = ("my", "the", "our", "her", "his")
REQUESTS = ("Repeat: {}", "Say this back: {}", "Please repeat {}", "Copy this: {}", "Remember {}", "Now: {}")
AGAIN = ("Again?", "Once more?", "Say it again.", "What did I say?", "Repeat it.", "And again?", "What was the list?")
TELLS = ("Remember this. {}", "Note: {}", "{}", "Here are the facts. {}", "Listen. {}", "Keep in mind: {}")
ASKS = ("What about {}?", "Tell me {}.", "And {}?", "What did I say about {}?", "Recall {}.", "Please give me {}.")
LINKS = (" is ", " is ", " is called ", ": ", " = ", " - ")
ACKS = ("Okay.", "Got it.", "Sure.", "Noted.")


def _user(text: str) -> Message:
    return Message("user", (Span(text, Weights.user),))


def echo_drill(rng: random.Random, split: str) -> Dialogue:
    """Lists of values told by the user and said back by the assistant, some of them a second time."""
    values, messages = Values.of(split), []
    for _ in range(rng.randint(2, 4)):
        comma = rng.choice((", ", " ", "; ", " and "))
        items = [values.draw(rng.choice(KINDS), rng) for _ in range(rng.randint(2, 9))]
        text = comma.join(items)
        messages += [_user(rng.choice(REQUESTS).format(text)), Message("assistant", (Span(text, Weights.ack_value),))]
        if rng.random() < 0.5:
            messages += [_user(rng.choice(AGAIN)), Message("assistant", (Span(text, Weights.ack_value),))]
    return Dialogue(tuple(messages), ())


def _key(values: Values, rng: random.Random) -> str:
    shape = rng.random()
    if shape < 0.35:
        return f"{rng.choice(OWNERS)} {values.noun(rng)}"
    if shape < 0.7:
        return f"{values.draw('name', rng)}'s {values.noun(rng)}"
    return values.draw(rng.choice(("name", "word", "invented", "place")), rng)


def pairs_drill(rng: random.Random, split: str) -> Dialogue:
    """Key-value pairs told in one or several messages, then asked for by key in another order, several times over."""
    values = Values.of(split)
    link, comma = rng.choice(LINKS), rng.choice((". ", ", ", "; "))
    pairs = {_key(values, rng): values.draw(rng.choice(KINDS), rng) for _ in range(rng.randint(3, 9))}
    keys, messages = list(pairs), []
    step = rng.choice((1, 2, 3, len(keys)))
    for i in range(0, len(keys), step):
        text = comma.join(f"{key}{link}{pairs[key]}" for key in keys[i : i + step])
        messages += [
            _user(rng.choice(TELLS).format(text + ".")),
            Message("assistant", (Span(rng.choice(ACKS), Weights.ack),)),
        ]
    for _ in range(rng.randint(1, 3)):
        rng.shuffle(keys)
        size = rng.choice((1, 2, len(keys), len(keys)))
        for i in range(0, len(keys), size):
            asked = keys[i : i + size]
            spans: list[Span] = []
            for j, key in enumerate(asked):
                before = comma if j else ""
                spans.append(Span(f"{before}{key}{link.rstrip()}", Weights.small_talk))
                spans.append(Span(f" {pairs[key]}", Weights.value))
            messages += [_user(rng.choice(ASKS).format(" and ".join(asked))), Message("assistant", tuple(spans))]
    return Dialogue(tuple(messages), ())

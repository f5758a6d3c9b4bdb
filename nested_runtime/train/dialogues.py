"""Memory dialogues: a user tells facts, talks of other things, and asks for the facts later.

Values come from an open vocabulary and phrasings from many templates, so that copying what was told is the only way to
answer. Everything is a function of the random generator handed in and of the split.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nested_runtime.train.phrasing import Relation, Template, conflicts, decorations, relations
from nested_runtime.train.values import Values, lines, words

__all__ = ["Dialogue", "DialogueSpec", "Message", "Probe", "Span", "copy_drill", "generate", "relations", "stage"]

ProbeKind = Literal["recall", "update", "unknown"]
Chat = Sequence[tuple[str, str]]                                      # (user, assistant) exchanges
W_VALUE, W_ANSWER, W_ACK_VALUE, W_ACK, W_USER, W_QUESTION, W_UNKNOWN, W_CHAT = 3.0, 1.0, 1.5, 0.5, 0.1, 0.2, 2.0, 0.3


@dataclass(frozen=True)
class Span:
    """A piece of text with its weight in the loss."""

    text: str
    weight: float


@dataclass(frozen=True)
class Message:
    """One message; ``role`` is "user" or "assistant"."""

    role: str
    spans: tuple[Span, ...]

    @property
    def content(self) -> str:
        """The whole text."""
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True)
class Probe:
    """A question about memory and what its answer must hold."""

    turn: int                                                         # index of the question in Dialogue.messages
    relation: str
    kind: ProbeKind
    expected: str                                                     # the value, "" for an unknown one
    distance: int                                                     # user turns since the newest telling
    others: tuple[str, ...]                                           # other values told before the question


@dataclass(frozen=True)
class Dialogue:
    """Messages in turn, user first, and the probes among them."""

    messages: tuple[Message, ...]
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class DialogueSpec:
    """How a dialogue is made; ranges include both ends, ``p_`` are probabilities."""

    facts: tuple[int, int] = (3, 8)
    questions: tuple[int, int] = (4, 10)
    small_talk: tuple[int, int] = (0, 4)
    p_correction: float = 0.2                                         # per fact
    p_unknown: float = 0.12                                           # per question
    p_embedded: float = 0.25                                          # per telling: among other sentences
    p_multi: float = 0.2                                              # per telling: two or three facts at once
    p_terse: float = 0.06
    p_noisy: float = 0.12                                             # per message, and half as often a whole dialogue
    p_generic: float = 0.35                                           # per fact: an open-vocabulary key
    p_decorated: float = 0.3                                          # per message: "By the way, ", "Do you remember?"
    p_late: float = 0.5                                               # per question: after everything was told
    p_sibling: float = 0.4                                            # per fact with a subject: same relation, another


def stage(n: float) -> DialogueSpec:
    """The curriculum: 0 is dense, short and clean, 1 is sparse with everything in it."""
    n = min(1.0, max(0.0, n))
    return DialogueSpec(
        facts=(3, 6 + round(2 * n)), questions=(round(8 - 3 * n), round(14 - 3 * n)), small_talk=(0, round(6 * n)),
        p_correction=0.25 * n, p_unknown=0.12 * n, p_embedded=0.3 * n, p_multi=0.1 + 0.15 * n, p_terse=0.03 + 0.04 * n,
        p_noisy=0.12 * n, p_generic=0.6 - 0.25 * n, p_decorated=0.05 + 0.3 * n, p_late=0.8 - 0.3 * n,
    )  # fmt: skip


@dataclass
class _Fact:
    relation: Relation
    user: dict[str, str]                                              # fields as the user says them
    assistant: dict[str, str]                                         # and as the assistant says them
    ident: tuple[str, ...]
    told: int = -1
    asked: int = 0
    corrected: bool = False
    seen: set[str] = field(default_factory=set)


@functools.cache
def _values(split: str) -> Values:
    return Values(split)


@functools.cache
def _pools() -> tuple[tuple[Relation, ...], tuple[Relation, ...]]:
    every = relations().values()
    return tuple(r for r in every if not r.generic), tuple(r for r in every if r.generic)


def mentions(text: str, value: str) -> bool:
    """Whether ``value`` stands in ``text`` as whole words; both in lower case."""
    at = text.find(value)
    while at >= 0:
        end = at + len(value)
        if not (at and text[at - 1].isalnum()) and not (end < len(text) and text[end].isalnum()):
            return True
        at = text.find(value, at + 1)
    return False


class _Writer:
    """Writes one dialogue."""

    def __init__(self, rng: random.Random, split: str, spec: DialogueSpec, small_talk: Sequence[Chat]) -> None:
        self.rng, self.split, self.spec, self.small_talk = rng, split, spec, small_talk
        self.values = _values(split)
        self.lower = rng.random() < spec.p_noisy / 2
        self.facts: list[_Fact] = []
        self.idents: set[tuple[str, ...]] = set()
        self.taken: set[str] = set()                                  # every value told so far, in lower case
        self.messages: list[Message] = []
        self.probes: list[Probe] = []
        self.history = ""

    def say(self, role: str, spans: Sequence[Span]) -> None:
        message = Message(role, tuple(span for span in spans if span.text))
        self.messages.append(message)
        self.history += " " + message.content.lower()

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    # --- what is told

    def key(self, relation: Relation) -> tuple[dict[str, str], dict[str, str]]:
        """Fields of a fact's subject, as the user and as the assistant say them."""
        user: dict[str, str] = {}
        assistant: dict[str, str] = {}
        for i, kind in enumerate(relation.subjects):
            slot = "s" if i == 0 else kind
            mine, yours = self.subject(kind)
            if relation.bare_subject and mine.startswith(("a ", "an ")):
                mine = yours = mine.split(" ", 1)[1]
            user[slot], assistant[slot] = mine, yours
            if kind == "verb":
                user["verbs"] = assistant["verbs"] = third_person(mine)
        if self.lower:
            user = {k: v.lower() for k, v in user.items()}
            assistant = {k: v.lower() for k, v in assistant.items()}
        return user, assistant

    def subject(self, kind: str) -> tuple[str, str]:
        rng, own = self.rng, self.values.own
        if kind == "person":
            if self.chance(0.6):
                kind = "name"
            else:
                relative = rng.choice(own("relatives"))
                return f"my {relative}", f"your {relative}"
        if kind in ("relative", "verb"):
            word = rng.choice(own(kind + "s"))
            return word, word
        if kind in ("noun", "my_noun", "the_noun"):
            noun = self.values.noun(rng)
            if kind == "noun":
                return noun, noun
            noun = f"{rng.choice(own('adjectives'))} {noun}" if self.chance(0.3) else noun
            mine = kind == "my_noun" and self.chance(0.7)
            return (f"my {noun}", f"your {noun}") if mine else (f"the {noun}", f"the {noun}")
        value = self.values.draw(kind, rng)
        return value, value

    def new_fact(self, relation: Relation) -> _Fact | None:
        """A fact that no other in this dialogue could be mistaken for."""
        for _ in range(20):
            user, assistant = self.key(relation)
            ident = ("", *user.values()) if relation.generic else (relation.name, *user.values())
            if ident not in self.idents:
                self.idents.add(ident)
                return _Fact(relation, user, assistant, ident)
        return None

    def choose(self) -> _Fact | None:
        special, generic = _pools()
        for _ in range(20):
            relation = self.rng.choice(generic if self.chance(self.spec.p_generic) else special)
            used = {ident[0] for ident in self.idents}
            if not (conflicts()[relation.name] & used) and (fact := self.new_fact(relation)):
                return fact
        return None

    def choose_facts(self) -> None:
        count = self.rng.randint(*self.spec.facts)
        while len(self.facts) < count and (fact := self.choose()):
            self.facts.append(fact)
            while fact.ident[1:] and len(self.facts) < count and self.chance(self.spec.p_sibling):
                if sibling := self.new_fact(fact.relation):
                    self.facts.append(sibling)
        self.rng.shuffle(self.facts)

    def new_value(self, relation: Relation) -> str:
        """A value that nobody has said in this dialogue."""
        for _ in range(200):
            value = self.values.draw(relation.value, self.rng)
            if relation.bare_value and value.startswith(("a ", "an ")):
                value = value.split(" ", 1)[1]
            value = value.lower() if self.lower else value
            small = value.lower()
            if not mentions(self.history, small) and not any(mentions(small, v) or mentions(v, small) for v in self.taken):
                self.taken.add(small)
                return value
        raise RuntimeError(f"no new value for relation {relation.name!r}")

    # --- how it is said

    def user_text(self, template: Template, fields: dict[str, str], prefixes: str, suffixes: str) -> str:
        rng = self.rng
        lower = self.lower or self.chance(self.spec.p_noisy)
        text = template.render(fields, lower)
        if template.prefixable and not lower and self.chance(self.spec.p_decorated * 0.6):
            prefix = rng.choice(decorations(prefixes, self.split))
            text = prefix + (text[0].lower() + text[1:] if template.lowerable and prefix[-2] not in ".!?" else text)
        if self.chance(self.spec.p_decorated * 0.4):
            suffix = rng.choice(decorations(suffixes, self.split))
            text += (suffix.lower() if lower else suffix) if text[-1] in ".!?" else ""
        if lower and text[-1] in ".!?" and self.chance(0.7):
            text = text[:-1]
        return text

    def reply(self, template: Template, fact: _Fact, w_value: float, w_rest: float) -> list[Span]:
        return [Span(t, w_value if f == "v" else w_rest) for t, f in template.pieces(fact.assistant)]

    def pick(self, templates: Sequence[Template], fact: _Fact) -> Template:
        """An assistant template; a value in small letters may not start a sentence."""
        while True:
            template = self.rng.choice(templates)
            if template.parts[0] != ("", "v") or not fact.assistant["v"][0].islower() or len(templates) == 1:
                return template
            templates = [t for t in templates if t is not template]

    def echo(self, facts: Sequence[_Fact]) -> None:
        if self.chance(self.spec.p_terse):
            self.say("assistant", [Span(self.rng.choice(lines("terse_acks")), W_ACK)])
            return
        spans = self.reply(self.pick(facts[0].relation.acks, facts[0]), facts[0], W_ACK_VALUE, W_ACK)
        for fact in facts[1:]:
            more = self.reply(self.pick(fact.relation.answers, fact), fact, W_ACK_VALUE, W_ACK)
            spans += [Span(" ", W_ACK), *more]
        self.say("assistant", spans)

    # --- turns

    def tell(self, facts: Sequence[_Fact]) -> None:
        told = []
        for fact in facts:
            fact.user["v"] = fact.assistant["v"] = self.new_value(fact.relation)
            fact.told = len(self.messages)
            if not fact.relation.generic and not fact.relation.subjects and self.chance(self.spec.p_terse / 2):
                told.append(f"{fact.relation.name.replace('_', ' ')}: {fact.user['v']}")
                continue
            template = self.rng.choice(fact.relation.tells[self.split])
            told.append(self.user_text(template, fact.user, "tell_prefixes", "tell_suffixes"))
        text = told[0]
        for more in told[1:]:
            text += (" " if text[-1] in ".!?" else ", ") + more
        if self.chance(self.spec.p_embedded):
            text = self.embed(text)
        self.say("user", [Span(text, W_USER)])
        self.echo(facts)

    def embed(self, text: str) -> str:
        before = self.rng.randint(0, 2)
        fillers = self.rng.sample(lines("filler"), before + self.rng.randint(0 if before else 1, 2))
        text = text if text[-1] in ".!?" else text + "."
        return " ".join([*fillers[:before], text, *fillers[before:]])

    def correct(self, fact: _Fact) -> None:
        fact.user["old"] = fact.user["v"]
        fact.user["v"] = fact.assistant["v"] = self.new_value(fact.relation)
        fact.told, fact.corrected = len(self.messages), True
        template = self.rng.choice(fact.relation.corrections[self.split])
        self.say("user", [Span(self.user_text(template, fact.user, "tell_prefixes", "tell_suffixes"), W_USER)])
        self.echo([fact])

    def question(self, fact: _Fact) -> None:
        asks, indirect = fact.relation.asks[self.split], fact.relation.indirect[self.split]
        plain = not fact.relation.generic and not fact.relation.subjects
        if plain and self.chance(self.spec.p_terse / 2):
            text = f"{fact.relation.name.replace('_', ' ')}?"
        elif indirect and self.chance(0.2):
            wrapper = self.rng.choice(decorations("ask_wrappers", self.split))
            text = wrapper.replace("{q}", self.rng.choice(indirect).render(fact.user, lower=False), 1)
        else:
            fresh = [t for t in asks if t.text not in fact.seen] or asks
            template = self.rng.choice(fresh)
            fact.seen.add(template.text)
            text = self.user_text(template, fact.user, "ask_prefixes", "ask_suffixes")
        self.say("user", [Span(text, W_QUESTION)])

    def ask(self, known: Sequence[_Fact]) -> None:
        least = min(fact.asked for fact in known)
        fact = self.rng.choice([f for f in known if f.asked == least] if self.chance(0.7) else known)
        fact.asked += 1
        turn, value = len(self.messages), fact.user["v"]
        others = tuple(f.user["v"] for f in self.facts if f.told >= 0 and f is not fact)
        others += tuple(f.user["old"] for f in self.facts if f.corrected)
        kind: ProbeKind = "update" if fact.corrected else "recall"
        self.probes.append(Probe(turn, fact.relation.name, kind, value, (turn - fact.told) // 2, others))
        self.question(fact)
        self.say("assistant", self.reply(self.pick(fact.relation.answers, fact), fact, W_VALUE, W_ANSWER))

    def ask_unknown(self) -> None:
        """Ask for something never told: a told relation about somebody else, or another relation."""
        siblings = [fact.relation for fact in self.facts if fact.ident[1:]]
        fact = self.new_fact(self.rng.choice(siblings)) if siblings and self.chance(0.5) else self.choose()
        if fact is None:
            return
        others = tuple(f.user["v"] for f in self.facts if f.told >= 0)
        self.probes.append(Probe(len(self.messages), fact.relation.name, "unknown", "", 0, others))
        self.question(fact)
        template = self.rng.choice(fact.relation.unknowns)
        self.say("assistant", [Span(template.render(fact.assistant), W_UNKNOWN)])

    def chat(self, exchanges: int) -> None:
        rng = self.rng
        talk: Chat = rng.choice(self.small_talk)[:exchanges] if self.small_talk else [
            (rng.choice(lines("filler")), rng.choice(lines("replies"))) for _ in range(exchanges)
        ]  # fmt: skip
        for user, assistant in talk:
            self.say("user", [Span(user, W_USER)])
            self.say("assistant", [Span(assistant, W_CHAT)])

    def write(self) -> Dialogue:
        rng, spec = self.rng, self.spec
        self.choose_facts()
        waiting = list(self.facts)
        tells = 0
        while tells < len(waiting):                                   # group some facts into one message
            size = rng.randint(2, 3) if self.chance(spec.p_multi) else 1
            tells += size
        events = ["tell"] * len(waiting)
        late = 0
        for _ in range(rng.randint(*spec.questions)):
            if self.chance(spec.p_late):
                late += 1
            else:
                events.append("ask")
        events += ["chat"] * rng.randint(*spec.small_talk)
        rng.shuffle(events)
        end = ["ask"] * late + ["correct"] * sum(self.chance(spec.p_correction) for _ in self.facts)
        rng.shuffle(end)
        for event in events + end + ["ask"]:
            known = [fact for fact in self.facts if fact.told >= 0]
            if event == "tell" or (event == "ask" and not known):
                size = rng.randint(2, 3) if self.chance(spec.p_multi) else 1
                if waiting:
                    self.tell([waiting.pop() for _ in range(min(size, len(waiting)))])
            elif event == "chat":
                self.chat(rng.randint(1, 2))
            elif event == "correct":
                self.correct(rng.choice(known))
            elif self.chance(spec.p_unknown):
                self.ask_unknown()
            else:
                self.ask(known)
        return Dialogue(tuple(self.messages), tuple(self.probes))


@functools.cache
def third_person(verb: str) -> str:
    """The verb with "he" or "she"."""
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


def generate(
    rng: random.Random, split: str, spec: DialogueSpec, small_talk: Sequence[Chat] = ()
) -> Dialogue:
    """A dialogue of ``split``; ``small_talk`` holds chats, each a sequence of (user, assistant) exchanges."""
    return _Writer(rng, split, spec, small_talk).write()


def copy_drill(rng: random.Random, split: str) -> Dialogue:
    """A short dialogue of invented words and codes, to be copied letter by letter."""
    values = _values(split)
    kinds = ("invented", "invented", "invented", "name", "code", "number", "thing", "title", "phone", "word")
    messages: list[Message] = []
    probes: list[Probe] = []

    def exchange(user: str, before: str, value: str, after: str, expected: bool = True) -> None:
        if expected:
            probes.append(Probe(len(messages), "copy_drill", "recall", value, 0, ()))
        messages.append(Message("user", (Span(user, W_USER),)))
        spans = (Span(before, W_ANSWER), Span(value if not before else f" {value}", W_VALUE), Span(after, W_ANSWER))
        messages.append(Message("assistant", tuple(s for s in spans if s.text)))

    for _ in range(rng.randint(2, 5)):
        value = values.draw(rng.choice(kinds), rng)
        form = rng.randrange(3)
        if form == 0:
            shape = rng.choice(decorations("repeat", split))
            exchange(shape.replace("{v}", value), "You said", value, ".")
        elif form == 1:
            noun = values.noun(rng)
            exchange(f"The {noun} is {value}.", f"Okay, the {noun} is", value, ".", expected=False)
            exchange(f"What is the {noun}?", f"The {noun} is", value, ".")
        else:
            keys = rng.sample("ABCDEFGHKLMNPRSTUWXYZ", rng.randint(2, 4))
            pairs = {key: values.draw(rng.choice(kinds), rng) for key in keys}
            listing = ", ".join(f"{key} is {value}" for key, value in pairs.items())
            messages.append(Message("user", (Span(f"{listing}.", W_USER),)))
            messages.append(Message("assistant", (Span("Okay.", W_ACK),)))
            for key in rng.sample(keys, rng.randint(1, len(keys))):
                exchange(f"What is {key}?", f"{key} is", pairs[key], ".")
    return Dialogue(tuple(messages), tuple(probes))

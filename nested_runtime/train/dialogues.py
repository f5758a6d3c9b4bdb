"""Memory dialogues: a user tells facts, talks of other things, and asks for the facts later.

Values come from an open vocabulary and phrasings from many templates, so that copying what was told is the only way to
answer. Everything is a function of the random generator handed in and of the split.
"""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nested_runtime.train.drills import copy_drill
from nested_runtime.train.keys import Fields, draw_key, identity
from nested_runtime.train.messages import Dialogue, DialogueSpec, Message, Probe, ProbeKind, Span, Weights, stage
from nested_runtime.train.phrasing import Relation, Template, conflicts, decorations, filler, pairs, relations
from nested_runtime.train.values import Values, lines
from nested_runtime.train.variation import vary

__all__ = ["Chat", "Dialogue", "DialogueSpec", "ExhaustedError", "Fact", "Message", "Probe", "Span", "Weights",
           "Writer", "compose", "copy_drill", "generate", "mentions", "relations", "stage"]  # fmt: skip

SENTENCE = re.compile(r"(?:[^\s.!?]+ ){2,}[^\s.!?]+[.!](?= |$)")  # of three words or more
TELLING = re.compile(r"\b(my|mine|our|name|I('m| am| have| live| work| like| love| was))\b|\b(Mr|Mrs|Ms|Dr|St)\.", re.I)
WORD = re.compile(r"[^\W\d_]{3,}")
OVERHEARD = 0.5  # share of the sentences around a fact that come from small talk, in training
MORE = 0.2  # share of the facts in training that are of relations nobody is measured with
NEWS = 0.5  # share of the turns that fill a session which tell something
CHANGED = 0.25  # share of those that give a fact another value
CROWD = 24  # facts a session holds before filling tells no others
USUAL = 0.65  # share of the assistant's sentences that take its first way of saying it
UNTOLD = ("...", " you have not told me that.")  # in the place of a value
Chat = Sequence[tuple[str, str]]  # (user, assistant) exchanges


class ExhaustedError(Exception):
    """Everything of a small kind has been said in this dialogue."""


@dataclass
class Fact:
    """A fact of one dialogue; it has a value from its telling on."""

    relation: Relation
    user: Fields  # as the user says them
    assistant: Fields  # and as the assistant says them
    partner: "Fact | None" = None  # told in the same sentence
    told: int = -1
    asked: int = 0
    outdated: list[str] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)  # questions asked already

    @property
    def value(self) -> str:
        """The newest value told."""
        return self.user["v"]


@functools.cache
def _pools() -> tuple[tuple[Relation, ...], tuple[Relation, ...], tuple[Relation, ...]]:
    """Relations with phrasings of their own, with open keys, and those of training alone."""
    every = relations()
    more = tuple(r for name, r in relations("train").items() if name not in every)
    return tuple(r for r in every.values() if not r.generic), tuple(r for r in every.values() if r.generic), more


def mentions(text: str, value: str) -> bool:
    """Whether ``value`` stands in ``text`` as whole words; both in lower case."""
    at = text.find(value)
    while at >= 0:
        end = at + len(value)
        if not (at and text[at - 1].isalnum()) and not (end < len(text) and text[end].isalnum()):
            return True
        at = text.find(value, at + 1)
    return False


class Writer:
    """Writes one dialogue, turn by turn; `messages` holds what was said so far."""

    def __init__(self, rng: random.Random, split: str, spec: DialogueSpec, small_talk: Sequence[Chat] = ()) -> None:
        self.rng, self.split, self.spec, self.small_talk = rng, split, spec, small_talk
        self.values = Values.of(split)
        self.lower = rng.random() < spec.p_noisy / 2
        self.facts: list[Fact] = []
        self.used: dict[str, None] = {}  # names of relations, in order
        self.subjects: set[tuple[str, ...]] = set()
        self.taken: set[str] = set()  # every value told so far, in lower case
        self.fillers: set[str] = set()
        self.messages: list[Message] = []
        self.probes: list[Probe] = []
        self.history = ""

    def chance(self, p: float) -> bool:
        """True with probability ``p``."""
        return self.rng.random() < p

    def say(self, role: str, spans: Sequence[Span], idle: bool = False) -> None:
        """Add a message; an idle one tells nothing."""
        message = Message(role, tuple(span for span in spans if span.text), idle)
        self.messages.append(message)
        self.history += " " + message.content.lower()

    # --- which facts

    def new_fact(self, relation: Relation) -> Fact | None:
        """A fact that no other in this dialogue could be mistaken for."""
        for _ in range(20):
            user, assistant = draw_key(relation.subjects, relation.bare_subject, self.values, self.rng)
            if self.admit(relation, user):
                return self.cased(Fact(relation, user, assistant))
        return None

    def admit(self, relation: Relation, user: Fields) -> bool:
        """Claim a subject; a noun or a verb is claimed for all relations, a person for one only."""
        scope = "" if relation.about_things else relation.name
        subject = (scope, *identity(relation.subjects, user))
        if subject in self.subjects or conflicts(self.split)[relation.name] & self.used.keys():
            return False
        self.subjects.add(subject)
        self.used[relation.name] = None
        return True

    def cased(self, fact: Fact) -> Fact:
        """The fact in small letters where the whole dialogue is."""
        if self.lower:
            fact.user = {k: v.lower() for k, v in fact.user.items()}
            fact.assistant = {k: v.lower() for k, v in fact.assistant.items()}
        return fact

    def choose(self) -> Fact | None:
        """A fact of any relation."""
        special, generic, more = _pools()
        for _ in range(20):
            pool = generic if self.chance(self.spec.p_generic) else special
            if self.split == "train" and self.chance(MORE):
                pool = more
            if fact := self.new_fact(self.rng.choice(pool)):
                return fact
        return None

    def choose_pair(self) -> Fact | None:
        """Two facts about one person that one sentence tells: a sister's name and her job."""
        first, second, _ = self.rng.choice(pairs(self.split))
        one, two = relations()[first], relations()[second]
        relative = self.rng.choice(self.values.own("relatives"))
        keys = []
        for relation in (one, two):
            kind = relation.subjects[:1]
            mine = {"s": f"my {relative}"} if kind == ("person",) else {"s": relative} if kind else {}
            keys.append((mine, {k: v.replace("my ", "your ", 1) for k, v in mine.items()}))
        if not (self.admit(one, keys[0][0]) and self.admit(two, keys[1][0])):
            return None
        facts = [self.cased(Fact(r, *key)) for r, key in zip((one, two), keys, strict=True)]
        facts[0].partner = facts[1]
        return facts[0]

    def choose_facts(self) -> list[Fact]:
        """The facts to tell; a pair counts as two."""
        out: list[Fact] = []
        count = self.rng.randint(*self.spec.facts)
        while count > 0:
            fact = self.choose_pair() if count > 1 and self.chance(self.spec.p_pair) else self.choose()
            if fact is None:
                count -= 1
                continue
            out.append(fact)
            count -= 2 if fact.partner else 1
            while fact.relation.subjects and count > 0 and self.chance(self.spec.p_sibling):
                count -= 1
                if sibling := self.new_fact(fact.relation):
                    out.append(sibling)
        self.rng.shuffle(out)
        return out

    def new_value(self, relation: Relation) -> str:
        """A value that nobody has said in this dialogue."""
        for _ in range(500):
            value = self.values.draw(relation.value, self.rng)
            if relation.bare_value and value.startswith(("a ", "an ")):
                value = value.split(" ", 1)[1]
            value = value.lower() if self.lower else value
            small = value.lower()
            if not mentions(self.history, small) and not any(
                mentions(small, v) or mentions(v, small) for v in self.taken
            ):
                self.taken.add(small)
                return value
        raise ExhaustedError(f"no new value for relation {relation.name!r}")

    # --- how it is said

    def user_text(self, template: Template, fields: Fields, prefixes: str, suffixes: str) -> str:
        """A sentence of the user with things before and after it, in small letters where noisy."""
        lower = self.lower or self.chance(self.spec.p_noisy)
        text = template.render(fields, lower, self.vary if self.chance(self.spec.p_varied) else None)
        if prefixes and template.prefixable and not lower and self.chance(self.spec.p_decorated * 0.6):
            prefix = self.rng.choice(decorations(prefixes, self.split))
            small = template.lowerable or (template.text.startswith("{s}") and fields["s"].startswith(("my ", "the ")))
            text = prefix + (text[0].lower() + text[1:] if small and prefix[-2] not in ".!?" else text)
        if text[-1] in ".!?" and self.chance(self.spec.p_decorated * 0.4):
            suffix = self.rng.choice(decorations(suffixes, self.split))
            text += suffix.lower() if lower else suffix
        if lower and text[-1] in ".!?" and self.chance(0.7):
            text = text[:-1]
        return text

    def vary(self, literals: list[str]) -> list[str]:
        """Other words for the same: only where the model trains, measured phrasings stay as they were written."""
        return vary(literals, self.rng) if self.split == "train" else literals

    def filler(self) -> str:
        """A sentence that tells no fact about the user, but may name things; in training often one of small talk."""
        for _ in range(20):
            text = self.overheard() if self.split == "train" and self.chance(OVERHEARD) else ""
            text = text or filler(self.values, self.rng)
            if text not in self.fillers and not any(mentions(text.lower(), v) for v in self.taken):
                self.fillers.add(text)
                return text
        return "Anyway."

    def overheard(self) -> str:
        """The first sentence of something a user said in small talk; nothing where it is no whole one, or may tell."""
        if not self.small_talk:
            return ""
        said, _ = self.rng.choice(self.rng.choice(self.small_talk))
        found = SENTENCE.match(said)
        return "" if found is None or TELLING.search(found[0]) else found[0]

    def among_others(self, text: str, after: int) -> str:
        """``text`` between sentences that tell nothing, at most ``after`` of them behind it."""
        before = self.rng.randint(0 if after else 1, 2)
        text = text if text[-1] in ".!?" else text + "."
        tail = [self.filler() for _ in range(self.rng.randint(0 if before else 1, after))] if after else []
        return " ".join([*[self.filler() for _ in range(before)], text, *tail])

    def reply(
        self, templates: Sequence[Template], fact: Fact, weights: tuple[float, float], usual: Template | None = None
    ) -> list[Span]:
        """A sentence of the assistant, in training mostly the usual one; a value in small letters may not start it."""
        if usual is None or self.split != "train" or not self.chance(USUAL):
            usual = self.rng.choice(templates)
        template = usual
        while template.starts_with_value and fact.value[0].islower() and len(templates) > 1:
            templates = [t for t in templates if t is not template]
            template = self.rng.choice(templates)
        return [Span(text, weights[name != "v"]) for text, name in template.pieces(fact.assistant)]

    def echo(self, facts: Sequence[Fact]) -> None:
        """The assistant says the facts back."""
        if self.chance(self.spec.p_terse):
            self.say("assistant", [Span(self.rng.choice(lines("terse_acks")), Weights.ack)])
            return
        if self.split == "train" and len(facts) == 1 and self.chance(self.spec.p_misheard):
            self.mishear(facts[0])
            return
        weights = (Weights.ack_value, Weights.ack)
        spans = self.reply(facts[0].relation.acks, facts[0], weights, facts[0].relation.usual_ack)
        for fact in facts[1:]:
            spans += [
                Span(" ", Weights.ack),
                *self.reply(fact.relation.answers, fact, weights, fact.relation.answers[0]),
            ]
        self.say("assistant", spans)

    def mishear(self, fact: Fact) -> None:
        """The assistant gets a fact wrong: not to be learned, but to be overcome in answers.

        As trained models do, it takes the fact for one of another relation, names a word beside the value, or chats.
        """
        known, own = fact.assistant.keys(), {t.text for t in fact.relation.acks}
        others = [r for r in relations().values() if not (r.bare_value and fact.value.startswith(("a ", "an ")))]
        heard = [t for r in others for t in r.acks if t.fields <= known and t.text not in own]
        fields, shape = fact.assistant, self.rng.random()
        beside = [w for w in WORD.findall(self.messages[-1].content) if not mentions(fact.value.lower(), w.lower())]
        if shape < 0.4 and beside:
            heard, fields = list(fact.relation.acks), fields | {"v": self.rng.choice(beside)}
        text = self.rng.choice(lines("replies")) if shape > 0.9 else self.rng.choice(heard).render(fields)
        self.say("assistant", [Span(text, 0.0)])

    # --- turns

    def tell(self, facts: Sequence[Fact]) -> None:
        """The user tells the facts in one message, the assistant echoes."""
        told, every = [], []
        for fact in facts:
            both = [fact, fact.partner] if fact.partner else [fact]
            for each in both:
                each.user["v"] = each.assistant["v"] = self.new_value(each.relation)
                each.told = len(self.messages)
            every += both
            told.append(self.statement(fact))
        text = told[0]
        for more in told[1:]:
            text += (" " if text[-1] in ".!?" else ", ") + more
        self.facts += every
        if self.chance(self.spec.p_embedded):
            text = self.among_others(text, after=2)
        self.say("user", [Span(text, Weights.user)])
        self.echo(every)

    def statement(self, fact: Fact) -> str:
        """The sentence that tells a fact, or a pair of facts."""
        relation = fact.relation
        if fact.partner:
            names = (relation.name, fact.partner.relation.name)
            template = self.rng.choice([t for *pair, t in pairs(self.split) if tuple(pair) == names])
            fields = fact.user | {"s": fact.user.get("s", "").removeprefix("my "), "w": fact.partner.value}
            return self.user_text(template, fields, "tell_prefixes", "tell_suffixes")
        if relation.plain and self.chance(self.spec.p_terse / 2):
            return f"{relation.label}{self.rng.choice((': ', ' = ', ' - '))}{fact.value}"
        template = self.composed(relation, "name_tells") or self.rng.choice(relation.tells[self.split])
        return self.user_text(template, fact.user, "tell_prefixes", "tell_suffixes")

    def composed(self, relation: Relation, frames: str) -> Template | None:
        """Now and then, a sentence around a noun phrase; only where the model trains."""
        if self.split != "train" or not self.chance(self.spec.p_composed):
            return None
        if frames == "name_asks" and self.chance(0.4):
            return relation.extra.ask(self.rng)
        return relation.extra.draw(frames, self.rng)

    def correct(self, fact: Fact) -> None:
        """The user gives a fact another value, the assistant echoes."""
        value = self.new_value(fact.relation)
        fact.outdated.append(fact.value)
        fact.user["old"] = fact.value
        fact.user["v"] = fact.assistant["v"] = value
        fact.told, fact.asked = len(self.messages), 0
        relation = fact.relation
        template = self.composed(relation, "name_corrections") or self.rng.choice(relation.corrections[self.split])
        self.say("user", [Span(self.user_text(template, fact.user, "", "tell_suffixes"), Weights.user)])
        self.echo([fact])

    def question(self, fact: Fact) -> None:
        """The user asks for a fact."""
        relation = fact.relation
        asks, indirect = relation.asks[self.split], relation.indirect[self.split]
        if relation.plain and self.chance(self.spec.p_terse / 2):
            text = f"{relation.label}?"
        elif template := self.composed(relation, "name_asks"):
            text = self.user_text(template, fact.user, "ask_prefixes", "ask_suffixes")
        elif indirect and self.chance(0.2):
            text = self.rng.choice(decorations("ask_wrappers", self.split))
            text = text.replace("{q}", self.rng.choice(indirect).render(fact.user), 1)
            text = text.lower() if self.lower else text
        else:
            template = self.rng.choice([t for t in asks if t.text not in fact.heard] or asks)
            fact.heard.add(template.text)
            text = self.user_text(template, fact.user, "ask_prefixes", "ask_suffixes")
        if self.chance(self.spec.p_embedded / 2):
            text = self.among_others(text if text[-1] in ".!?" else text + "?", after=0)
        self.say("user", [Span(text, Weights.question)], idle=True)

    def probe(self, fact: Fact, kind: ProbeKind, expected: str, distance: int) -> None:
        """Note what the answer to the next message must hold."""
        others = [f.value for f in self.facts if f is not fact] + [old for f in self.facts for old in f.outdated]
        self.probes.append(Probe(len(self.messages), fact.relation.name, kind, expected, distance, tuple(others)))

    def ask(self) -> None:
        """Question and answer about a fact told before."""
        least = min(fact.asked for fact in self.facts)
        fact = self.rng.choice([f for f in self.facts if f.asked == least or self.chance(0.25)])
        fact.asked += 1
        kind: ProbeKind = "update" if fact.outdated else "recall"
        self.probe(fact, kind, fact.value, (len(self.messages) - fact.told) // 2)
        self.question(fact)
        answers, weights = fact.relation.answers, (Weights.value, Weights.answer)
        self.say("assistant", self.reply(answers, fact, weights, answers[0]))

    def untold(self) -> Fact | None:
        """A fact never told: a told relation about somebody else, or another relation."""
        siblings = [fact.relation for fact in self.facts if fact.relation.subjects]
        return self.new_fact(self.rng.choice(siblings)) if siblings and self.chance(0.5) else self.choose()

    def ask_unknown(self) -> None:
        """Ask for something never told."""
        fact = self.untold()
        if fact is None:
            return
        self.probe(fact, "unknown", "", 0)
        self.question(fact)
        self.say("assistant", self.denial(fact), idle=True)

    def denial(self, fact: Fact) -> list[Span]:
        """The answer to what was never told: as if it had been, until the value is due.

        Told or not is then decided where the value would be read, by the same words that the acknowledgement used.
        """
        if begin := fact.relation.withheld(fact.assistant):
            weights = (Weights.answer, Weights.untold, Weights.unknown)
            return [Span(text, weight) for text, weight in zip((begin, *UNTOLD), weights, strict=True)]
        return [Span(self.rng.choice(fact.relation.unknowns).render(fact.assistant), Weights.unknown)]

    def chat(self) -> None:
        """An exchange or two of small talk."""
        rng, size = self.rng, self.rng.randint(1, 2)
        talk: Chat = [(self.filler(), rng.choice(lines("replies"))) for _ in range(size)]
        if self.small_talk:
            whole = rng.choice(self.small_talk)
            start = rng.randrange(max(1, len(whole) - size + 1))
            talk = whole[start : start + size]
        for user, assistant in talk:
            self.say("user", [Span(user, Weights.user)], idle=True)
            self.say("assistant", [Span(assistant, Weights.small_talk)], idle=True)

    def write(self) -> Dialogue:
        """All turns: tellings, questions and small talk shuffled, then corrections and the late questions."""
        rng, spec = self.rng, self.spec
        waiting = self.choose_facts()
        questions = rng.randint(*spec.questions)
        late = sum(self.chance(spec.p_late) for _ in range(questions))
        events = ["tell"] * len(waiting) + ["ask"] * (questions - late) + ["chat"] * rng.randint(*spec.small_talk)
        corrections = sum(self.chance(spec.p_correction) for _ in waiting)
        end = ["ask"] * late + ["correct"] * corrections + ["chat"] * (corrections // 2)
        rng.shuffle(events)
        rng.shuffle(end)
        for event in [*events, *end, *["ask"] * (corrections or not late)]:
            if event == "tell" or (event in ("ask", "correct") and not self.facts):
                size = rng.randint(2, 3) if self.chance(spec.p_multi) else 1
                if group := [waiting.pop() for _ in range(min(size, len(waiting)))]:
                    self.tell(group)
            elif event == "chat":
                self.chat()
            elif event == "correct":
                self.correct(rng.choice(self.facts))
            elif self.chance(spec.p_unknown):
                self.ask_unknown()
            else:
                self.ask()
        return Dialogue(tuple(self.messages), tuple(self.probes))

    def more(self) -> Dialogue:
        """One further turn of a dialogue that is written, on its own: news or a question."""
        begin = len(self.messages)
        try:
            if self.chance(NEWS):
                self.news()
            elif self.chance(self.spec.p_unknown):
                self.ask_unknown()
        except ExhaustedError:
            pass  # a question can always be asked
        if len(self.messages) == begin:
            self.ask()
        return Dialogue(tuple(self.messages[begin:]), ())

    def news(self) -> None:
        """Another value of a fact, or another fact while there is room for one."""
        if self.chance(CHANGED):
            self.correct(self.rng.choice(self.facts))
        elif len(self.facts) < CROWD and (fact := self.choose()):
            self.tell([fact])


def compose(
    rng: random.Random, split: str, spec: DialogueSpec, small_talk: Sequence[Chat] = ()
) -> tuple[Dialogue, Writer]:
    """As `generate`, with the writer, who can go on asking."""
    for _ in range(100):
        writer = Writer(rng, split, spec, small_talk)
        try:
            return writer.write(), writer
        except ExhaustedError:
            continue
    raise RuntimeError("the small talk names every value that could be told")


def generate(rng: random.Random, split: str, spec: DialogueSpec, small_talk: Sequence[Chat] = ()) -> Dialogue:
    """A dialogue of ``split``; ``small_talk`` holds chats, each a sequence of (user, assistant) exchanges."""
    return compose(rng, split, spec, small_talk)[0]

"""What a dialogue is: weighted messages, and probes that say what a right answer holds."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Dialogue", "DialogueSpec", "Message", "Probe", "ProbeKind", "Span", "Weights", "stage"]

ProbeKind = Literal["recall", "update", "unknown"]


class Weights:
    """Loss weights of the parts of a dialogue: the answers teach memory, the rest only style."""

    value = 3.0
    answer = 1.0
    # First token of an answer: whether memory is asked at all, or people chat. Not under a checkpoint's own chat
    # template, and not above `trainer.VALUE_WEIGHT`: it is no value.
    opening = 2.5
    ack_value = 2.4
    ack = 1.8
    user = 0.1
    question = 0.2
    untold = 5.0  # where a value would begin
    unknown = 2.0
    small_talk = 0.3


@dataclass(frozen=True)
class Span:
    """A piece of text with its weight in the loss."""

    text: str
    weight: float


@dataclass(frozen=True)
class Message:
    """One message; ``role`` is "user" or "assistant"; ``idle`` where it tells nothing worth keeping."""

    role: str
    spans: tuple[Span, ...]
    idle: bool = False

    @property
    def content(self) -> str:
        """The whole text."""
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True)
class Probe:
    """A question about memory and what its answer must hold."""

    turn: int  # index of the question in Dialogue.messages
    relation: str
    kind: ProbeKind
    expected: str  # the value, "" where it was never told
    distance: int  # user turns since the newest telling
    others: tuple[str, ...]  # other values told before the question, outdated ones included


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
    small_talk: tuple[int, int] = (0, 4)  # insertions of one or two exchanges each
    p_correction: float = 0.2  # per fact
    p_unknown: float = 0.12  # per question
    p_embedded: float = 0.25  # per telling, half as often per question: among other sentences
    p_multi: float = 0.2  # per telling: two or three facts at once
    p_terse: float = 0.06  # "dog name: Rex"; "Okay." for a reply
    p_noisy: float = 0.12  # per message, and half as often a whole dialogue: small letters, no full stop
    p_generic: float = 0.35  # per fact: an open-vocabulary key
    p_decorated: float = 0.3  # per message: "By the way, ", "Do you remember?"
    p_varied: float = 0.0  # per message of the user: synonyms, dropped words, slips
    p_misheard: float = 0.12  # per telling: the reply gets the fact wrong (training only)
    p_composed: float = 0.4  # per message of the user: a sentence around a noun phrase (training only)
    p_late: float = 0.5  # per question: after everything was told
    p_sibling: float = 0.4  # per fact about a subject: the same relation about another one
    p_pair: float = 0.12  # per fact: two facts in one sentence


def stage(n: float) -> DialogueSpec:
    """The curriculum: 0 is dense, short and clean, 1 is sparse with everything in it."""
    n = min(1.0, max(0.0, n))
    return DialogueSpec(
        facts=(3, 6 + round(2 * n)),
        questions=(round(6 - n), round(10 - n)),
        small_talk=(0, round(6 * n)),
        p_correction=0.25 * n,
        p_unknown=0.08 + 0.17 * n,
        p_embedded=0.3 * n,
        p_multi=0.1 + 0.15 * n,
        p_terse=0.03 + 0.04 * n,
        p_noisy=0.12 * n,
        p_generic=0.6 - 0.15 * n,
        p_decorated=0.05 + 0.3 * n,
        p_varied=0.15 + 0.35 * n,
        p_late=0.8 - 0.3 * n,
        p_pair=0.05 + 0.1 * n,
    )

"""Dialogues as a checkpoint's own chat template writes them, with the loss weights of what is said."""

from __future__ import annotations

from nested_runtime.errors import ConfigError
from nested_runtime.hub_tokenizer import HubTokenizer
from nested_runtime.train.messages import Dialogue, Weights

__all__ = ["FIRST", "templated"]

FIRST = 2.0  # the first token of a value decides which fact is meant: the others follow from it
TEMPLATE, CLOSE = 0.1, 1.0  # weights of what the template writes, and of what ends a reply
Mark = tuple[int, int, float]
"""First and past-the-last character, weight."""


def templated(dialogue: Dialogue, tokenizer: HubTokenizer) -> tuple[list[int], list[float]]:
    """Token ids and the weight of predicting each; ConfigError where the template does not write what is said."""
    messages = [{"role": message.role, "content": message.content} for message in dialogue.messages]
    text, encoding = tokenizer.render_offsets(messages)
    marks = _marks(dialogue, text, tokenizer)
    ids, weights = [], []
    mark, begin = 0, 0
    for token, end in encoding:
        while mark < len(marks) and marks[mark][1] < end:
            mark += 1
        first, _, weight = marks[mark] if mark < len(marks) and marks[mark][0] < end else (end, end, TEMPLATE)
        ids.append(token)
        weights.append(weight * FIRST if weight == Weights.value and begin <= first else weight)
        begin = end
    return ids, weights


def _marks(dialogue: Dialogue, text: str, tokenizer: HubTokenizer) -> list[Mark]:
    """Where in the text the spans of messages are, and what ends each reply."""
    marks, at = [], 0
    for message in dialogue.messages:
        at = text.find(message.content, at)
        if at < 0:
            raise ConfigError(
                f"the chat template does not write {message.content[:40]!r} as it is; it cannot be trained"
            )
        for span in message.spans:
            marks.append((at, at + len(span.text), span.weight))
            at += len(span.text)
        if message.role == "assistant":
            end = tokenizer.token(tokenizer.end_id)
            marks.append((at, at + (len(end) if text.startswith(end, at) else 1), CLOSE))
    return marks

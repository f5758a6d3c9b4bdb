"""From tokens to reply text: stop strings across token borders, and nothing sent that may have to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nested_runtime.tokenizer import IncrementalDecoder, Tokenizer

__all__ = ["ReplyText", "stop_check"]


class ReplyText:
    """The text of one reply as its tokens arrive.

    Text that may be the beginning of a stop string is held back until it is certain. The stop string itself and what
    follows are never part of the text. Stop strings that are complete before `min_tokens` tokens do not count.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, min_tokens: int = 0, strip: bool = True
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, strip=strip)
        self._stop = tuple(stop)
        self._too_early = min_tokens
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token, return the text that became certain."""
        self._too_early -= 1
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """No more tokens: return what was held back."""
        certain = self._take(self._decoder.flush())
        rest, self._held = self._held, ""
        self.text += rest
        return certain + rest

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        self._held += piece
        stops = self._stop if self._too_early <= 0 else ()
        found = [at for at in (self._held.find(s) for s in stops) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            keep = _may_begin(self._held, stops)
            certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += certain
        return certain


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0


def stop_check(
    tokenizer: Tokenizer, stop: Sequence[str], *, min_tokens: int = 0, strip: bool = True
) -> Callable[[int], bool] | None:
    """A `Sequence.stop_check` with its own decoder, as it runs on the engine's thread; None without stop strings."""
    if not stop:
        return None
    reply = ReplyText(tokenizer, stop, min_tokens=min_tokens, strip=strip)

    def check(token: int) -> bool:
        reply.push(token)
        return reply.stopped

    return check

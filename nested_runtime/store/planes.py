"""Byte planes: the bytes of numbers regrouped by their place in the number, so that what repeats lies together.

Of float32 and bfloat16 numbers the byte with sign and exponent repeats and the rest is noise. For
raw = b0 b1 b2 b3 b4 ..., split(raw) = [b0 b4 b8 ..., b1 b5 b9 ..., b2 ..., b3 ..., the last len(raw) % 4 bytes]; a pair
of bfloat16 is one word of four bytes.
"""

from __future__ import annotations

import numpy as np

__all__ = ["join", "split"]

_WORD = np.dtype("<u4")


def split(raw: bytes) -> list[bytes]:
    """The four planes of `raw`, least significant first, and the bytes left over."""
    count = len(raw) // 4
    words = np.frombuffer(raw, _WORD, count)
    shifted = np.empty_like(words)
    planes = [np.right_shift(words, 8 * place, out=shifted).astype(np.uint8).tobytes() for place in range(4)]
    return [*planes, raw[4 * count :]]


def join(planes: bytes) -> bytes:
    """Inverse of `split`, of its parts one after the other."""
    count = len(planes) // 4
    places = np.frombuffer(planes, np.uint8, 4 * count).reshape(4, count)
    words = places[3].astype(_WORD)
    for place in (2, 1, 0):
        words <<= 8
        words |= places[place]
    return bytes(words.data) + planes[4 * count :]

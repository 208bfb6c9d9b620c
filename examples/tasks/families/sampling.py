"""Drawing words for a split, with some kept back for the test rows.

A third of every word list and of every list of sentence frames is kept back: training rows never
see it, and every test row contains at least one such word or frame.  A model can thus not answer
the test rows by remembering the training rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

Split = Literal["train", "test"]
Pool = Sequence[str]
Slots = Mapping[str, Pool]

KEPT_BACK_EVERY = 3

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u(?!ni|se|su))")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?] ))[a-z]")


def listed(words: str) -> tuple[str, ...]:
    """Turn words that are written one after another, with commas, into a pool."""
    return tuple(" ".join(word.split()) for word in words.split(","))


class Sampler:
    """Draws words for one split and remembers whether a kept-back one was among them."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split
        self.drew_kept_back = False

    def pick(self, pool: Pool) -> str:
        """Draw one item; the training split only sees the items that are not kept back."""
        index = self.rng.choice([i for i in range(len(pool)) if self._may_use(i)])
        self.drew_kept_back = self.drew_kept_back or _is_kept_back(index)
        return pool[index]

    def pick_several(self, pool: Pool, count: int) -> list[str]:
        """Draw `count` different items in random order."""
        chosen: list[str] = []
        while len(chosen) < count:
            item = self.pick(pool)
            if item not in chosen:
                chosen.append(item)
        return chosen

    def write(self, frames: Pool, slots: Slots) -> str:
        """Draw a frame and fill its slots; no word fills two slots, and fillings may have slots."""
        text = self.pick(frames)
        used: list[str] = []
        while match := _SLOT.search(text):
            filling = self._pick_unused(slots[match[1]], used)
            text = text[: match.start()] + filling + text[match.end() :]
        return _tidy(text)

    def _pick_unused(self, pool: Pool, used: list[str]) -> str:
        filling = self.pick(pool)
        while filling in used:
            filling = self.pick(pool)
        used.append(filling)
        return filling

    def _may_use(self, index: int) -> bool:
        return self.split == "test" or not _is_kept_back(index)


def _is_kept_back(index: int) -> bool:
    return index % KEPT_BACK_EVERY == KEPT_BACK_EVERY - 1


def _tidy(text: str) -> str:
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE_START.sub(lambda match: match[0].upper(), text)

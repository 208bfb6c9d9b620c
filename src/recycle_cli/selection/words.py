"""The words that a task is about, to look for in what strangers write of their adapters."""

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[^\W\d_]{3,}")
MOST = 64
"""Words that are looked for: the commonest of the task."""


def words_of(texts: Sequence[str]) -> list[str]:
    """The words of at least three letters, in lower case, that the most texts hold; ties by the
    alphabet. Words that every text holds tell nothing of any one, but do of the task."""
    counts = Counter(
        word for text in texts for word in {found.casefold() for found in WORD.findall(text)}
    )
    return [word for word, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))][:MOST]

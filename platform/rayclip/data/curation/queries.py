"""CLIP's queries: words and pairs of words, found in captions by one automaton, from a file or mined from the captions.

Both sides are lowered and cut into words, runs of letters and digits, so that a query is found at the bounds of words
only, whatever stands between them. In scripts without spaces a run of characters is one word.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from rayclip.errors import UserError
from rayclip.io.storage import read_bytes

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, lowered."""
    return _WORD.findall(text.lower())


class Matcher:
    """Which queries a caption holds. The time of a caption does not depend on how many queries there are."""

    def __init__(self, queries: Sequence[str]) -> None:
        """Queries that have the same words, or none, raise UserError."""
        import ahocorasick  # an extra: nothing but curation needs it

        self._automaton = ahocorasick.Automaton()
        for number, query in enumerate(queries):
            spelled = f" {' '.join(words(query))} "
            if not spelled.strip():
                raise UserError(f"query '{query}' holds no word")
            if not self._automaton.add_word(spelled, number):
                raise UserError(f"query '{query}' is there twice")
        self._automaton.make_automaton()

    def __call__(self, caption: str) -> list[int]:
        """The numbers of the queries in it, each once, ascending."""
        # Words that follow each other share the space between them: matches of an automaton may overlap.
        return sorted({number for _, number in self._automaton.iter(f" {' '.join(words(caption))} ")})


def read_queries(path: str | Path) -> list[str]:
    """The queries of a file, one a line; of those with the same words the first. Raises UserError."""
    try:
        lines = read_bytes(str(path)).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"queries '{path}' cannot be read: {error}") from None
    queries: dict[str, str] = {}
    for line in lines:
        queries.setdefault(" ".join(words(line)), line.strip())
    queries.pop("", None)
    if not queries:
        raise UserError(f"queries '{path}' holds none: give one a line")
    return list(queries.values())


class Miner:
    """Counts words and neighbouring words, and makes queries of the frequent ones."""

    def __init__(self) -> None:
        self._words: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()

    def add(self, captions: Iterable[str]) -> None:
        """Add the words and pairs of words of captions to the counts."""
        for caption in captions:
            found = words(caption)
            self._words.update(found)
            self._pairs.update(pairwise(found))

    def queries(self, min_count: int, min_pmi: float, most: int) -> list[str]:
        """Words and pairs of words that occur `min_count` times, at most `most` of them, the commonest first.

        Of pairs only those with a pointwise mutual information, log2 p(a, b) / (p(a) p(b)), of at least `min_pmi` bits.
        """
        found = {word: count for word, count in self._words.items() if count >= min_count}
        total = self._words.total()
        for (first, second), count in self._pairs.items():
            if count >= min_count:
                pmi = math.log2(count * total / (self._words[first] * self._words[second]))
                if pmi >= min_pmi:
                    found[f"{first} {second}"] = count
        return sorted(found, key=lambda query: (-found[query], query))[:most]

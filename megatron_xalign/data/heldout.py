"""Choose held-out translations for probing, and tell which other texts are too close to them to be trained on."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_xalign.data.documents import Document, hash_fraction
from megatron_xalign.errors import CorpusError

SHORTEST_WORDS, LONGEST_WORDS = 8, 30
"""Length of the first side of a held-out pair; the second has at least 3 words."""
_SHORTEST_SECOND = 3
# Character 4-grams shared by two texts over those of either (Jaccard).
_TOO_CLOSE = 0.7
_TOO_CLOSE_TO_ANOTHER_PROBE = 0.4
# Scripts written without spaces count each character as a word.
_SPACELESS = "\\u0e00-\\u0e7f\\u1000-\\u109f\\u1780-\\u17ff\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


def fold(text: str) -> list[str]:
    """Words of a text without case, punctuation and spacing; what "the same text" means here."""
    return _WORD.findall(text.casefold())


def _grams(words: Sequence[str], size: int = 4) -> frozenset[str]:
    text = f" {' '.join(words)} "
    return frozenset(text[start : start + size] for start in range(len(text) - size + 1))


def _closeness(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / max(len(a) + len(b) - shared, 1)


class HeldOut:
    """Answers whether a text contains or resembles one of a set of held-out texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._starting_with: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
        self._grams: list[frozenset[str]] = []
        for text in texts:
            words = fold(text)
            if not words:
                raise ValueError(f"held-out text {text!r} has no words.")
            self._starting_with[tuple(words[:_SHORTEST_SECOND])].append(words)
            self._grams.append(_grams(words))
        self._start_sizes = sorted({len(start) for start in self._starting_with})
        frequency: dict[str, int] = defaultdict(int)
        for grams in self._grams:
            for gram in grams:
                frequency[gram] += 1
        # A text this close to a held-out one misses at most 30 % of its grams, so it has at least one of any 30 % plus
        # one of them; the rarest give the fewest candidates to compare in full.
        self._having: dict[str, list[int]] = defaultdict(list)
        for index, grams in enumerate(self._grams):
            rarest = sorted(grams, key=lambda gram: (frequency[gram], gram))
            for gram in rarest[: int((1 - _TOO_CLOSE) * len(rarest)) + 1]:
                self._having[gram].append(index)
        self._most_grams = max((len(grams) for grams in self._grams), default=0) / _TOO_CLOSE

    def touches(self, text: str) -> bool:
        """Whether ``text`` contains a held-out text (folded, at word boundaries) or is nearly one."""
        words = fold(text)
        for start in range(len(words)):
            for size in self._start_sizes:
                for held in self._starting_with.get(tuple(words[start : start + size]), ()):
                    if words[start : start + len(held)] == held:
                        return True
        # Sets of very different sizes cannot be close; most of all, a long document is not compared at all.
        grams = _grams(words)
        if len(grams) > self._most_grams:
            return False
        candidates = {index for gram in grams & self._having.keys() for index in self._having[gram]}
        return any(
            _TOO_CLOSE * len(grams) < len(self._grams[index]) < len(grams) / _TOO_CLOSE
            and _closeness(grams, self._grams[index]) > _TOO_CLOSE
            for index in candidates
        )


def choose_probe(pairs: Iterable[Document], num_probe: int, seed: int) -> list[Document]:
    """Choose pairs to hold out: of readable length, unlike one another, and not alike in spelling across languages.

    The order of choice is a hash of seed and id, so more or fewer pairs change little. Sides that share a word of four
    letters or more, a number, or five letters in a row are passed over: retrieval of such a pair would measure
    copying.

    Args:
        pairs: parallel documents, read once; memory is bounded.
        num_probe: pairs wanted.
        seed: of the choice.

    Raises:
        CorpusError: there are not so many suitable pairs.
    """
    if num_probe <= 0:
        raise ValueError(f"num_probe={num_probe} must be positive.")
    # Many times what is wanted, so that the pairs unlike one another can be found among them.
    most = 20 * num_probe
    heap: list[tuple[float, int, Document]] = []
    seen = 0
    for pair in pairs:
        seen += 1
        rank = -hash_fraction(pair.id, seed, "probe")
        if (len(heap) < most or rank > heap[0][0]) and _suitable(*pair.texts.values()):
            heapq.heappush(heap, (rank, -seen, pair))
            if len(heap) > most:
                heapq.heappop(heap)
    chosen: list[tuple[Document, list[frozenset[str]]]] = []
    for _, _, pair in sorted(heap, key=lambda item: item[:2], reverse=True):
        sides = [_grams(fold(text)) for text in pair.texts.values()]
        if all(
            _closeness(side, other) <= _TOO_CLOSE_TO_ANOTHER_PROBE
            for _, others in chosen
            for side, other in zip(sides, others, strict=True)
        ):
            chosen.append((pair, sides))
            if len(chosen) == num_probe:
                return [pair for pair, _ in chosen]
    raise CorpusError(
        f"{num_probe} held-out pairs were asked for; of {seen:,} pairs, {len(chosen)} are long enough "
        f"({SHORTEST_WORDS} to {LONGEST_WORDS} words), unlike one another and not spelt alike. Ask for fewer with "
        "num_probe, or bring more pairs."
    )


def _suitable(first: str, second: str) -> bool:
    words, others = fold(first), fold(second)
    if not (SHORTEST_WORDS <= len(words) <= LONGEST_WORDS and _SHORTEST_SECOND <= len(others) <= 2 * LONGEST_WORDS):
        return False
    if "…" in first or "…" in second:
        return False
    shared = {word for word in words if len(word) > 3 or word.isdigit()} & set(others)
    return not shared and not _grams(words, 5) & _grams(others, 5)

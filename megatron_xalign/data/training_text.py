"""Text to train a tokenizer on: a bounded draw of each language, weighed by a temperature."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_xalign.errors import CorpusError

# A single text may be a whole corpus on one line; pieces keep memory near the cap. A word cut in two does not matter.
_PIECE_CHARACTERS = 50_000
_HELD_OUT_SHARE = 0.05
_HELD_OUT_BYTES = 1_000_000
# Of fewer texts than this, none can be spared.
_HELD_OUT_MIN_TEXTS = 20


@dataclass(frozen=True)
class LanguageSample:
    """What was drawn of one language."""

    texts: list[str]
    """To train on, in random order."""
    held_out: list[str]
    """To measure on; empty where the language has few texts."""
    num_bytes: int
    """UTF-8 bytes of ``texts``."""
    bytes_read: int
    """UTF-8 bytes of all text that the language has."""
    texts_read: int
    """Texts that the language has."""


class _Draw:
    """A uniform draw of texts that never holds more than ``max_bytes`` and one text."""

    def __init__(self, max_bytes: int, seed: str) -> None:
        self.bytes_read = 0
        self.texts_read = 0
        self._rng = random.Random(seed)
        self._max_bytes = max_bytes
        self._held_bytes = 0
        # The texts with the smallest random numbers stay; the number read settles ties without comparing texts.
        self._heap: list[tuple[float, int, int, str]] = []

    def add(self, text: str) -> None:
        self.texts_read += bool(text)
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            size = len(piece.encode("utf-8"))
            self.bytes_read += size
            self._held_bytes += size
            heapq.heappush(self._heap, (-self._rng.random(), self.texts_read, size, piece))
            while self._held_bytes > self._max_bytes and len(self._heap) > 1:
                self._held_bytes -= heapq.heappop(self._heap)[2]

    def sample(self) -> LanguageSample:
        """What was drawn; a twentieth of it, at most a megabyte, is held out."""
        texts = [text for *_, text in sorted(self._heap, reverse=True)]
        if len(texts) < _HELD_OUT_MIN_TEXTS:
            # A few long documents: lines can be spared where documents cannot.
            lines = [line for text in texts for line in text.splitlines(keepends=True)]
            if len(lines) >= _HELD_OUT_MIN_TEXTS:
                self._rng.shuffle(lines)
                texts = lines
        held_out, kept = [], []
        held_out_bytes = 0
        limit = min(_HELD_OUT_SHARE * self._held_bytes, _HELD_OUT_BYTES) if len(texts) >= _HELD_OUT_MIN_TEXTS else 0.0
        for text in texts:
            size = len(text.encode("utf-8")) if held_out_bytes < limit else 0
            if size and held_out_bytes + size <= limit:
                held_out.append(text)
                held_out_bytes += size
            else:
                kept.append(text)
        return LanguageSample(kept, held_out, self._held_bytes - held_out_bytes, self.bytes_read, self.texts_read)


def draw_texts(
    texts: Iterable[tuple[str, str]], max_bytes_per_language: int, seed: int
) -> dict[str, LanguageSample]:
    """Draw of each language's texts at most so many bytes, all texts being equally likely.

    What is drawn of a language depends on its texts, their order and the seed, not on other languages between them.

    Args:
        texts: pairs of language and text, read once; only the drawn texts are kept.
        max_bytes_per_language: UTF-8 bytes to keep of each.
        seed: of the draw.

    Returns:
        The samples in order of language.

    Raises:
        CorpusError: a text holds half a UTF-16 pair.
    """
    draws: dict[str, _Draw] = {}
    for language, text in texts:
        if language not in draws:
            draws[language] = _Draw(max_bytes_per_language, f"{seed} {language}")
        try:
            draws[language].add(text)
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"text {draws[language].texts_read} of {language} is not valid Unicode ({error.reason} at character "
                f"{error.start}); it was decoded wrongly."
            ) from None
    return {language: draws[language].sample() for language in sorted(draws)}


def shares_of(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Share of each language, proportional to size ** (1 / temperature).

    1 keeps the proportions of the corpus, infinity makes all equal.
    """
    # Divided by the largest first, so that no power overflows.
    largest = max(sizes.values())
    weights = {language: (size / largest) ** (1 / temperature) for language, size in sizes.items()}
    total = math.fsum(weights.values())
    return {language: weight / total for language, weight in weights.items()}


def balanced_texts(
    samples: Mapping[str, LanguageSample], shares: Mapping[str, float], seed: int
) -> tuple[list[str], dict[str, int]]:
    """Texts left out or repeated until languages have their shares of the bytes, in random order.

    As many bytes as the samples have together; a repeated text is the same object and costs no memory.

    Returns:
        The texts, and how many bytes of each language they hold.
    """
    total = sum(sample.num_bytes for sample in samples.values())
    drawn: list[str] = []
    drawn_bytes = {}
    for language, sample in samples.items():
        texts, drawn_bytes[language] = _up_to(sample.texts, total * shares[language])
        drawn += texts
    random.Random(seed).shuffle(drawn)
    return drawn, drawn_bytes


def _up_to(texts: list[str], wanted_bytes: float) -> tuple[list[str], int]:
    """Texts from the start, over and over, as many as come nearest to so many bytes, at least one; and their bytes."""
    sizes = [len(text.encode("utf-8")) for text in texts]
    rounds, rest = divmod(wanted_bytes, sum(sizes))
    drawn, taken = texts * int(rounds), 0
    for text, size in zip(texts, sizes, strict=True):
        if taken + size / 2 > rest and drawn:
            break
        drawn.append(text)
        taken += size
    return drawn, int(rounds) * sum(sizes) + taken

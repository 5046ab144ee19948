"""Measures of generated text that need no judge, and the choice of a steering strength by them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of n-grams over all sequences that are different ones; 0 where there is none.

    Raises:
        ValueError: ``n`` is below 1.
    """
    grams = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngram_rate(sequences: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Share of a sequence's n-grams that it has had before, mean over sequences that have one; degeneration.

    Raises:
        ValueError: ``n`` is below 1.
    """
    rates = [1 - len(set(grams)) / len(grams) for sequence in sequences if (grams := _ngrams(sequence, n))]
    return float(np.mean(rates)) if rates else 0.0


def _ngrams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n={n} must be positive.")
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]


def harmonic_mean(values: Sequence[float]) -> float:
    """Of numbers in [0, 1]; 0 if one is, so that none can make up for another.

    Raises:
        ValueError: there is none, or one is outside [0, 1].
    """
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"{list(values)} are not numbers in [0, 1].")
    return 0.0 if min(values) == 0.0 else len(values) / sum(1 / value for value in values)


@dataclass(frozen=True)
class SteeringScore:
    """How far steered text is in the language, and whether it is still text."""

    language_rate: float
    """Share of continuations identified as the wanted language."""
    nll_per_token: float
    """Nats under the unsteered model, given the prompt."""
    repeated_4gram_rate: float
    unsteered_nll_per_token: float
    """Of unsteered continuations of the same prompts, for scale."""

    @property
    def fluency(self) -> float:
        """Fraction kept of the likelihood per token unsteered text has, and of n-grams that are new: in [0, 1].

        Text in a language the prompt is not in is less likely for that reason too, so it is for choosing a strength,
        not for reporting.
        """
        kept = float(np.exp(min(self.unsteered_nll_per_token - self.nll_per_token, 0.0)))
        return kept * (1 - self.repeated_4gram_rate)

    @property
    def value(self) -> float:
        """Harmonic mean of language and fluency."""
        return harmonic_mean([self.language_rate, self.fluency])


def choose_strength(scores: Mapping[float, SteeringScore]) -> float:
    """The strength of highest value on prompts set aside for choosing; of equal ones the one closest to 0.

    Raises:
        ValueError: there is none.
    """
    if not scores:
        raise ValueError("there is no strength to choose from.")
    return max(scores, key=lambda strength: (scores[strength].value, -abs(strength)))

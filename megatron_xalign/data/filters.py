"""Which pairs to leave out, and why.

Each pair is asked the questions of :data:`REASONS` in that order; the first that applies is the reason it is left out
for. Two more come later: too many tokens (after tokenising) and duplicates (when all parts are there).
"""

# N pairs

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_xalign import _native
from megatron_xalign.data.contamination import IN, NEAR, ProbeSet
from megatron_xalign.data.folding import FIRST_SCRIPT, INVISIBLE, OTHER, SPACE, count_characters, loose_folding
from megatron_xalign.data.language_identification import CheckLanguage, LanguageChecker, Languages, letter_widths
from megatron_xalign.errors import ConfigError

__all__ = ["REASONS", "TOO_MANY_TOKENS", "PairFilter", "PairFilters", "ProbeSet", "within_token_limit"]

EMPTY = "empty side"
"""White space and characters that show nothing."""
IDENTICAL = "identical sides"
"""Apart from case, punctuation, spacing: not translated. Sides without letters and digits: character by character."""
TOO_SHORT, TOO_LONG = "too short", "too long"
LENGTH_RATIO = "length ratio"
FEW_LETTERS = "mostly not letters"
WRONG_SCRIPT = "wrong script"
IN_PROBE, NEAR_PROBE = "in the probe set", "near the probe set"
WRONG_LANGUAGE = "wrong language"
REASONS = (
    EMPTY, IDENTICAL, TOO_SHORT, TOO_LONG, LENGTH_RATIO, FEW_LETTERS, WRONG_SCRIPT, IN_PROBE, NEAR_PROBE,
    WRONG_LANGUAGE,
)  # fmt: skip
"""In the order in which they are asked. The identifier, the only slow one, is asked last."""
TOO_MANY_TOKENS = "too many tokens"

_RATIO_OFFSET = 10
"""Added to both lengths before their ratio is taken: a word more or less says nothing about two short texts."""


@dataclass(frozen=True, kw_only=True)
class PairFilters:
    """What a pair must be like to be kept; ``dataclasses.asdict`` and ``PairFilters(**tree)`` go through JSON.

    The defaults leave out what is certainly no translation and next to nothing of a clean corpus.
    """

    drop_identical: bool = True
    """Leave out pairs with identical sides: copying, the one thing that needs no alignment."""
    min_characters: int = 1
    """Least visible characters a side. Whether short pairs are noise or a dictionary is not for a default to say."""
    max_characters: int | None = 5000
    """Most characters a side: about 1,250 tokens of English, so that a pair is no longer than a window of 2,048."""
    max_length_ratio: float | None = 3.0
    """Most of (longer + 10) / (shorter + 10). Lengths are visible characters, Han, kana and Hangul weighted by
    ``language_identification.SCRIPT_WIDTHS``. Of translations of English messages into 45
    languages, 98 of 100 are within 2.6."""
    min_letter_fraction: float | None = 0.25
    """Least share of letters among the visible characters of a side, weighted in the same way: tables of numbers and
    rows of dashes are below, sentences with long numbers and commands above."""
    check_language: CheckLanguage = "script"
    """``script`` leaves out sides of at least 30 letters of which less than a tenth are of the declared language's
    script (an untranslated side, columns exchanged); ``identify`` also those that an offline identifier takes for
    another language (needs the extra ``langid``; 1 MB a second); ``off`` neither."""
    max_tokens: int | None = None
    """Most tokens a side, asked after tokenising. Off: windows cut long pairs and count them."""

    def __post_init__(self) -> None:
        if self.min_characters < 0:
            raise ConfigError(f"min_characters={self.min_characters} is negative; 0 or 1 keeps every side with text.")
        for name in ("max_characters", "max_tokens"):
            most = getattr(self, name)
            if most is not None and most < 1:
                raise ConfigError(f"{name}={most} keeps no pair; it must be at least 1, or none for no limit.")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ConfigError(
                f"max_characters={self.max_characters} is below min_characters={self.min_characters}: no pair is both."
            )
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1.0:
            raise ConfigError(
                f"max_length_ratio={self.max_length_ratio} keeps no pair: it is the longer side over the shorter, "
                "at least 1."
            )
        if self.min_letter_fraction is not None and not 0.0 <= self.min_letter_fraction <= 1.0:
            raise ConfigError(
                f"min_letter_fraction={self.min_letter_fraction} is outside [0, 1]; a quarter is written 0.25."
            )
        if self.check_language not in ("off", "script", "identify"):
            raise ConfigError(f"check_language={self.check_language!r} is not one of off, script, identify.")


class PairFilter:
    """Applies the filters to batches of pairs; one object for a part, which counts what its checker could not tell."""

    def __init__(self, settings: PairFilters, *, probe: ProbeSet | None = None) -> None:
        """Load what the filters need.

        Args:
            settings: what a pair must be like.
            probe: held-out sentences no side may touch.

        Raises:
            ConfigError: languages are to be identified and the identifier is not installed.
        """
        self.settings = settings
        self._probe = probe
        self._checker = LanguageChecker(settings.check_language)

    @property
    def not_checked(self) -> Counter[str]:
        """Sides of kept pairs whose language could not be checked, by reason, over all batches so far."""
        return self._checker.not_checked

    @property
    def identifier(self) -> dict[str, str] | None:
        """Name and version of the language identifier, if one is used."""
        return self._checker.identifier

    def apply(
        self, texts: list[str], others: list[str], languages: Languages = None, other_languages: Languages = None
    ) -> tuple[NDArray[np.bool_], Counter[str]]:
        """Decide which pairs to keep.

        Args:
            texts: N first sides.
            others: N second sides.
            languages: of the first sides: one code, one for each, or None.
            other_languages: of the second sides.

        Returns:
            bool [N], True for pairs to keep, and how many are left out for each reason.

        Raises:
            ValueError: the lists differ in length.
        """
        if len(texts) != len(others):
            raise ValueError(f"{len(texts)} texts and {len(others)} others.")
        counts, other_counts = count_characters(texts), count_characters(others)
        keep_N = np.ones(len(texts), dtype=bool)
        dropped: Counter[str] = Counter()

        def leave_out(reason: str, which_N: NDArray[np.bool_]) -> None:
            which_N = which_N & keep_N
            if number := int(np.count_nonzero(which_N)):
                dropped[reason] += number
                keep_N[which_N] = False

        for reason, which_N in self._by_measures(texts, others, counts, other_counts):
            leave_out(reason, which_N)
        for side_counts, side_languages in ((counts, languages), (other_counts, other_languages)):
            leave_out(WRONG_SCRIPT, self._checker.wrong_script(side_counts, side_languages))
        if self._probe is not None:
            touch_N = np.zeros(len(texts), dtype=np.uint8)
            kept = np.flatnonzero(keep_N)
            touch_N[kept] = np.maximum(
                self._probe.touch([texts[index] for index in kept]),
                self._probe.touch([others[index] for index in kept]),
            )
            leave_out(IN_PROBE, touch_N == IN)
            leave_out(NEAR_PROBE, touch_N == NEAR)
        if self.settings.check_language != "off":
            wrong_N = np.zeros(len(texts), dtype=bool)
            kept = np.flatnonzero(keep_N)
            for side, side_counts, side_languages in (
                (texts, counts, languages), (others, other_counts, other_languages),
            ):  # fmt: skip
                if not (side_languages is None or isinstance(side_languages, str)):
                    side_languages = [side_languages[index] for index in kept.tolist()]
                wrong_N[kept] |= self._checker.wrong_language(
                    [side[index] for index in kept], side_counts[kept], side_languages
                )
            leave_out(WRONG_LANGUAGE, wrong_N)
        return keep_N, dropped

    def _by_measures(
        self, texts: list[str], others: list[str], counts: NDArray[np.int64], other_counts: NDArray[np.int64]
    ) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Reasons that lengths and keys tell, and which pairs have them."""
        settings = self.settings
        visible, other_visible = _visible(counts), _visible(other_counts)
        yield EMPTY, (visible == 0) | (other_visible == 0)
        if settings.drop_identical:
            keys, other_keys = (_native.document_keys(loose_folding(), side) for side in (texts, others))
            yield IDENTICAL, (keys == other_keys).all(axis=1)
        yield TOO_SHORT, np.minimum(visible, other_visible) < settings.min_characters
        if settings.max_characters is not None:
            longest = np.maximum(counts.sum(axis=1), other_counts.sum(axis=1))
            yield TOO_LONG, longest > settings.max_characters
        letters, other_letters = letter_widths(counts).sum(axis=1), letter_widths(other_counts).sum(axis=1)
        widths, other_widths = letters + counts[:, OTHER], other_letters + other_counts[:, OTHER]
        if settings.max_length_ratio is not None:
            shorter = np.minimum(widths, other_widths) + _RATIO_OFFSET
            yield LENGTH_RATIO, np.maximum(widths, other_widths) + _RATIO_OFFSET > settings.max_length_ratio * shorter
        if settings.min_letter_fraction is not None:
            least = settings.min_letter_fraction
            yield FEW_LETTERS, (letters < least * widths) | (other_letters < least * other_widths)


def within_token_limit(
    lengths: ArrayLike, other_lengths: ArrayLike, max_tokens: int | None
) -> NDArray[np.bool_]:
    """bool [N]: True for pairs with at most ``max_tokens`` tokens a side; the others are :data:`TOO_MANY_TOKENS`.

    Args:
        lengths: tokens of the N first sides.
        other_lengths: tokens of the N second sides.
        max_tokens: the limit; None keeps all.
    """
    longest_N = np.maximum(np.asarray(lengths), np.asarray(other_lengths))
    return np.ones(len(longest_N), dtype=bool) if max_tokens is None else longest_N <= max_tokens


def _visible(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Characters that show something by themselves: neither white space, invisible, nor marks that stand on others."""
    assert (SPACE, INVISIBLE) < (OTHER,) < (FIRST_SCRIPT,)
    return counts[:, OTHER:].sum(axis=1)

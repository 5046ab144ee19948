"""Text on which an engine has to give the reference's ids before it is used: everything that tokenizers trip over.

White space, digits of all scripts, contractions, emoji sequences, combining marks, right-to-left and unspaced scripts,
control characters, very long words, random mixtures of all of these, every block of Unicode, and the spelling of every
special token.
"""

from __future__ import annotations

import functools
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\u00a0\u1680\u2002\u2009\u200b\u200c\u200d"
    "\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
_WRITTEN = (
    "Don't we'll I'VE they'd she's 'tis rock'n'roll l'été it’s IT'S ''s 's'S 'llama 're",
    "3 14 159 2653 58979 323846 1234567890 1,234.50 1e-9 0x1F ½ ² Ⅷ ٣٤٥ १२३ 四五 𝟘𝟙 ➊ 1st 2nd",
    "snake_case camelCase HTTPServer iPhone15 a_b__c --flag=x [x](y) {{z}} </p> <s> [UNK] <0x41> ▁x ĠĊ Ã©",
    "https://example.org/a/b?c=d&e=%20#f  user@example.org  C:\\path\\file  ../..  1/2/2003  12:34:56",
    "👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇮🇸🇪 1️⃣ ☃️ ☺ ♥️ 🤷‍♀️ \U0001f9d1\u200d\U0001f680",
    "e\u0301 o\u0302\u0323 ñ n\u0303 Å A\u030a ﬁ ǆ ß ẞ İ ı Σ ς ͅ z\u0351\u036b\u0343\u036a a\u0300\u0301\u0302",
    "हिन्दी में क्षत्रिय ज़्यादा தமிழ் மொழி ภาษาไทยไม่มีช่องว่าง ភាសាខ្មែរ မြန်မာဘာသာ བོད་སྐད་",
    "العَرَبِيَّةُ لُغَةٌ جَمِيلَة ١٢٣ فارسی می‌خواهم עִבְרִית שָׁלוֹם ‏‎ \u202babc\u202c ܐܪܡܝܐ ދިވެހި",
    "漢字かな交じり文。カタカナ・ﾊﾝｶｸ「引用」、全角ＡＢＣ１２３　間隔 한국어 조선말 𠮷野家 㐀",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "Ελληνικά Русский Українська Ђорђе Қазақша Հայերեն ქართული ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ⴰⵎⴰⵣⵉⵖ ꦗꦮ 𐌰𐌱 𒀀𒁀 𓀀",
    "\x00 a\x00b \x01\x02\x03 \x7f \x80\x9f \u00ad soft\u00adhyphen \ufffd \ufffe \uffff \U0010ffff \ue000",
    "…—–-‐‑ “quoted” ‘single’ «x» „y“ ‹z› •·† ‡§¶ €£¥₹₿ ©®™ ≠≤≥∞∑∫√ ←→⇒ □■ ﷽ ÷×",
)


_BATCH = 100


class Encoder(Protocol):
    """Anything that makes flat ids of texts."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] and lengths int64 [N]."""


@dataclass(frozen=True)
class Difference:
    """The first text that two engines tokenise differently."""

    text: str
    at: int
    """Token from which they differ."""
    reference: list[int]
    """The next ids of the reference."""
    other: list[int]
    """Those of the other."""

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return f"from token {self.at} of {shown!r} on it gives {self.other}, the reference {self.reference}"


def first_difference(reference: Encoder, other: Encoder, texts: Sequence[str]) -> Difference | None:
    """The first text whose ids differ, None if all are equal."""
    expected_T, expected_N = reference.encode_flat(texts)
    # Some at a time, as a job does: with a special token spelt out among them, texts may take another way.
    batches = [other.encode_flat(texts[begin : begin + _BATCH]) for begin in range(0, max(len(texts), 1), _BATCH)]
    given_T, given_N = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    if np.array_equal(expected_N, given_N) and np.array_equal(expected_T, given_T):
        return None
    expected = np.split(expected_T, np.cumsum(expected_N)[:-1])
    given = np.split(given_T, np.cumsum(given_N)[:-1])
    for text, right, wrong in zip(texts, expected, given, strict=True):
        if not np.array_equal(right, wrong):
            size = min(right.size, wrong.size)
            unequal = np.flatnonzero(right[:size] != wrong[:size])
            at = int(unequal[0]) if unequal.size else size
            return Difference(text, at, right[at : at + 5].tolist(), wrong[at : at + 5].tolist())
    raise AssertionError("the ids differ, those of no text do")


def adversarial_texts(special_tokens: Sequence[str]) -> list[str]:
    """All built-in texts, and the special tokens' names in several surroundings."""
    return [*_fixed_texts(), *_spelled(special_tokens)]


@functools.cache
def _fixed_texts() -> tuple[str, ...]:
    return ("", *_WRITTEN, *_runs(), *_mixtures(), *_unicode())


def _runs() -> Iterator[str]:
    """Runs of one character, and of two kinds of white space, at the start, inside and at the end."""
    for character in _SPACES + "a7.é漢ก\u0301😀'":
        for length in (1, 2, 3, 4, 8, 17, 100):
            run = character * length
            yield from (run, f"x{run}y", f" {run} ", f"{run}\n{run}", f".{run}'s", f"1{run}2")
    for first in _SPACES:
        for second in "\n \r\t\u00a0\u3000":
            yield f"a{first}{second}b{second}{first} c{first}{first}{second}"
    # Long enough for caches of words and for stacks to overflow.
    yield from (character * 20_000 for character in ("a", " ", "\n", "7", "-", "é", "漢", "ab", "\r\n", "a "))
    yield "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyzäöü", k=20_000))


def _mixtures() -> Iterator[str]:
    """Random strings over one alphabet of all that is special somewhere."""
    rng = random.Random(2)
    alphabet = _SPACES + "".join(sorted(set("".join(_WRITTEN)))) + "aaabcdestvlmrn''''    \n\n\n.,;:!?0123456789ABC"
    for _ in range(6_000):
        yield "".join(rng.choices(alphabet, k=rng.randrange(1, 40)))
    for _ in range(2_000):
        yield "".join(rng.choices("aB1 \n\r\t.'s", k=rng.randrange(1, 25)))


def _unicode() -> Iterator[str]:
    """Every assigned character of the older blocks; of ideographs, syllables and the like one in sixteen."""
    codes_C, categories_C = assigned_characters()
    begins_C = np.append(True, categories_C[1:] != categories_C[:-1])
    chosen = list(map(chr, codes_C[(codes_C < 0x3000) | (codes_C % 16 == 0) | begins_C].tolist()))
    for start in range(0, len(chosen), 16):
        yield "\n".join(f"a{c}{c}1 {c}b{c}'s {c} {c}{c}" for c in chosen[start : start + 16])


@functools.cache
def assigned_characters() -> tuple[np.ndarray, np.ndarray]:
    """Code points that have a meaning in this Python's Unicode (14.0 or later), and their categories, as bytes of two.

    Surrogates and the last plane of private use are left out.
    """
    # The planes in between have never been used; the last is for private use like the one before.
    codes_C = np.concatenate([np.arange(plane << 16, (plane + 1) << 16) for plane in (0, 1, 2, 3, 14, 15)])
    names = "".join(map(unicodedata.category, map(chr, codes_C.tolist())))
    categories_C = np.frombuffer(names.encode(), dtype="S2")
    is_assigned_C = (categories_C != b"Cn") & (categories_C != b"Cs")
    return codes_C[is_assigned_C], categories_C[is_assigned_C]


def _spelled(special_tokens: Sequence[str]) -> Iterator[str]:
    for name in special_tokens:
        yield from (name, f"a{name}b", f"a {name} b", f"{name}{name}", f"\n{name}\n", f"{name[:-1]} {name[1:]}")

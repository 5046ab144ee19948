"""What makes two texts the same: tables that say, for each code point, what is left of it when texts are compared.

Two foldings, both made of Python's Unicode tables and carried out by the C++ library:

``exact_folding``
    Full canonical decomposition (equal for NFC, NFD and mixed forms of a text) and one space for any white space.
``loose_folding``
    Besides: compatibility forms (full width, ligatures), case, punctuation, symbols and invisible characters make no
    difference. What is left is words with one space between. An ideograph or kana is a word by itself, so that a gram
    of five characters spans two or three of them; in Thai, Lao, Khmer, Burmese and Tibetan, written without spaces,
    spaces and signs beside a letter are dropped.
"""

# C code points

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megatron_xalign import _native

_NUM_CODE_POINTS = sys.maxunicode + 1
# Code points that are ideographs and stay what they are: two thirds of Unicode, not worth a look one by one.
_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2F7FF), (0x2FA20, 0x33FFF))
_HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)
# Everything else that Unicode assigns, apart from surrogates, NUL (see _folding) and private use.
_LOOKED_AT = (
    *range(1, 0x3400), *range(0x4DC0, 0x4E00), *range(0xA000, 0xD800), *range(0xF900, 0x20000),
    *range(0x2F800, 0x2FA20), *range(0xE0000, 0xE1000),
)  # fmt: skip
# Kinds as in csrc/include/xalign/folding.h.
_SPACE, _SIGN, _LETTER, _IGNORED, _IDEOGRAPH, _UNSPACED, _MARK, _EXPANSION = range(8)

# Characters that show nothing though their category is one of visible ones (the property Default_Ignorable_Code_Point
# of the Unicode Character Database), and the Arabic tatweel, which only stretches a word.
_SHOW_NOTHING = (
    (0x034F, 0x034F), (0x0640, 0x0640), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065),
    (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF),
)
_BLANK = 0x2800
"""The empty Braille pattern."""

_SCRIPT_OF_NAME = {
    "LATIN": "Latn", "GREEK": "Grek", "COPTIC": "Copt", "CYRILLIC": "Cyrl", "ARMENIAN": "Armn", "HEBREW": "Hebr",
    "ARABIC": "Arab", "SYRIAC": "Syrc", "THAANA": "Thaa", "NKO": "Nkoo", "DEVANAGARI": "Deva", "BENGALI": "Beng",
    "GURMUKHI": "Guru", "GUJARATI": "Gujr", "ORIYA": "Orya", "TAMIL": "Taml", "TELUGU": "Telu", "KANNADA": "Knda",
    "MALAYALAM": "Mlym", "SINHALA": "Sinh", "THAI": "Thai", "LAO": "Laoo", "TIBETAN": "Tibt", "MYANMAR": "Mymr",
    "GEORGIAN": "Geor", "HANGUL": "Hang", "ETHIOPIC": "Ethi", "CHEROKEE": "Cher", "CANADIAN": "Cans",
    "KHMER": "Khmr", "MONGOLIAN": "Mong", "TIFINAGH": "Tfng", "HIRAGANA": "Kana", "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana", "BOPOMOFO": "Bopo", "CJK": "Hani", "IDEOGRAPHIC": "Hani", "YI": "Yiii",
    "OL": "Olck", "MEETEI": "Mtei", "JAVANESE": "Java", "BALINESE": "Bali", "SUNDANESE": "Sund", "VAI": "Vaii",
    "ADLAM": "Adlm", "OSMANYA": "Osma", "BUGINESE": "Bugi",
}  # fmt: skip
"""Script (ISO 15924) by the first word of a letter's Unicode name; both kana are counted as one."""
SCRIPTS: tuple[str, ...] = (*dict.fromkeys(_SCRIPT_OF_NAME.values()), "Zzzz")
"""Scripts that letters are counted under; ``Zzzz`` is any other."""
_UNSPACED_SCRIPTS = frozenset(("Thai", "Laoo", "Khmr", "Mymr", "Tibt"))
_IDEOGRAPHIC_SCRIPTS = frozenset(("Hani", "Kana", "Bopo"))

SPACE, INVISIBLE, MARK, OTHER, FIRST_SCRIPT = range(5)
"""Columns of :func:`count_characters`: white space and control characters; invisible ones; marks that stand on a
letter; digits, punctuation and symbols; then letters of each of :data:`SCRIPTS`."""
NUM_COLUMNS = FIRST_SCRIPT + len(SCRIPTS)


def exact_folding() -> _native.Folding:
    """Texts that differ in canonical form or in white space are the same; made once a process."""
    return _tables().exact


def loose_folding() -> _native.Folding:
    """Texts that differ in case, punctuation, width or invisible characters are the same too; made once a process."""
    return _tables().loose


def count_characters(texts: list[str]) -> NDArray[np.int64]:
    """How many characters of each kind each text has.

    Returns:
        int64 [N, NUM_COLUMNS]; columns as :data:`FIRST_SCRIPT` says.
    """
    return _native.count_characters(texts, _tables().columns_C, NUM_COLUMNS)


@dataclass(frozen=True)
class _Tables:
    exact: _native.Folding
    loose: _native.Folding
    columns_C: NDArray[np.uint8]


@cache
def _tables() -> _Tables:
    code_points = [code_point for code_point in _LOOKED_AT if unicodedata.category(chr(code_point)) != "Cn"]

    column_of = {"Cc": SPACE, "Zs": SPACE, "Zl": SPACE, "Zp": SPACE, "Cf": INVISIBLE, "Mn": MARK, "Me": MARK}
    kind_of = {"Cc": _SPACE, "Cf": _IGNORED, "Z": _SPACE, "P": _SIGN, "S": _SIGN, "M": _MARK}
    column_of_script = {script: FIRST_SCRIPT + index for index, script in enumerate(SCRIPTS)}
    unknown = column_of_script["Zzzz"]
    # What has no entry below (unassigned, private) may be a letter of a newer Unicode.
    columns_C = np.full(_NUM_CODE_POINTS, unknown, dtype=np.uint8)
    kinds_C = np.full(_NUM_CODE_POINTS, _LETTER, dtype=np.uint32)
    columns, kinds = [], []
    for code_point in code_points:
        category = unicodedata.category(chr(code_point))
        # Most spacing marks are vowels of Indic scripts, no less visible than letters.
        script = _script(code_point) if category[0] == "L" or category == "Mc" else ""
        columns.append(column_of_script[script] if script else column_of.get(category, OTHER))
        if category[0] == "L" and script in _IDEOGRAPHIC_SCRIPTS:
            kinds.append(_IDEOGRAPH)
        elif category[0] == "L" and script in _UNSPACED_SCRIPTS:
            kinds.append(_UNSPACED)
        else:
            kinds.append(kind_of.get(category, kind_of.get(category[0], _LETTER)))
    columns_C[code_points], kinds_C[code_points] = columns, kinds
    columns_C[0], kinds_C[0] = SPACE, _SPACE
    for first, last in _IDEOGRAPHS:
        columns_C[first : last + 1], kinds_C[first : last + 1] = column_of_script["Hani"], _IDEOGRAPH
    for first, last in _SHOW_NOTHING:
        columns_C[first : last + 1], kinds_C[first : last + 1] = INVISIBLE, _IGNORED
    columns_C[_BLANK] = SPACE

    exact_kinds_C = np.full(_NUM_CODE_POINTS, _LETTER, dtype=np.uint32)
    exact_kinds_C[[code_point for code_point in code_points if chr(code_point).isspace()]] = _SPACE
    return _Tables(
        exact=_folding(code_points, _decompose, exact_kinds_C),
        loose=_folding(code_points, _decompose_loosely, kinds_C),
        columns_C=columns_C,
    )


def _script(letter: int) -> str:
    if letter in _HANGUL_SYLLABLES:
        return "Hang"
    name = unicodedata.name(chr(letter), "")
    word, _, rest = name.partition(" ")
    # Full and half width letters are letters of their script.
    if word in ("FULLWIDTH", "HALFWIDTH"):
        word = rest.partition(" ")[0]
    return _SCRIPT_OF_NAME.get(word, "Zzzz")


def _decompose(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _decompose_loosely(text: str) -> str:
    # Compatibility caseless matching, Unicode Standard 3.13, D146, letter by letter.
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", text).casefold())
    return unicodedata.normalize("NFKD", text.casefold())


def _folding(
    code_points: list[int], change: Callable[[str], str], kinds_C: NDArray[np.uint32]
) -> _native.Folding:
    """A folding that changes each code point by itself; ``kinds_C`` is of what it becomes."""
    table_C = np.arange(_NUM_CODE_POINTS, dtype=np.uint32)
    # One call for all, parted by NUL, which combines with nothing and which nothing else becomes.
    changed = change("\0".join(map(chr, code_points))).split("\0")
    assert len(changed) == len(code_points)
    combining_C = np.zeros(_NUM_CODE_POINTS, dtype=np.uint32)
    combining_C[code_points] = list(map(unicodedata.combining, map(chr, code_points)))
    # What can be reordered must be a mark for the library, in the exact folding too.
    kinds_C = np.where(combining_C > 0, np.uint32(_MARK), kinds_C)
    entries_C = table_C | kinds_C << np.uint32(21) | combining_C << np.uint32(24)
    folded_C = entries_C.copy()
    expansions: list[int] = []
    places: dict[str, int] = {}
    for code_point, text in zip(code_points, changed, strict=True):
        if len(text) == 1:
            if ord(text) != code_point:
                folded_C[code_point] = entries_C[ord(text)]
            continue
        if text not in places:
            places[text] = len(expansions)
            expansions += [len(text), *(int(entries_C[ord(character)]) for character in text)]
        folded_C[code_point] = places[text] | _EXPANSION << 21
    return _native.Folding(folded_C, np.array(expansions, dtype=np.uint32))

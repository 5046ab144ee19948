"""Pairs left out, with the reason a plain loop gives."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign.data.contamination import ProbeSet
from megatron_xalign.data.filters import REASONS, PairFilter, PairFilters, within_token_limit
from megatron_xalign.data.folding import loose_folding
from megatron_xalign.errors import ConfigError

ENGLISH = "The lighthouse keeper climbed the stairs every evening at six o'clock."
FINNISH = "Majakanvartija kiipesi portaat joka ilta kello kuusi."
CHINESE = "灯塔看守人每天晚上六点爬上楼梯，然后点亮灯火。"


def reason_of(text: str, other: str, languages: tuple[str, str] | None = None, **settings: Any) -> str | None:
    pair_filter = PairFilter(PairFilters(**settings))
    codes = [None, None] if languages is None else [[language] for language in languages]
    keep, reasons = pair_filter.apply([text], [other], *codes)
    assert keep.tolist() == [not reasons]
    assert reasons.total() == len(reasons) <= 1
    return next(iter(reasons), None)


WIDTHS = {"CJK": 3.0, "HIRAGANA": 1.25, "KATAKANA": 1.25, "HANGUL": 2.0}


def is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L" or unicodedata.category(character) == "Mc"


def shows(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me")


def width(character: str) -> float:
    return WIDTHS.get(unicodedata.name(character).split()[0], 1.0) if is_letter(character) else 1.0


def plain_reason(text: str, other: str, settings: PairFilters) -> str | None:
    """The questions in their order, one pair at a time."""
    sides = (text, other)
    visible = [[character for character in side if shows(character)] for side in sides]
    if not all(visible):
        return "empty side"
    folded = loose_folding().fold(list(sides))
    if settings.drop_identical and (folded[0] == folded[1] if folded[0] or folded[1] else text == other):
        return "identical sides"
    if min(map(len, visible)) < settings.min_characters:
        return "too short"
    if settings.max_characters is not None and max(map(len, sides)) > settings.max_characters:
        return "too long"
    widths = [sum(map(width, side)) for side in visible]
    if settings.max_length_ratio is not None:
        shorter, longer = sorted(widths)
        if longer + 10 > settings.max_length_ratio * (shorter + 10):
            return "length ratio"
    if settings.min_letter_fraction is not None:
        letters = [sum(width(character) for character in side if is_letter(character)) for side in visible]
        if any(part < settings.min_letter_fraction * whole for part, whole in zip(letters, widths, strict=True)):
            return "mostly not letters"
    return None


SIDE = st.text(st.sampled_from("abcAB中文かガ한글कि1290.,- \t\u0301\u200b\0éא"), max_size=30)


@settings(max_examples=400, deadline=None)
@given(
    pairs=st.lists(st.tuples(SIDE, SIDE), max_size=10),
    wanted=st.builds(
        PairFilters,
        drop_identical=st.booleans(),
        min_characters=st.integers(0, 4),
        max_characters=st.none() | st.integers(5, 25),
        max_length_ratio=st.none() | st.sampled_from([1.0, 1.5, 3.0]),
        min_letter_fraction=st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        check_language=st.just("off"),
    ),
)
def test_the_first_reason_is_the_one_a_plain_loop_finds(pairs: list[tuple[str, str]], wanted: PairFilters) -> None:
    keep, reasons = PairFilter(wanted).apply([a for a, _ in pairs], [b for _, b in pairs])
    expected = [plain_reason(a, b, wanted) for a, b in pairs]
    assert keep.tolist() == [reason is None for reason in expected]
    assert reasons == Counter(filter(None, expected))


@pytest.mark.parametrize(
    ("text", "other", "reason"),
    [
        (ENGLISH, FINNISH, None), (ENGLISH, CHINESE, None), ("Yes", "Kyllä", None), ("No", "不", None),
        ("", FINNISH, "empty side"), (ENGLISH, " \t\n\xa0", "empty side"), (ENGLISH, "\u200b\ufeff", "empty side"),
        ("\0", FINNISH, "empty side"), (ENGLISH, "\u3164\u2800", "empty side"), (ENGLISH, "\u0301", "empty side"),
        (ENGLISH, ENGLISH, "identical sides"), (ENGLISH, ENGLISH.upper() + " !", "identical sides"),
        ("?!", "?!", "identical sides"), ("?!", "!?", "mostly not letters"), ("ＡＢＣ", "abc", "identical sides"),
        (ENGLISH, "a", "length ratio"), (ENGLISH * 80, FINNISH * 80, "too long"), (ENGLISH, "灯", "length ratio"),
        ("12:30 - 14:00", "12.30–14.00", "identical sides"), ("12:30 - 14:00", "kello 12", "mostly not letters"),
        ("---------", "- - - -  -", "mostly not letters"), ("😀😀", "😀", "mostly not letters"),
        ("See RFC 2616, 5.1.2", "Katso RFC 2616, 5.1.2", None), ("مرحبا بالعالم", "Hello, world", None),
        ("नमस्ते दुनिया", "Hello, world", None), ("สวัสดีชาวโลก", "Hello, world", None),
        ("안녕하세요 세계", "Hello, world", None), ("こんにちは、世界", "Hello, world", None),
    ],
)  # fmt: skip
def test_what_is_left_out_by_default(text: str, other: str, reason: str | None) -> None:
    assert reason_of(text, other) == reason
    assert reason_of(other, text) == reason


@pytest.mark.parametrize(
    ("text", "other", "languages", "reason"),
    [
        (ENGLISH, CHINESE, ("eng_Latn", "zho_Hans"), None),
        (CHINESE, ENGLISH, ("eng_Latn", "zho_Hans"), "wrong script"),
        (ENGLISH, "The keeper of the lighthouse went up the stairs.", ("eng_Latn", "zho_Hant"), "wrong script"),
        (ENGLISH, FINNISH, ("en", "ru"), "wrong script"),
        (ENGLISH, FINNISH, ("en", "sv"), None),
        (ENGLISH, FINNISH, ("xx", "yy"), None),
        # Too few letters to tell, and a translation full of names.
        ("The GIMP", "GIMP", ("eng_Latn", "zho_Hans"), None),
        ("Printers: LaserJet 4100", "打印机 LaserJet 4100 系列", ("eng_Latn", "zho_Hans"), None),
    ],
)
def test_sides_in_the_wrong_script_are_left_out_by_default(
    text: str, other: str, languages: tuple[str, str], reason: str | None
) -> None:
    assert reason_of(text, other, languages) == reason
    assert reason_of(text, other, languages, check_language="off") is None


def test_the_first_of_several_reasons_counts_in_the_documented_order() -> None:
    long, held = "wörter " * 800, "held out sentence number one of the probe set"
    probe = ProbeSet([held, "another held out sentence that nobody has seen"])
    texts = ["", ENGLISH, "ab", long, ENGLISH, "1234567890 ab", CHINESE, held, held.replace("one", "two"), ENGLISH]
    others = ["", ENGLISH, "cd", long + "x", "yksi", "1234567890 cd", ENGLISH, FINNISH, FINNISH, FINNISH]
    wanted = PairFilters(min_characters=3, check_language="script")
    keep, reasons = PairFilter(wanted, probe=probe).apply(texts, others, "eng_Latn", "fin_Latn")
    assert keep.tolist() == [False] * 9 + [True]
    expected = [reason for reason in REASONS if reason != "wrong language"]
    assert list(reasons) == expected
    assert set(reasons.values()) == {1}
    # Everything wrong at once: the first question decides.
    keep, reasons = PairFilter(wanted, probe=ProbeSet(["12"])).apply(["12"], [" "], "zh", "zh")
    assert reasons == {"empty side": 1}


def test_either_side_in_the_probe_set_is_enough() -> None:
    probe = ProbeSet([ENGLISH, FINNISH])
    texts = [ENGLISH, "Something else, of no interest.", "Something else", "Something else here"]
    others = ["Jotain muuta, joka on toista.", FINNISH.upper(), FINNISH.replace("kuusi", "kuus"), "Jotain aivan muuta"]
    keep, reasons = PairFilter(PairFilters(max_length_ratio=None), probe=probe).apply(texts, others)
    assert keep.tolist() == [False, False, False, True]
    assert reasons == {"in the probe set": 2, "near the probe set": 1}


def test_languages_may_differ_from_pair_to_pair() -> None:
    texts, others = [ENGLISH] * 3, [FINNISH, FINNISH, CHINESE]
    pair_filter = PairFilter(PairFilters())
    keep, reasons = pair_filter.apply(texts, others, "eng_Latn", ["fin_Latn", "rus_Cyrl", "zho_Hans"])
    assert keep.tolist() == [True, False, True]
    assert reasons == {"wrong script": 1}
    with pytest.raises(ValueError, match="2 languages for 3 texts"):
        pair_filter.apply(texts, others, "eng_Latn", ["fin_Latn"] * 2)


def test_lists_of_unequal_length_and_what_is_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 others"):
        PairFilter(PairFilters()).apply(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="NoneType, not str"):
        PairFilter(PairFilters()).apply(["a"], [None])  # type: ignore[list-item]


def test_no_pairs_are_no_trouble() -> None:
    keep, reasons = PairFilter(PairFilters(), probe=ProbeSet([ENGLISH])).apply([], [], [], [])
    assert keep.tolist() == [] and keep.dtype == bool and reasons == {}


def test_a_megabyte_a_side_is_filtered() -> None:
    texts = ["word " * 200_000, "中" * 1_000_000, "\u0301" * 1_000_000, " " * 1_000_000]
    others = ["sana " * 200_000, "文" * 1_000_000, FINNISH, FINNISH]
    wanted = PairFilters(max_characters=None)
    keep, reasons = PairFilter(wanted, probe=ProbeSet([ENGLISH])).apply(texts, others, "en", "fi")
    assert keep.tolist() == [True, False, False, False]
    assert reasons == {"wrong script": 1, "empty side": 2}


def test_settings_go_through_json() -> None:
    wanted = PairFilters(min_characters=3, max_characters=None, max_length_ratio=2.5, check_language="off")
    assert PairFilters(**json.loads(json.dumps(dataclasses.asdict(wanted)))) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_characters": -1}, {"max_characters": 0}, {"max_tokens": 0}, {"max_length_ratio": 0.5},
        {"max_length_ratio": float("nan")}, {"min_letter_fraction": 1.5}, {"min_letter_fraction": -0.1},
        {"check_language": "eld"}, {"min_characters": 10, "max_characters": 9},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        PairFilters(**wrong)


def test_pairs_with_more_tokens_than_allowed_on_a_side_are_told() -> None:
    assert within_token_limit([5, 6, 0], np.array([6, 7, 1]), 6).tolist() == [True, False, True]
    assert within_token_limit([5], [10**9], None).tolist() == [True]
    assert within_token_limit([], [], 6).tolist() == []

"""What is left of a text when it is compared, against Python's own Unicode functions."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_xalign.data import folding

# Characters that texts are likely to be damaged with, and any other.
ODD = (
    "\0\t\n\r\x85\xa0\xad\u0301\u0323\u0315\u05ae\u0640\u0e33\u0e48\u115f\u1160\u180e\u200b\u200d\u200f\u2028\u2800\u3000"
    "\u3099\u3164\ufe0f\ufeff\uffa0\ufdfa\ufb01\U0001f468\U000e0041\U0010ffff"
)
TEXT = st.text(
    st.one_of(
        st.sampled_from("abcABC 12.,-'éßİŉǰΰ中文がガｶﾞｱ　한글ﬁⅧ½กขาคำ မ្សា אבشكل"),
        st.sampled_from(ODD),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)
SHOW_NOTHING = "\u034f\u0640\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u180f\u2065\u3164\uffa0"
UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
IDEOGRAPHIC = ("CJK UNIFIED", "CJK COMPAT", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "IDEOGRAPHIC")


def plain_kind(character: str) -> str:
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    code_point = ord(character)
    if (
        category == "Cf" or character in SHOW_NOTHING or 0xFE00 <= code_point <= 0xFE0F
        or 0xFFF0 <= code_point <= 0xFFF8 or 0xE0000 <= code_point <= 0xE0FFF
    ):  # fmt: skip
        return "nothing"
    if unicodedata.combining(character):
        return "mark"
    if category == "Cc" or category[0] in "ZPS":
        return "break"
    if category[0] == "M":
        return "mark"
    if category[0] == "L" and name.removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").startswith(IDEOGRAPHIC):
        return "ideograph"
    # Ideographs newer than this Python's Unicode lie in planes 2 and 3.
    if 0x20000 <= code_point <= 0x33FFF and not 0x2F800 <= code_point <= 0x2FA1F:
        return "ideograph"
    return "unspaced" if category[0] == "L" and name.startswith(UNSPACED) else "letter"


def plain_loose_fold(text: str) -> str:
    """The definition, letter by letter."""

    def change(character: str) -> str:
        character = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", character).casefold())
        return unicodedata.normalize("NFKD", character.casefold())

    words, parted = "", True
    previous = ""
    # NFD of what is decomposed only brings marks into order.
    for character in unicodedata.normalize("NFD", "".join(map(change, text))):
        kind = plain_kind(character)
        if kind == "nothing":
            continue
        if kind == "break":
            parted = True
            continue
        if kind == "mark" and (parted or not previous):
            kind = "letter"
        if kind != "mark":
            if previous and (
                "ideograph" in (kind, previous) or (parted and kind == previous == "letter")
            ):
                words += " "
            previous = kind
        parted = False
        words += character
    return f" {words} " if words else ""


def plain_exact_fold(text: str) -> str:
    words = unicodedata.normalize("NFD", text).split()
    return f" {' '.join(words)} " if words else ""


@settings(max_examples=400, deadline=None)
@given(text=TEXT)
@example(text="")
@example(text="ﷺ" * 50)
@example(text="a" + "\u0301\u0323" * 200)
@example(text="\u0345\u0301")
def test_loose_folding_is_its_definition(text: str) -> None:
    assert folding.loose_folding().fold([text]) == [plain_loose_fold(text)]


@settings(max_examples=400, deadline=None)
@given(text=TEXT)
@example(text="a \u0301")
def test_exact_folding_is_canonical_decomposition_and_one_space_for_white_space(text: str) -> None:
    # A mark after a space is put in order by itself, as in the whole text.
    assert folding.exact_folding().fold([text]) == [plain_exact_fold(text)]


def test_every_code_point_beside_letters_is_folded_as_defined() -> None:
    points = [*range(0xD800), *range(0xE000, 0x34000), *range(0x34000, 0x110000, 997), *range(0xDFFF0, 0xE1010)]
    texts = [f"x{chr(point)}x" for point in points]
    for fold, plain in ((folding.loose_folding(), plain_loose_fold), (folding.exact_folding(), plain_exact_fold)):
        for text, folded in zip(texts, fold.fold(texts), strict=True):
            assert folded == plain(text), ascii(text)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_all_canonical_forms_of_a_text_fold_alike(text: str) -> None:
    # The Greek iota below folds to a letter, in whose way marks then are.
    if "\u0345" in unicodedata.normalize("NFD", text):
        return
    forms = [text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]
    for kind in (folding.loose_folding(), folding.exact_folding()):
        assert len(set(kind.fold(forms))) == 1


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_folding_twice_changes_nothing_more(text: str) -> None:
    loose = folding.loose_folding()
    (once,) = loose.fold([text])
    # A mark that stood by itself may find a letter before it once the signs between are gone; ideographs part words.
    assert loose.fold(loose.fold([once])) == loose.fold([once])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"), ("ﬁle №5", "FILE NO5"), ("你好，世界", "你 好 世 界。"), ("ｶﾞ", "ガ"),
        ("ABC１２", "abc12"), ("mitt\xaderand", "mitterand"), ("كتــاب", "كتاب"), ("สวัสดี ชาวโลก", "สวัสดีชาวโลก"),
        ("STRASSE", "straße"), ("a\u200bb", "ab"), ("한글", unicodedata.normalize("NFD", "한글")),
    ],
)  # fmt: skip
def test_what_makes_no_difference(one: str, other: str) -> None:
    loose = folding.loose_folding()
    assert loose.fold([one]) == loose.fold([other]) != [""]


@pytest.mark.parametrize(
    ("one", "other"),
    [("resume", "résumé"), ("can not", "cannot"), ("no 5", "no 6"), ("かき", "がき"), ("ab c", "a bc"), ("की", "का")],
)
def test_what_makes_a_difference(one: str, other: str) -> None:
    loose = folding.loose_folding()
    assert loose.fold([one]) != loose.fold([other])


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, max_size=5))
def test_characters_are_counted_once_each(texts: list[str]) -> None:
    counts = folding.count_characters(texts)
    assert counts.shape == (len(texts), folding.NUM_COLUMNS)
    assert counts.sum(axis=1).tolist() == [len(text) for text in texts]
    for text, row in zip(texts, counts, strict=True):
        # Unassigned code points and private ones are taken for letters.
        letters = sum(
            (unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mc", "Co", "Cn"))
            and plain_kind(character) != "nothing"
            for character in text
        )
        assert row[folding.FIRST_SCRIPT :].sum() == letters


def test_letters_are_counted_under_their_script() -> None:
    samples = {
        "Latn": "aÉßＡ", "Cyrl": "Жё", "Grek": "Ωά", "Arab": "كت", "Hebr": "אב", "Deva": "कीा", "Hani": "中文々𠀀",
        "Kana": "かカｶー", "Hang": "한글ᄀ", "Thai": "กข", "Geor": "ქა", "Armn": "հա", "Ethi": "አማ", "Khmr": "ខ្មែ"[0],
    }  # fmt: skip
    for script, text in samples.items():
        (row,) = folding.count_characters([text])
        assert row[folding.FIRST_SCRIPT + folding.SCRIPTS.index(script)] == len(text), script


def test_texts_that_are_not_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes, not str"):
        folding.loose_folding().fold([b"bytes"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="NoneType, not str"):
        folding.count_characters(["fine", None])  # type: ignore[list-item]


def test_a_megabyte_of_anything_is_folded() -> None:
    loose = folding.loose_folding()
    assert loose.fold(["word " * 200_000]) == [" " + "word " * 200_000]
    assert loose.fold(["中" * 1_000_000]) == [" " + "中 " * 1_000_000]
    assert len(loose.fold(["ﷺ" * 100_000])[0]) > 1_500_000
    assert loose.fold(["😀" * 1_000_000]) == [""]

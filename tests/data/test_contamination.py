"""Held-out sentences kept out of training text, against plain Python."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_xalign.data.contamination import CLEAN, IN, NEAR, ProbeSet
from megatron_xalign.data.folding import loose_folding
from megatron_xalign.errors import ConfigError, CorpusError

SENTENCES = [
    "The lighthouse keeper climbed the stairs every evening at six o'clock.",
    "Majakanvartija kiipesi portaat joka ilta kello kuusi.",
    "灯塔看守人每天晚上六点爬上楼梯，然后点亮灯火。",
    "صعد حارس المنارة الدرج كل مساء في الساعة السادسة.",
    "ผู้ดูแลประภาคารขึ้นบันไดทุกเย็นเวลาหกโมง",
]


def grams(folded: str) -> set[str]:
    return {folded[start : start + 5] for start in range(max(len(folded) - 4, 1))}


def plain_touch(text: str, sentences: list[str], near: float, min_contained: int) -> int:
    """The definition, for scripts that part words by spaces or are ideographs."""
    (folded,) = loose_folding().fold([text])
    strongest = CLEAN
    for held in loose_folding().fold(sentences):
        if not folded:
            continue
        if folded == held or (len(held) - 2 >= min_contained and held in folded):
            return IN
        shared, either = len(grams(folded) & grams(held)), len(grams(folded) | grams(held))
        if shared >= near * either and len(folded) <= 2 * len(held):
            strongest = NEAR
    return strongest


WORD = st.sampled_from(["aa", "ab", "ba", "bb", "aab", "abb", "aaa", "中", "文", "a", "b", "ab."])
LINE = st.lists(WORD, min_size=1, max_size=8).map(" ".join)


@settings(max_examples=500, deadline=None)
@given(
    sentences=st.lists(LINE, min_size=1, max_size=5),
    texts=st.lists(st.lists(WORD, max_size=16).map(" ".join), max_size=6),
    near=st.sampled_from([0.5, 0.6, 0.7, 0.9, 1.0]),
    min_contained=st.sampled_from([1, 2, 5, 10]),
)
@example(sentences=["a b", "a b c"], texts=["x a b c y", "a b", "ab"], near=0.7, min_contained=1)
def test_touch_is_its_definition_where_all_is_alike(
    sentences: list[str], texts: list[str], near: float, min_contained: int
) -> None:
    probe = ProbeSet(sentences, near=near, min_contained_characters=min_contained)
    expected = [plain_touch(text, sentences, near, min_contained) for text in texts]
    assert probe.touch(texts).tolist() == expected
    assert probe.contaminates(texts).tolist() == [touch != CLEAN for touch in expected]


def edited(draw: random.Random, sentence: str, edits: int) -> str:
    """A sentence with characters changed, taken out or put in."""
    characters = list(sentence)
    for _ in range(edits):
        place = draw.randrange(len(characters))
        characters[place : place + draw.randint(0, 2)] = draw.choice(["", "x", "yz", " ", "中", "Q"])
    return "".join(characters)


def test_touch_is_its_definition_for_edited_sentences() -> None:
    draw = random.Random(4)
    words = [*re.findall(r"\w+", " ".join(SENTENCES[:2])), "sea", "meri", "harbour", "2024", "tuuli", "über"]
    sentences = [*SENTENCES[:4], *(" ".join(draw.choice(words) for _ in range(draw.randint(4, 14))) for _ in range(60))]
    texts = []
    for _ in range(1500):
        text = edited(draw, draw.choice(sentences), draw.randint(0, 9))
        if draw.random() < 0.3:
            text = f"{draw.choice(words)} {text}! {draw.choice(words)} {draw.choice(words)}"
        texts.append(text)
    probe = ProbeSet(sentences)
    found = probe.touch(texts).tolist()
    assert found == [plain_touch(text, sentences, 0.7, 24) for text in texts]
    assert min(found.count(kind) for kind in (CLEAN, NEAR, IN)) > 100


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_held_out_sentence_is_found_in_any_dress(sentence: str) -> None:
    probe = ProbeSet(SENTENCES)
    dresses = [
        sentence, sentence.upper(), f"  {sentence}\n", sentence.rstrip(".。"), f"“{sentence}”",
        f"\ufeff{sentence}\u200b", sentence.replace(" ", "\xa0"), "\0" + sentence,
        f"1. Before it. {sentence} And after it, a lot more. " * 3, "word " * 50_000 + sentence,
    ]  # fmt: skip
    assert probe.touch(dresses).tolist() == [IN] * len(dresses)


def test_in_scripts_without_spaces_a_sentence_is_found_between_other_letters() -> None:
    probe = ProbeSet(SENTENCES)
    thai, chinese = SENTENCES[4], SENTENCES[2]
    texts = [f"เมื่อวาน{thai}และกลับบ้าน", f"昨天{chinese[:-1]}他们说", thai[:20] + " " + thai[20:], " ".join(chinese)]
    assert probe.touch(texts).tolist() == [IN] * 4


def test_part_of_a_word_is_not_the_sentence() -> None:
    probe = ProbeSet(["the keeper of the light house"])
    texts = [
        "bathe keeper of the light house and many other things as well",
        "the keeper of the light houses of the north sea",
    ]
    assert probe.touch(texts).tolist() == [CLEAN, CLEAN]
    assert probe.touch(["so the keeper of the light house, he said, and many other things"]).tolist() == [IN]


def test_short_sentences_are_found_by_themselves_only() -> None:
    probe = ProbeSet(["See the table.", SENTENCES[0]])
    texts = ["See the table", "See the table below for what it says about lighthouses.", "see table"]
    assert probe.touch(texts).tolist() == [IN, CLEAN, CLEAN]
    found = ProbeSet(["See the table."], min_contained_characters=5).touch(texts)
    assert found.tolist() == [IN, IN, CLEAN]


def test_texts_without_letters_touch_nothing() -> None:
    assert ProbeSet(SENTENCES).touch(["", " ", "?!", "😀", "\u200b"]).tolist() == [CLEAN] * 5
    assert ProbeSet(SENTENCES).touch([]).tolist() == []


def test_a_probe_file_is_read_with_all_its_languages(tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    lines = [
        {"id": "1", "texts": {"eng_Latn": SENTENCES[0], "fin_Latn": SENTENCES[1]}},
        {"id": "2", "texts": {"zho_Hans": SENTENCES[2]}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    probe = ProbeSet.read(path)
    assert probe.sentences == 3
    assert probe.touch(SENTENCES).tolist() == [IN, IN, IN, CLEAN, CLEAN]


def test_the_hash_is_of_the_sentences_and_settings() -> None:
    hashes = [
        ProbeSet(SENTENCES).sha256, ProbeSet(SENTENCES[:-1]).sha256, ProbeSet(SENTENCES, near=0.8).sha256,
        ProbeSet(SENTENCES, min_contained_characters=30).sha256,
    ]  # fmt: skip
    assert len(set(hashes)) == 4
    assert ProbeSet(list(SENTENCES)).sha256 == hashes[0]


def test_probes_that_cannot_be_looked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no sentence"):
        ProbeSet([])
    with pytest.raises(CorpusError, match="'!!' has no letter"):
        ProbeSet([SENTENCES[0], "!!"])
    with pytest.raises(ConfigError, match=r"near=0\.3"):
        ProbeSet(SENTENCES, near=0.3)
    with pytest.raises(ConfigError, match="min_contained_characters=0"):
        ProbeSet(SENTENCES, min_contained_characters=0)
    path = tmp_path / "probe.jsonl"
    path.write_text('{"id": "1", "texts": {"eng_Latn": "…"}}\n')
    with pytest.raises(CorpusError, match=r"probe\.jsonl: .*no letter"):
        ProbeSet.read(path)
    path.write_text("")
    with pytest.raises(CorpusError, match=r"probe\.jsonl: .*no sentence"):
        ProbeSet.read(path)
    with pytest.raises(CorpusError, match="does not exist"):
        ProbeSet.read(tmp_path / "none.jsonl")

"""Duplicates over parts: keys, key files, and who goes."""

from __future__ import annotations

import random
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign.data import duplicates, key_file
from megatron_xalign.data.duplicates import (
    KeyFileWriter,
    document_keys,
    read_keys,
    resolve_duplicates,
    rows_per_band,
)
from megatron_xalign.data.folding import loose_folding
from megatron_xalign.errors import ConfigError, FormatError

MEGABYTE = 1 << 20
TEXT = st.text(st.one_of(st.sampled_from("ab \t\u0301é"), st.characters(exclude_categories=["Cs"])), max_size=6)


def plain_exact(text: str) -> str:
    """What "the same text" means: canonical form and white space make no difference."""
    return " ".join(unicodedata.normalize("NFD", text).split()) or f"white space {text!r}"


def write_parts(folder: Path, parts: Sequence[np.ndarray], near: bool) -> list[Path]:
    paths = []
    for index, keys in enumerate(parts):
        paths.append(folder / f"part-{index:05d}.keys")
        with KeyFileWriter(paths[-1], near=near) as writer:
            for begin in range(0, len(keys), 7):
                writer.append(keys[begin : begin + 7])
    return paths


def resolve(
    folder: Path, parts: Sequence[np.ndarray], near: bool, memory_bytes: int = MEGABYTE, threshold: float = 0.8
) -> duplicates.Duplicates:
    folder.mkdir(parents=True, exist_ok=True)
    return resolve_duplicates(
        write_parts(folder, parts, near), near=near, work_folder=folder / "work", memory_bytes=memory_bytes,
        threshold=threshold,
    )  # fmt: skip


def dropped(found: duplicates.Duplicates, num_parts: int) -> list[bool]:
    return [bool(drop) for part in range(num_parts) for drop in found.drop(part)]


def cut(keys: np.ndarray, at: Sequence[int]) -> list[np.ndarray]:
    return np.split(keys, sorted(at))


# Keys


@settings(max_examples=300, deadline=None)
@given(documents=st.lists(st.tuples(TEXT, TEXT), max_size=12))
def test_keys_are_equal_exactly_for_pairs_of_the_same_texts(documents: list[tuple[str, str]]) -> None:
    keys = document_keys([a for a, _ in documents], [b for _, b in documents], near=False)["exact"]
    same = [tuple(sorted((plain_exact(a), plain_exact(b)))) for a, b in documents]
    for i in range(len(documents)):
        for j in range(i):
            assert (keys[i] == keys[j]).all() == (same[i] == same[j])


def test_a_document_of_one_text_is_no_duplicate_of_a_pair() -> None:
    texts = ["one", "two", "one"]
    single, pairs = document_keys(texts, near=True), document_keys(texts, ["", "one", "one"], near=True)
    exact = [*map(tuple, single["exact"].tolist()), *map(tuple, pairs["exact"].tolist())]
    assert len(set(exact)) == 5


def plain_key(text: str) -> tuple[int, int]:
    """The formula of csrc/include/xalign/minhash.h in Python's integers."""
    prime, mask = (1 << 61) - 1, (1 << 64) - 1
    digits = []
    for begin in range(0, len(text), 2):
        first, *second = text[begin : begin + 2]
        digits.append(ord(first) + 1 + (ord(second[0]) + 1 << 21 if second else 0))
    words = []
    for base in (0x243F6A8885A308D3 >> 3, 0xB7E151628AED2A6A >> 3):
        number = pow(base, len(digits), prime)
        for power, digit in enumerate(reversed(digits)):
            number = (number + digit * pow(base, power, prime)) % prime
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & mask
        number = (number ^ number >> 27) * 0x94D049BB133111EB & mask
        words.append(number ^ number >> 31)
    return words[0], words[1]


@pytest.mark.parametrize("text", ["", " \t", "a", "Hello", "  Hello  world ", "你好 世界", "\0", "e\u0301", "x" * 1001])
def test_keys_are_the_stated_formula(text: str) -> None:
    folded = " ".join(unicodedata.normalize("NFD", text).split())
    expected = plain_key(f" {folded} " if folded else text)
    assert tuple(document_keys([text], near=False)["exact"][0].tolist()) == expected


def grams(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(max(len(text) - 4, 1))} if text else set()


def jaccard(one: Sequence[str], other: Sequence[str]) -> float:
    sets = [set().union(*map(grams, loose_folding().fold(list(document)))) for document in (one, other)]
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


WORDS = [
    "tuuli", "meri", "saaristo", "river", "mountain", "lighthouse", "中国", "历史", "سلام", "книга", "Straße", "über",
    "a", "to", "in", "2024", "kaupunki", "winter", "harbour", "letters", "green", "walked", "slowly", "understand",
    "reading",
]  # fmt: skip


def pairs_with_edits(seed: int, families: int, copies: int) -> list[tuple[str, str]]:
    """Families of pairs that differ by a few words from one another."""
    draw = random.Random(seed)
    documents = []
    for _ in range(families):
        sides = [[draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(draw.randint(4, 25))] for _ in range(2)]
        for copy in range(copies):
            for _ in range(copy):
                side = draw.choice(sides)
                side[draw.randrange(len(side))] = draw.choice(WORDS) + str(draw.randrange(50))
            documents.append((" ".join(sides[0]), " ".join(sides[1])))
    draw.shuffle(documents)
    return documents


def words(draw: random.Random, number: int) -> list[str]:
    """Words that hardly another document has."""
    letters = "abcdefghijklmnopqrstuvwxyz中文字漢"
    return ["".join(draw.choice(letters) for _ in range(draw.randint(3, 9))) for _ in range(number)]


@pytest.mark.parametrize("number", [2, 10, 40, 400])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_sketches_estimate_the_jaccard_similarity_of_sets_of_any_size(number: int, kept: float) -> None:
    draw = random.Random(number * 10 + round(10 * kept))
    sides: list[list[str]] = [[], [], [], []]
    for _ in range(300):
        for first, second in ((0, 1), (2, 3)):
            text = words(draw, number)
            sides[first].append(" ".join(text))
            sides[second].append(" ".join(word if draw.random() < kept else words(draw, 1)[0] for word in text))
    one, other = (document_keys(sides[side], sides[side + 2], near=True)["sketch"] for side in (0, 1))
    similarity = np.array([jaccard((a, c), (b, d)) for a, b, c, d in zip(*sides, strict=True)])
    error = ((one == other).mean(axis=1) - 1 / 256) / (1 - 1 / 256) - similarity
    deviation = np.sqrt((similarity * (1 - similarity) / 128).mean())
    assert abs(error.mean()) < 5 * deviation / 300**0.5
    assert np.sqrt((error**2).mean()) < 1.15 * deviation


def test_sketches_ignore_what_makes_no_difference_and_which_side_is_which() -> None:
    one = document_keys(["Hello, World!", "ab"], ["Hei, maailma", "cd"], near=True)
    other = document_keys(["hei  MAAILMA", "cd"], ["hello world", "ab"], near=True)
    assert (one["sketch"] == other["sketch"]).all()
    assert (one["exact"][0] != other["exact"][0]).any() and (one["exact"][1] == other["exact"][1]).all()


def test_documents_without_words_are_alike_only_if_equal() -> None:
    keys = document_keys(["!!", "??", "!!", "", " "], near=True)
    agreeing = (keys["sketch"] == keys["sketch"][0]).sum(axis=1)
    assert (agreeing[[0, 2]] == 128).all() and (agreeing[[1, 3, 4]] < 10).all()


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_has_keys(text: str) -> None:
    keys = document_keys([text, text], [text, text], near=True)
    assert keys[0] == keys[1]


def test_a_document_of_a_megabyte_has_keys() -> None:
    draw = random.Random(3)
    text = " ".join(draw.choice(WORDS) + str(draw.randrange(10**6)) for _ in range(100_000))
    keys = document_keys([text, text + " end"], near=True)
    assert (keys["exact"][0] != keys["exact"][1]).any()
    assert (keys["sketch"][0] == keys["sketch"][1]).mean() > 0.95


# Key files


@pytest.mark.parametrize("near", [False, True])
def test_a_key_file_holds_what_was_appended(tmp_path: Path, near: bool) -> None:
    keys = document_keys([str(number) for number in range(20)], near=near)
    (path,) = write_parts(tmp_path, [keys], near)
    found = read_keys(path)
    assert found.dtype == keys.dtype and (found == keys).all()
    assert path.stat().st_size == 72 + 20 * (144 if near else 16)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_key_file_of_no_documents_is_one(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, [document_keys([], near=True)], near=True)
    assert len(read_keys(path)) == 0


def test_a_key_file_left_unfinished_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), KeyFileWriter(tmp_path / "a.keys", near=False) as writer:
        writer.append(document_keys(["one"], near=False))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_keys_of_the_wrong_kind_are_not_appended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype"), KeyFileWriter(tmp_path / "a.keys", near=True) as writer:
        writer.append(document_keys(["one"], near=False))


def test_every_flipped_byte_and_every_cut_of_a_key_file_is_noticed(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, [document_keys(["one", "two"], ["eins", "zwei"], near=True)], near=True)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(FormatError):
            read_keys(path)
    for length in (0, 1, 71, 72, 73, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_keys(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="documents need"):
        read_keys(path)
    path.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        read_keys(path)


def test_a_header_that_claims_endless_documents_takes_no_memory(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, [document_keys(["one"], near=False)], near=False)
    content = bytearray(path.read_bytes())
    content[16:24] = (2**64 - 1).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(FormatError, match="documents need"):
        read_keys(path)


def test_keys_made_with_another_unicode_version_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file.unicodedata, "unidata_version", "3.2.0")
    (path,) = write_parts(tmp_path, [document_keys(["one"], near=False)], near=False)
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"made with Unicode 3\.2\.0"):
        read_keys(path)


# Who goes


@settings(max_examples=60, deadline=None)
@given(data=st.data(), texts=st.lists(st.sampled_from(["a", "A", "b", " a", "é", "e\u0301", ""]), max_size=25))
def test_all_but_the_first_of_equal_documents_go(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, texts: list[str]
) -> None:
    others = [data.draw(st.sampled_from(["x", "y", "a"])) for _ in texts]
    parts = cut(document_keys(texts, others, near=False), data.draw(st.lists(st.integers(0, len(texts)), max_size=4)))
    found = resolve(tmp_path_factory.mktemp("keys"), parts, near=False)
    seen, expected = set(), []
    for text, other in zip(texts, others, strict=True):
        key = tuple(sorted((plain_exact(text), plain_exact(other))))
        expected.append(key in seen)
        seen.add(key)
    assert dropped(found, len(parts)) == expected
    assert found.total == Counter({"duplicate": sum(expected)} if any(expected) else {})
    assert sum((found.reasons(part) for part in range(len(parts))), Counter()) == found.total


def plain_near(keys: np.ndarray, threshold: float) -> list[str]:
    """The definition over sketches, pair by pair."""
    rows = rows_per_band(threshold)
    verdicts = []
    exact = [tuple(key.tolist()) for key in keys["exact"]]
    for later in range(len(keys)):
        verdict = "duplicate" if exact[later] in exact[:later] else ""
        for earlier in range(later):
            if verdict:
                break
            same = keys["sketch"][later] == keys["sketch"][earlier]
            estimate = (same.mean() - 1 / 256) / (1 - 1 / 256)
            if same.reshape(-1, rows).all(axis=1).any() and estimate >= threshold - 1e-12:
                verdict = "near duplicate"
        verdicts.append(verdict)
    return verdicts


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_are_those_a_loop_over_all_pairs_finds(tmp_path: Path, threshold: float, seed: int) -> None:
    documents = pairs_with_edits(seed, families=40, copies=6)
    documents += documents[::5]
    keys = document_keys([a for a, _ in documents], [b for _, b in documents], near=True)
    expected = plain_near(keys, threshold)
    found = resolve(tmp_path, cut(keys, [50, 51, 200]), near=True, threshold=threshold)
    assert dropped(found, 4) == [bool(verdict) for verdict in expected]
    assert found.total == Counter(filter(None, expected))
    assert found.total["near duplicate"] > (5 if threshold < 1 else -1)
    assert found.total["duplicate"] >= len(documents) // 6


def test_near_duplicates_are_those_of_real_jaccard_similarity_but_for_the_estimate(tmp_path: Path) -> None:
    documents = pairs_with_edits(seed=7, families=150, copies=4)
    keys = document_keys([a for a, _ in documents], [b for _, b in documents], near=True)
    drop = dropped(resolve(tmp_path, [keys], near=True), 1)
    sets = [set().union(*map(grams, loose_folding().fold(list(document)))) for document in documents]
    best = [
        max((len(own & other) / len(own | other) for other in sets[:index]), default=0.0)
        for index, own in enumerate(sets)
    ]
    clearly_near = [drop for drop, similarity in zip(drop, best, strict=True) if similarity >= 0.88]
    clearly_not = [drop for drop, similarity in zip(drop, best, strict=True) if similarity <= 0.7]
    assert len(clearly_near) > 40 and len(clearly_not) > 40
    assert sum(clearly_near) >= 0.97 * len(clearly_near)
    assert not any(clearly_not)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), at=st.lists(st.integers(0, 120), max_size=6), capacity=st.integers(1, 400))
def test_neither_parts_nor_memory_change_the_answer(
    tmp_path_factory: pytest.TempPathFactory, seed: int, at: list[int], capacity: int
) -> None:
    documents = pairs_with_edits(seed, families=20, copies=5)
    documents += documents[:20]
    keys = document_keys([a for a, _ in documents], [b for _, b in documents], near=True)
    whole = dropped(resolve(tmp_path_factory.mktemp("whole"), [keys], near=True, memory_bytes=64 * MEGABYTE), 1)
    parts = cut(keys, at)
    with pytest.MonkeyPatch.context() as patch:
        # A megabyte, the least allowed, then holds only so many entries.
        patch.setattr(duplicates, "_BYTES_PER_ENTRY", MEGABYTE // (2 * capacity))
        patch.setattr(duplicates, "_BYTES_PER_EXACT_ENTRY", MEGABYTE // (2 * capacity))
        found = resolve(tmp_path_factory.mktemp("cut"), parts, near=True)
    assert dropped(found, len(parts)) == whole
    assert 20 <= sum(whole) < 120


def test_in_a_crowded_band_a_document_is_compared_with_the_first_ones_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All share the first band; documents 3 and 4 are alike, and so are 0 and 5.
    rng = np.random.default_rng(0)
    keys = np.zeros(6, dtype=key_file.key_dtype(near=True))
    keys["exact"] = rng.integers(0, 2**63, (6, 2))
    keys["sketch"] = rng.integers(0, 256, (6, 128))
    keys["sketch"][4, 8:] = np.where(np.arange(120) % 8 == 0, 0, keys["sketch"][3, 8:])
    keys["sketch"][5, 8:] = np.where(np.arange(120) % 8 == 0, 1, keys["sketch"][0, 8:])
    keys["sketch"][:, :8] = 7
    assert dropped(resolve(tmp_path / "all", [keys], near=True), 1) == [False] * 4 + [True] * 2
    monkeypatch.setattr(duplicates, "_MOST_COMPARED", 3)
    assert dropped(resolve(tmp_path / "three", [keys], near=True), 1) == [False] * 5 + [True]
    # The same when what was seen before has to be carried from one piece of a bucket to the next.
    monkeypatch.setattr(duplicates, "_BYTES_PER_ENTRY", MEGABYTE // 2)
    assert dropped(resolve(tmp_path / "carried", cut(keys, [2, 5]), near=True), 3) == [False] * 5 + [True]


def test_memory_does_not_grow_with_the_corpus_even_if_all_documents_are_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name, near in (("exact", False), ("near", True)):
        count = 60_000 if near else 400_000
        keys = np.zeros(count, dtype=key_file.key_dtype(near))
        # A third are one document, a third near one another, the others unlike any.
        keys["exact"] = rng.integers(0, 2**63, (count, 2))
        keys["exact"][::3] = 5
        if near:
            keys["sketch"] = rng.integers(0, 256, (count, 128))
            keys["sketch"][1::3, :112] = 9
        (path,) = write_parts_at_once(tmp_path / name, keys, near)
        tracemalloc.start()
        found = resolve_duplicates([path], near=near, work_folder=tmp_path / name / "work", memory_bytes=2 * MEGABYTE)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.total["duplicate"] == count // 3 + (count % 3 > 0) - 1
        assert found.total["near duplicate"] == (count // 3 - 1 if near else 0)
        # Twice for what NumPy makes in passing; the keys themselves are 6 and 8 megabytes.
        assert peak < 5 * MEGABYTE
        assert [item.name for item in (tmp_path / name / "work").iterdir()] == ["duplicates.verdicts"]


def write_parts_at_once(folder: Path, keys: np.ndarray, near: bool) -> list[Path]:
    with KeyFileWriter(folder / "a.keys", near=near) as writer:
        writer.append(keys)
    return [folder / "a.keys"]


def test_what_a_killed_run_left_in_the_work_folder_does_no_harm(tmp_path: Path) -> None:
    keys = document_keys(["a", "b", "a"], near=True)
    work = tmp_path / "work"
    (work / "buckets").mkdir(parents=True)
    (work / "buckets" / "000000").write_bytes(b"\1" * 1000)
    (work / "duplicates.verdicts").write_bytes(b"\2" * 3)
    assert dropped(resolve(tmp_path, [keys], near=True), 1) == [False, False, True]


def test_no_documents_and_no_parts_have_no_duplicates(tmp_path: Path) -> None:
    assert resolve(tmp_path / "none", [], near=True).total == Counter()
    found = resolve(tmp_path / "empty", [document_keys([], near=True)] * 2, near=True)
    assert found.drop(0).tolist() == found.drop(1).tolist() == []
    with pytest.raises(ValueError, match="part=2"):
        found.drop(2)


def test_near_duplicates_need_sketches(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, [document_keys(["a"], near=False)], near=False)
    with pytest.raises(FormatError, match="no sketches"):
        resolve_duplicates(paths, near=True, work_folder=tmp_path)


def test_keys_with_sketches_serve_for_exact_duplicates_too(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, [document_keys(["a", "a", "A"], near=True)], near=True)
    found = resolve_duplicates(paths, near=False, work_folder=tmp_path)
    assert found.drop(0).tolist() == [False, True, False]


@pytest.mark.parametrize("threshold", [0.0, 0.49, 1.01, float("nan")])
def test_a_threshold_that_cannot_be_found_is_refused(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ConfigError, match="Jaccard"):
        resolve(tmp_path, [], near=True, threshold=threshold)


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory_bytes"):
        resolve(tmp_path, [], near=False, memory_bytes=1000)


@pytest.mark.parametrize(("threshold", "rows"), [(1.0, 16), (0.95, 16), (0.9, 8), (0.8, 8), (0.7, 4), (0.5, 4)])
def test_bands_are_as_long_as_recall_allows(threshold: float, rows: int) -> None:
    assert rows_per_band(threshold) == rows
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.85

"""Controls of aligned pairs: the translation elsewhere, and the same tokens in all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_jobs import LANGUAGES, contents, documents, monolingual_job, pairs, pairs_job, write_lines

from megatron_xalign.data import pairing as pairing_module
from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.pairing import write_pairing
from megatron_xalign.data.preprocess import preprocess, run_job
from megatron_xalign.data.tokenizer import Tokenizer, train_tokenizer
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.token_file import check_token_file, read_token_file

Sides = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = {"eng_Latn": [item["text"] for item in documents(100, "eng_Latn")]}
    return Tokenizer.load(train_tokenizer(texts, tmp_path_factory.mktemp("t") / "tokenizer", 500))


@pytest.fixture
def aligned(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    lines = write_lines(tmp_path / "pairs.jsonl", pairs(500))
    preprocess(pairs_job([lines], tmp_path / "aligned", tokenizer.path))
    return tmp_path / "aligned"


def sides_of(prefix: Path) -> list[tuple[Sides, tuple[int, ...], list[str]]]:
    """For each document: ids of each language, ids of none, and the order of languages; token by token."""
    file = read_token_file(prefix)
    found = []
    for number, tokens in enumerate(file):
        sides: dict[str, list[int]] = {}
        others = []
        for token, language in zip(tokens.tolist(), file.language_ids(number).tolist(), strict=True):
            if language < 0:
                others.append(token)
            else:
                sides.setdefault(file.languages[language], []).append(token)
        found.append(({code: tuple(ids) for code, ids in sides.items()}, tuple(others), list(sides)))
    return found


def test_shuffled_pairs_have_the_side_of_another_pair_of_about_the_same_length(
    tmp_path: Path, aligned: Path, tokenizer: Tokenizer
) -> None:
    manifest = write_pairing(aligned, tmp_path / "shuffled", "shuffled", seed=5)
    before, after = sides_of(aligned), sides_of(tmp_path / "shuffled")
    assert len(before) == len(after) == 500
    differences = []
    for (own, others, order), (new, new_others, new_order) in zip(before, after, strict=True):
        assert new["eng_Latn"] == own["eng_Latn"] and new["fin_Latn"] != own["fin_Latn"]
        assert others == new_others and order == new_order
        differences.append(abs(len(new["fin_Latn"]) - len(own["fin_Latn"])))
    assert Counter(sides["fin_Latn"] for sides, _, _ in before) == Counter(sides["fin_Latn"] for sides, _, _ in after)
    lengths = [len(sides["fin_Latn"]) for sides, _, _ in before]
    assert np.mean(differences) < 0.05 * np.mean(lengths)
    assert manifest["pairing_facts"] == {
        "unmatched": 0,
        "same_text": 0,
        "relative_length_difference": pytest.approx(sum(differences) / sum(lengths), abs=1e-6),
    }
    assert manifest["tokens_by_language"] == read_token_file(aligned).manifest["tokens_by_language"]
    assert manifest["pairing"] == "shuffled" and manifest["pairs"] == 500
    assert check_token_file(tmp_path / "shuffled", tokenizer).good
    write_pairing(aligned, tmp_path / "again", "shuffled", seed=5)
    write_pairing(aligned, tmp_path / "other", "shuffled", seed=6)
    assert contents(tmp_path / "again", ["bin"]) == contents(tmp_path / "shuffled", ["bin"])
    assert contents(tmp_path / "other", ["bin"]) != contents(tmp_path / "shuffled", ["bin"])


def test_separated_sides_are_documents_of_their_own_one_language_after_the_other(
    tmp_path: Path, aligned: Path, tokenizer: Tokenizer
) -> None:
    manifest = write_pairing(aligned, tmp_path / "separated", "separated", seed=0)
    before, after = sides_of(aligned), sides_of(tmp_path / "separated")
    expected = [({code: sides[code]}, (tokenizer.eod,), [code]) for code in LANGUAGES for sides, _, _ in before]
    assert after == expected
    assert manifest["tokens_by_language"] == read_token_file(aligned).manifest["tokens_by_language"]
    assert manifest["documents"] == 1000 and manifest["pairs"] == 500 and manifest["origin"] == "parallel"
    assert check_token_file(tmp_path / "separated", tokenizer).good


@pytest.mark.parametrize("pairing", ["shuffled", "separated"])
def test_a_job_makes_what_the_verb_makes_and_pieces_change_nothing(
    tmp_path: Path, aligned: Path, tokenizer: Tokenizer, pairing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pairs_job(
        [tmp_path / "pairs.jsonl"], tmp_path / "job" / "x", tokenizer.path, pairing=pairing, part_bytes=9000
    )
    manifest = preprocess(job)
    monkeypatch.setattr(pairing_module, "_WRITTEN_DOCUMENTS", 7)
    (tmp_path / "verb").mkdir()
    made = write_pairing(aligned, tmp_path / "verb" / "x", pairing, seed=1234)
    assert contents(tmp_path / "job" / "x", ["bin", "idx", "spans"]) == contents(
        tmp_path / "verb" / "x", ["bin", "idx", "spans"]
    )
    assert made["recipe"] == manifest["recipe"] and made.get("pairing_facts") == manifest.get("pairing_facts")
    # Made by the verb, kept by the job.
    verb = pairs_job([tmp_path / "pairs.jsonl"], tmp_path / "verb" / "x", tokenizer.path, pairing=pairing)
    assert run_job(verb).figures is None


def test_pairs_of_several_languages_change_places_within_their_two(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = []
    for n, record in enumerate(pairs(300)):
        texts = record["texts"]
        if n % 3 == 0:
            texts = {"eng_Latn": texts["eng_Latn"], "deu_Latn": texts["fin_Latn"].replace("ä", "ö")}
        records.append({"id": str(n), "texts": texts})
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    fields = Fields(kind="pairs", languages=("deu_Latn", "eng_Latn", "fin_Latn"), pair_rule="all")
    preprocess(pairs_job([lines], tmp_path / "aligned", tokenizer.path, fields=fields))
    monkeypatch.setattr(pairing_module, "_CHUNK_DOCUMENTS", 60)
    facts = write_pairing(tmp_path / "aligned", tmp_path / "shuffled", "shuffled", seed=1)["pairing_facts"]
    assert facts["unmatched"] == 0
    for (own, _, _), (new, _, _) in zip(sides_of(tmp_path / "aligned"), sides_of(tmp_path / "shuffled"), strict=True):
        assert own.keys() == new.keys()
        second = max(own, key=["deu_Latn", "eng_Latn", "fin_Latn"].index)
        assert own[second] != new[second]
        assert all(own[code] == new[code] for code in own if code != second)
    manifest = write_pairing(tmp_path / "aligned", tmp_path / "separated", "separated", seed=1)
    codes = [order[0] for _, _, order in sides_of(tmp_path / "separated")]
    assert codes == sorted(codes) and len(codes) == 600
    assert manifest["tokens_by_language"] == read_token_file(tmp_path / "aligned").manifest["tokens_by_language"]


def test_the_same_text_at_another_place_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = pairs(40)
    for record in records:
        record["texts"]["fin_Latn"] = "Kaikilla sama käännös, aina vain sama."
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    preprocess(pairs_job([lines], tmp_path / "aligned", tokenizer.path, filters=None))
    facts = write_pairing(tmp_path / "aligned", tmp_path / "shuffled", "shuffled", seed=1)["pairing_facts"]
    assert facts == {"unmatched": 0, "same_text": 40, "relative_length_difference": 0.0}


def test_what_cannot_be_a_control_is_refused(tmp_path: Path, aligned: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="is the file of aligned pairs itself"):
        write_pairing(aligned, aligned, "shuffled", seed=0)
    write_pairing(aligned, tmp_path / "separated", "separated", seed=0)
    with pytest.raises(ConfigError, match="does not hold aligned pairs"):
        write_pairing(tmp_path / "separated", tmp_path / "x", "shuffled", seed=0)
    lines = write_lines(tmp_path / "fin.jsonl", documents(5, "fin_Latn"))
    preprocess(monolingual_job([lines], tmp_path / "fin", tokenizer.path))
    with pytest.raises(ConfigError, match="does not hold aligned pairs"):
        write_pairing(tmp_path / "fin", tmp_path / "x", "shuffled", seed=0)
    one = write_lines(tmp_path / "one.jsonl", pairs(1))
    with pytest.raises(CorpusError, match="no pair has another of the same two languages"):
        preprocess(pairs_job([one], tmp_path / "out" / "x", tokenizer.path, pairing="shuffled"))
    assert not (tmp_path / "out" / "x.bin").exists()
    damaged = bytearray((tmp_path / "aligned.spans").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "aligned.spans").write_bytes(damaged)
    with pytest.raises((FormatError, ConfigError)):
        write_pairing(aligned, tmp_path / "x", "separated", seed=0)
    assert not (tmp_path / "x.bin").exists()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=400), st.integers(0, 1 << 40))
def test_everyone_gets_another_of_its_group(members: list[tuple[int, int]], seed: int) -> None:
    groups, lengths = (np.array(column) for column in zip(*members, strict=True))
    mixed = pairing_module._mixed(np.arange(groups.size), seed)
    assert len(set(mixed.tolist())) == groups.size
    partners = pairing_module._partners(groups, lengths, mixed)
    assert sorted(partners.tolist()) == list(range(groups.size))
    sizes = Counter(groups.tolist())
    for number, partner in enumerate(partners.tolist()):
        assert groups[partner] == groups[number]
        assert (partner != number) == (sizes[groups[number]] > 1)

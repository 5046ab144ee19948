"""Statistics against plain loops over the same documents."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign.errors import FormatError
from megatron_xalign.formats import token_file_layout, token_file_statistics, token_file_structure
from megatron_xalign.formats.token_file import NO_LANGUAGE
from megatron_xalign.formats.token_file import token_file_statistics as statistics_of
from megatron_xalign.formats.token_file_statistics import QUANTILES, LengthCounts

CODES = ["eng_Latn", "fin_Latn", "zho_Hans"]


def quantiles(values: list[int]) -> dict[str, int]:
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return {f"{share:g}": int(value) for share, value in zip(QUANTILES, found, strict=True)}


def histogram(values: list[int]) -> list[dict[str, int]]:
    counts = Counter(value.bit_length() for value in values)
    return [
        {"from": (1 << bits) >> 1, "to": (1 << bits) - 1, "documents": counts[bits]} for bits in sorted(counts)
    ]


def distribution(values: list[int]) -> dict:
    return {
        "mean": pytest.approx(sum(values) / len(values)), "shortest": min(values), "longest": max(values),
        "quantiles": quantiles(values), "histogram": histogram(values),
    }


@pytest.mark.parametrize("piece", [1 << 20, 1, 2, 5, 13])
@pytest.mark.parametrize("num_languages", [1, 2, 3])
def test_everything_is_what_a_plain_loop_counts(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch, piece: int, num_languages: int
) -> None:
    documents = token_files.documents(9, 60, vocab_size=50, num_languages=num_languages)
    documents.append([([4, 0, 4], 0), ([0, 7], NO_LANGUAGE), ([0], NO_LANGUAGE)])
    token_files.write(tmp_path / "x", documents, languages=CODES[:num_languages])
    monkeypatch.setattr(token_file_layout.chunks, "__defaults__", (piece, 0))
    for module in (token_file_statistics, token_file_structure):
        monkeypatch.setattr(module, "CHUNK", piece)
    found = statistics_of(tmp_path / "x", top=7)
    json.dumps(found)

    tokens = [(token, language) for document in documents for ids, language in document for token in ids]
    lengths = [len(token_files.ids(document)) for document in documents]
    by_language = Counter(language for _, language in tokens)
    assert found["tokens"] == len(tokens) and found["documents"] == found["sequences"] == 61
    assert found["tokens_by_language"] == {code: by_language[index] for index, code in enumerate(CODES[:num_languages])}
    assert found["content_tokens"] == len(tokens) - by_language[NO_LANGUAGE]
    assert found["document_tokens"] == distribution(lengths)
    ends = sum(token == 0 for token, _ in tokens)
    assert found["end_of_document_tokens"] == ends and found["end_of_document_share"] == ends / len(tokens)
    assert found["template_tokens"] == sum(token != 0 and language < 0 for token, language in tokens)
    counts = Counter(token for token, _ in tokens)
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:7]
    assert [(item["id"], item["count"]) for item in found["frequent_ids"]] == expected
    assert all(item["share"] == item["count"] / len(tokens) for item in found["frequent_ids"])
    assert (found["distinct_ids"], found["largest_id"]) == (len(counts), max(counts))

    sides = [
        [sum(len(ids) for ids, language in document if language == index) for document in documents]
        for index in range(num_languages)
    ]
    for code, side in zip(CODES, sides, strict=False):
        present = [size for size in side if size]
        assert found["sides"][code] == {
            "documents": len(present), "tokens": sum(present), "document_tokens": distribution(present)
        }
        assert found["documents_by_language"][code] == len(present)
    if num_languages == 2:
        ratios = [max(pair) * 1000 // min(pair) for pair in zip(*sides, strict=True) if min(pair)]
        assert found["length_ratio"]["pairs"] == len(ratios)
        assert found["length_ratio"]["mean"] == pytest.approx(sum(ratios) / len(ratios) / 1000)
        for share, value in quantiles(ratios).items():
            # Counted in steps of 1 in 1,024.
            assert value * (1 - 1 / 1024) / 1000 <= found["length_ratio"]["quantiles"][share] <= value / 1000
    else:
        assert "length_ratio" not in found


def test_a_monolingual_file_has_no_sides(tmp_path: Path, token_files) -> None:
    token_files.write(
        tmp_path / "x", [[([5, 6], 0), ([0], -1)]] * 3, languages=["fin_Latn"], origin="monolingual"
    )
    found = statistics_of(tmp_path / "x")
    assert "sides" not in found and found["end_of_document_share"] == 1 / 3 and found["template_tokens"] == 0


def test_megatrons_own_files_are_counted(tmp_path: Path, token_files, megatron_builder) -> None:
    megatron_builder(tmp_path / "m", [[[5, 6], [7, 0]], [], [[0]]])
    found = statistics_of(tmp_path / "m")
    assert found["tokens_by_language"] == {"und": 5} and found["end_of_document_tokens"] is None
    found = statistics_of(tmp_path / "m", language="fin_Latn", tokenizer=token_files.Tokenizer())
    assert found["tokens_by_language"] == {"fin_Latn": 3} and found["end_of_document_tokens"] == 2
    assert found["document_tokens"]["shortest"] == 0 and found["sequences"] == 3


def test_a_file_without_documents_has_statistics(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "x", [])
    found = statistics_of(tmp_path / "x")
    assert (found["documents"], found["tokens"], found["frequent_ids"]) == (0, 0, [])
    assert found["document_tokens"]["longest"] is found["end_of_document_share"] is None
    json.dumps(found)


def test_another_tokenizer_is_refused(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "x", token_files.documents(1, 2))
    with pytest.raises(FormatError, match="was made with tokenizer"):
        statistics_of(tmp_path / "x", tokenizer=token_files.Tokenizer(sha256="cd" * 32))


def test_ids_that_no_vocabulary_has_are_an_error_and_not_an_allocation(tmp_path: Path, megatron_builder) -> None:
    for bad in (-1, 2_000_000_000):
        megatron_builder(tmp_path / "m", [[[5, bad]]], np.int32)
        with pytest.raises(FormatError, match="which no vocabulary has"):
            statistics_of(tmp_path / "m")


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40).flatmap(lambda bits: st.integers(0, (1 << bits) - 1)), min_size=1, max_size=60),
    bits=st.integers(2, 12),
)
def test_lengths_are_exact_while_short_and_rounded_down_a_little_when_long(lengths: list[int], bits: int) -> None:
    counts = LengthCounts(bits)
    for begin in range(0, len(lengths), 7):
        counts.add(np.array(lengths[begin : begin + 7]))
    found = counts.facts()
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["histogram"] == histogram(lengths)
    for share, value in {**quantiles(lengths), "shortest": min(lengths), "longest": max(lengths)}.items():
        rounded = found[share] if share in found else found["quantiles"][share]
        assert rounded == value if value < 2 << bits else value - math.ceil(value / (1 << bits)) < rounded <= value

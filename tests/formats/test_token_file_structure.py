"""Columns that do not fit one another, told from those that do by a plain loop."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_xalign.errors import FormatError
from megatron_xalign.formats import token_file_layout, token_file_structure
from megatron_xalign.formats.token_file import TokenFileWriter, check_token_file, read_token_file
from megatron_xalign.formats.token_file_structure import Tally


def write_unchecked(prefix: Path, tokenizer, lengths: list[int], ends: list[int], languages: list[int]) -> None:
    """A file whose checksums and counts are right, whatever its spans are."""
    with TokenFileWriter(prefix, tokenizer=tokenizer, origin="parallel", languages=["eng_Latn", "fin_Latn"]) as writer:
        writer.columns.put_tokens(np.zeros(sum(lengths), dtype=np.uint16))
        writer.columns.put_sequences(np.array(lengths))
        writer.columns.put_documents(len(lengths))
        writer.columns.put_spans(np.array(ends, dtype=np.int64), np.array(languages, dtype=np.int8))
        writer.tally.add_documents(np.array(lengths))
        writer.tally.spans = len(ends)
        writer.finish()


def divides(lengths: list[int], ends: list[int], languages: list[int]) -> bool:
    """Whether spans cut every document at its end, are not empty, and are of languages there are."""
    borders = np.cumsum(lengths).tolist()
    return (
        all(before < after for before, after in zip([0, *ends], ends, strict=False))
        and set(borders) <= set(ends)
        and ends[-1] == borders[-1]
        and all(length > 0 for length in lengths)
        and set(languages) <= {-1, 0, 1}
    )


@st.composite
def files(draw) -> tuple[list[int], list[int], list[int]]:
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
    total = sum(lengths)
    # Mostly spans that fit, with a little wrong.
    inner = draw(st.sets(st.integers(1, total)))
    ends = sorted(inner | {end for end in np.cumsum(lengths).tolist() if end})
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(ends) - 1))
        change = draw(st.sampled_from(["move", "remove", "double"]))
        if change == "move":
            ends[at] += draw(st.integers(-3, 3))
        elif change == "remove" and len(ends) > 1:
            del ends[at]
        elif change == "double":
            ends.insert(at, ends[at])
    languages = draw(st.lists(st.sampled_from([-1, 0, 1, 1, 0, 2, -2]), min_size=len(ends), max_size=len(ends)))
    if draw(st.booleans()):
        languages = [min(max(language, -1), 1) for language in languages]
    return lengths, ends, languages


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=files(), piece=st.sampled_from([1, 2, 3, 1 << 20]))
@example(file=([2, 2], [1, 3, 4], [0, 0, 0]), piece=1 << 20)
@example(file=([2, 2], [4], [0]), piece=1)
@example(file=([2, 0, 2], [2, 4], [0, 0]), piece=1)
def test_spans_are_taken_exactly_when_they_divide_every_document(
    tmp_path: Path, token_files, file: tuple[list[int], list[int], list[int]], piece: int
) -> None:
    write_unchecked(tmp_path / "x", token_files.Tokenizer(), *file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file_layout.chunks, "__defaults__", (piece, 0))
        patch.setattr(token_file_structure, "CHUNK", piece)
        try:
            read_token_file(tmp_path / "x")
        except FormatError:
            assert not divides(*file)
        else:
            assert divides(*file)
        kinds = {problem.check for problem in check_token_file(tmp_path / "x").problems}
        # Counts are not those of the spans either way: they were not given.
        assert ("spans" in kinds) == (not divides(*file)) and "checksums" not in kinds


span = st.tuples(st.integers(1, 5), st.integers(-1, 2), st.booleans())


@settings(max_examples=200, deadline=None)
@given(spans=st.lists(span, min_size=1, max_size=30), cuts=st.sets(st.integers(0, 30)), languages=st.integers(1, 3))
def test_a_tally_is_the_same_however_its_spans_come(spans: list, cuts: set[int], languages: int) -> None:
    spans = [(size, min(language, languages - 1), last) for size, language, last in spans]
    # The last span ends its document.
    spans[-1] = (*spans[-1][:2], True)
    tally = Tally(languages)
    borders = sorted({0, len(spans), *(cut for cut in cuts if cut < len(spans))})
    for begin, end in itertools.pairwise(borders):
        sizes, ids, last = zip(*spans[begin:end], strict=True)
        tally.add_spans(np.array(sizes), np.array(ids), np.array(last))
    documents, document = [], []
    for one in spans:
        document.append(one)
        if one[2]:
            documents.append(document)
            document = []
    for language in range(languages):
        assert tally.tokens_by_language_K[language] == sum(size for size, of, _ in spans if of == language)
        assert tally.documents_by_language_K[language] == sum(
            any(of == language for _, of, _ in document) for document in documents
        )
    assert tally.spans_are_regular == (
        languages == 1
        and all([of for _, of, _ in document] == [0, -1] and document[1][0] == 1 for document in documents)
    )

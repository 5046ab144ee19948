"""Documents of a source for training, validation and test."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign import _native
from megatron_xalign.config import DataConfig
from megatron_xalign.data.order_key import order_key
from megatron_xalign.data.splits import PARTS, DocumentRange, split_documents


def documents_of(part: DocumentRange) -> list[int]:
    """By the permutation that the part names."""
    order = range(part.num_documents)
    if part.key is not None:
        order = _native.Permutation(part.key, part.num_documents).fill(0, part.num_documents).tolist()
    return list(order)[part.begin : part.end]


@settings(max_examples=100, deadline=None)
@given(num_documents=st.integers(0, 700), shares=st.tuples(*[st.fractions(0, 100)] * 3).filter(any))
def test_parts_are_disjoint_and_hold_every_document(num_documents: int, shares: tuple[Fraction, ...]) -> None:
    parts = split_documents("fin", num_documents, shares)
    assert tuple(parts) == PARTS
    held = [document for part in parts.values() for document in documents_of(part)]
    assert sorted(held) == list(range(num_documents))
    for part, share in zip(parts.values(), shares, strict=True):
        assert abs(len(part) - num_documents * share / sum(shares)) < 1


def test_sizes_are_the_largest_remainders() -> None:
    sizes = [len(part) for part in split_documents("fin", 10, (Fraction(1), Fraction(1), Fraction(1))).values()]
    assert sizes == [4, 3, 3]
    sizes = [len(part) for part in split_documents("fin", 7, (Fraction(90), Fraction(5), Fraction(5))).values()]
    assert sizes == [6, 1, 0]
    sizes = [len(part) for part in split_documents("fin", 1000, DataConfig(split="98,1,1").split_parts).values()]
    assert sizes == [980, 10, 10]
    shares = DataConfig(split="99.5,.5,0").split_parts
    sizes = [len(part) for part in split_documents("fin", 5 * 10**9 + 1, shares).values()]
    assert sizes == [4_975_000_001, 25_000_000, 0]


def test_nothing_split_off_leaves_file_order() -> None:
    parts = split_documents("fin", 5, (Fraction(100), Fraction(0), Fraction(0)))
    assert documents_of(parts["train"]) == [0, 1, 2, 3, 4]
    assert parts["train"] == DocumentRange.whole(5)
    assert parts["train"].is_whole
    assert split_documents("fin", 5, (Fraction(98), Fraction(2), Fraction(0)))["train"].key is not None


def test_which_documents_are_held_out_depends_on_the_name_alone() -> None:
    shares = (Fraction(98), Fraction(1), Fraction(1))
    first, again, other = (split_documents(name, 1000, shares)["test"] for name in ("fin", "fin", "eng"))
    assert documents_of(first) == documents_of(again)
    assert set(documents_of(first)) != set(documents_of(other))
    assert first.key == order_key(0, "fin", "split") == 14721030563759320114


def test_wrong_proportions_are_refused() -> None:
    for shares in [(Fraction(1),), (Fraction(0),) * 3, (Fraction(1), Fraction(-1), Fraction(1))]:
        with pytest.raises(ValueError, match="three proportions"):
            split_documents("fin", 5, shares)
    with pytest.raises(ValueError, match="negative"):
        split_documents("fin", -1, (Fraction(1),) * 3)
    with pytest.raises(ValueError, match=r"3\.\.2 are outside"):
        DocumentRange(3, 2, 5)

"""The formula permutation through its binding, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_streams import feistel, plain_order

from megatron_xalign import _native

KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(key=KEYS, size=st.integers(0, 1500))
def test_the_order_is_the_formula_in_plain_python(key: int, size: int) -> None:
    assert _native.Permutation(key, size).fill(0, size).tolist() == list(plain_order(key, size))


@settings(max_examples=200, deadline=None)
@given(key=KEYS, size=st.integers(257, 2**62), at=st.floats(0, 1, exclude_max=True))
def test_any_position_of_any_size_goes_forth_and_back(key: int, size: int, at: float) -> None:
    order = _native.Permutation(key, size)
    position = min(int(at * size), size - 1)
    number = order[position]
    assert number == feistel(key, size, position)
    assert order.position_of(number) == position
    assert len(order) == size


@settings(max_examples=60, deadline=None)
@given(key=KEYS, size=st.integers(0, 3000), first=st.integers(0, 3000), count=st.integers(0, 3000))
def test_a_piece_is_part_of_the_whole_both_ways(key: int, size: int, first: int, count: int) -> None:
    order = _native.Permutation(key, size)
    if first + count > size:
        with pytest.raises(IndexError, match="are not all in"):
            order.fill(first, count)
        return
    numbers = order.fill(0, size)
    np.testing.assert_array_equal(order.fill(first, count), numbers[first : first + count])
    positions = order.fill_positions(first, count)
    np.testing.assert_array_equal(numbers[positions], np.arange(first, first + count))


def test_orders_never_change() -> None:
    # A run's samples hang on these numbers; if they must change, every run in the world is another run.
    assert _native.Permutation(1234, 12).fill(0, 12).tolist() == [8, 3, 4, 5, 1, 2, 10, 11, 7, 6, 9, 0]
    large = _native.Permutation(1234, 1_000_003)
    assert large.fill(0, 6).tolist() == [881701, 697768, 45798, 890858, 103963, 863115]
    assert _native.Permutation(2**64 - 1, 2**62)[2**61] == feistel(2**64 - 1, 2**62, 2**61)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size=-1 is outside 0\.\.2\^62"):
        _native.Permutation(0, -1)
    with pytest.raises(IndexError):
        _native.Permutation(0, 5)[5]
    with pytest.raises(IndexError):
        _native.Permutation(0, 5).position_of(-1)
    with pytest.raises(IndexError, match="negative"):
        _native.Permutation(0, 5).fill(0, -1)

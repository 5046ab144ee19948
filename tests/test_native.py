"""The C++ library through its binding, against plain Python and Megatron."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign import _native

CSRC = Path(__file__).parents[1] / "csrc"
WEIGHTS = st.lists(st.integers(0, 10**12), min_size=1, max_size=12).filter(any)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, num_samples=st.integers(1, 300))
def test_every_prefix_is_less_than_one_sample_from_its_quota(weights: list[int], num_samples: int) -> None:
    order = _native.blend_order(np.array(weights), num_samples)
    given_j, total = [0] * len(weights), sum(weights)
    for k, source in enumerate(order.tolist(), 1):
        given_j[source] += 1
        for count, weight in zip(given_j, weights, strict=True):
            assert abs(count * total - k * weight) < total


@settings(max_examples=50, deadline=None)
@given(weights=WEIGHTS, longer=st.integers(0, 300), shorter=st.integers(0, 300))
def test_a_shorter_order_begins_a_longer_one(weights: list[int], longer: int, shorter: int) -> None:
    shorter, longer = sorted((shorter, longer))
    array = np.array(weights)
    np.testing.assert_array_equal(
        _native.blend_order(array, longer)[:shorter], _native.blend_order(array, shorter)
    )


def test_as_many_samples_as_the_weights_add_up_to_if_none_are_asked() -> None:
    order = _native.blend_order(np.array([3, 0, 5]))
    assert order.dtype == np.int32
    assert np.bincount(order).tolist() == [3, 0, 5]


def _python_permutation(seed: int, size: int) -> list[int]:
    """The same order from arbitrary-precision integers: SplitMix64, xoshiro256**, Lemire, Fisher-Yates."""
    mask = (1 << 64) - 1

    def split_mix() -> Iterator[int]:
        state = seed
        while True:
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield z ^ (z >> 31)

    def rotate(x: int, by: int) -> int:
        return ((x << by) | (x >> (64 - by))) & mask

    words = split_mix()
    s = [next(words) for _ in range(4)]

    def draw() -> int:
        result = (rotate((s[1] * 5) & mask, 7) * 9) & mask
        t = (s[1] << 17) & mask
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = rotate(s[3], 45)
        return result

    order = list(range(size))
    for left in range(size, 1, -1):
        product = draw() * left
        while (product & mask) < (1 << 64) % left:
            product = draw() * left
        at = product >> 64
        order[left - 1], order[at] = order[at], order[left - 1]
    return order


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), size=st.integers(0, 200))
def test_permutation_is_the_published_algorithms_in_plain_python(seed: int, size: int) -> None:
    assert _native.permutation(seed, size).tolist() == _python_permutation(seed, size)


def test_permutation_never_changes() -> None:
    # A run's samples hang on these numbers; if they must change, every run in the world is another run.
    assert _native.permutation(1234, 12).tolist() == [8, 3, 4, 5, 1, 2, 10, 11, 7, 6, 9, 0]



@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=30), seq_length=st.integers(1, 12), wide=st.booleans())
def test_borders_are_where_a_loop_over_tokens_finds_them(lengths: list[int], seq_length: int, wide: bool) -> None:
    stream = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    expected = stream[::seq_length]
    if len(expected) < 2:
        expected = []
    borders = _native.sample_index(np.array(lengths, dtype=np.int64 if wide else np.int32), seq_length)
    assert borders.shape == (len(expected), 2)
    assert [tuple(row) for row in borders.tolist()] == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seq_length", [2, 7, 64])
def test_borders_are_those_of_megatron(seq_length: int) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    random = np.random.default_rng(seq_length)
    lengths = random.integers(1, 50, 400).astype(np.int32)
    documents = random.permutation(400).astype(np.int32)
    theirs = helpers.build_sample_idx_int64(lengths, documents, seq_length, 1, int(lengths.sum()), True, 1)
    ours = _native.sample_index(lengths[documents], seq_length)
    np.testing.assert_array_equal(ours, theirs)


def test_counts_before_positions_are_those_of_a_cumulative_sum() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(-1, 3, 500).astype(np.int8)
    positions = np.sort(random.integers(0, 501, 60))
    expected = [[np.count_nonzero(ids[:at] == language) for language in range(3)] for at in positions]
    np.testing.assert_array_equal(_native.count_languages(ids, positions, 3), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_gather_joins_pieces_of_every_token_width(dtype: str) -> None:
    tokens = np.arange(100, dtype=dtype)
    starts, stops = np.array([90, 5, 5]), np.array([100, 5, 8])
    gathered = _native.gather(tokens, starts, stops)
    assert gathered.dtype == np.int64
    np.testing.assert_array_equal(gathered, [*range(90, 100), 5, 6, 7])


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, 2, 3, 40_000, 65_535]), max_size=400), plain=st.integers(0, 300),
    narrow=st.booleans(),
)
def test_ids_are_cut_at_ends_as_numpy_finds_them(ids: list[int], plain: int, narrow: bool) -> None:
    ids_T = np.array([50_000] * plain + ids, dtype=np.uint32)
    ranges = np.array([[0, 0], [3, 39_999]], dtype=np.uint32)
    tokens, lengths, marked, rest = _native.cut_at_ends(ids_T, 1, ranges, 65_536, narrow)
    assert tokens.dtype == (np.uint16 if narrow else np.int32)
    np.testing.assert_array_equal(tokens, ids_T)
    ends = np.flatnonzero(ids_T == 1) + 1
    np.testing.assert_array_equal(lengths, np.diff(ends, prepend=0))
    pieces = np.split(ids_T, ends)
    assert rest == pieces[-1].size
    is_marked = [bool(((piece == 0) | ((piece >= 3) & (piece < 40_000))).any()) for piece in pieces[:-1]]
    assert marked.tolist() == is_marked


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _native.blend_order(np.array([1, 2], dtype=np.int32)), "dtype int32; int64"),
        (lambda: _native.blend_order(np.array([[1, 2]])), "2 axes; 1"),
        (lambda: _native.blend_order(np.arange(10)[::2]), "not contiguous"),
        (lambda: _native.blend_order(np.array([1, -2])), r"weights\[1\]=-2 is negative"),
        (lambda: _native.blend_order(np.array([], dtype=np.int64)), "empty"),
        (lambda: _native.blend_order(np.array([2**62, 2**62])), "int64"),
        (lambda: _native.permutation(0, -1), "size=-1"),
        (lambda: _native.sample_index(np.array([1.0, 2.0]), 2), "dtype float64"),
        (lambda: _native.sample_index(np.array([1, -2]), 2), "length of -2"),
        (lambda: _native.gather(np.zeros(3), np.array([0]), np.array([1])), "dtype float64"),
        (lambda: _native.gather(np.zeros(3, np.int32), np.array([0]), np.array([4])), r"0\.\.4 are outside 0\.\.3"),
        (lambda: _native.gather(np.zeros(3, np.int32), np.array([0, 1]), np.array([2])), "differ in length"),
        (lambda: _native.count_languages(np.array([3], np.int8), np.array([1]), 2), "language 3 of 2"),
    ],
)
def test_wrong_arguments_are_value_errors_that_name_them(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "the compiler 'no-such-compiler' cannot be run"),
        ("./broken", "broken exited with 1).\n    a.cpp:1: fatal error: no header for you\n"),
    ],
)
def test_a_failed_compile_fails_the_build_and_says_what_to_install(compiler: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    shutil.copy(CSRC.parent / "setup.py", tmp_path)
    shutil.copytree(CSRC, tmp_path / "csrc")
    broken = tmp_path / "broken"
    complaint = "In file included from b.h\\na.cpp:1: fatal error: no header for you"
    broken.write_text(f"#!/bin/sh\nprintf '{complaint}' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path, env={**os.environ, "CXX": compiler}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert "apt-get install g++ python3-dev" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.so"))

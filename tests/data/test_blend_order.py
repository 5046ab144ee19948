"""Orders as they are kept: draws by counting, and the shuffle inside global batches that is fair to every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xalign import _native


def order_of(ids: np.ndarray, num_sources: int, batch_size: int, key: int = 3) -> _native.SampleOrder:
    counter = _native.RowCounter(num_sources)
    counter.append(ids)
    counts = np.concatenate([counter.take_lines(), counter.now()[None]])
    return _native.SampleOrder(ids=ids, counts=counts, batch_size=batch_size, batch_key=key)


def earliest_deadlines(weights: list[int], num_samples: int) -> list[int]:
    """Slot by slot: of the samples that may come, the one that is due first; the lower source where two are."""
    total, given_j, order = sum(weights), [0] * len(weights), []
    for slot in range(1, num_samples + 1):
        due = [
            (-(-(given_j[j] + 1) * total // weight), j)
            for j, weight in enumerate(weights)
            if weight and slot > given_j[j] * total // weight
        ]
        deadline, source = min(due)
        assert deadline >= slot
        given_j[source] += 1
        order.append(source)
    return order


@settings(max_examples=100, deadline=None)
@given(
    weights=st.one_of(
        st.lists(st.integers(0, 30), min_size=1, max_size=40), st.lists(st.integers(0, 2**57), min_size=1, max_size=40)
    ).filter(any),
    pieces=st.lists(st.integers(0, 700), min_size=1, max_size=5),
)
def test_the_order_is_that_of_earliest_deadlines(weights: list[int], pieces: list[int]) -> None:
    blend = _native.BlendOrder(np.array(weights))
    order: list[int] = []
    for piece in pieces:
        part = np.empty(piece, dtype=np.uint16)
        blend.fill(part)
        order += part.tolist()
    assert len(blend) == sum(pieces)
    assert order == earliest_deadlines(weights, sum(pieces))


@settings(max_examples=60, deadline=None)
@given(
    num_sources=st.integers(1, 700), batch_size=st.integers(1, 40), steps=st.integers(0, 900),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_draws_are_the_number_of_earlier_rows_of_the_same_source(
    num_sources: int, batch_size: int, steps: int, seed: int
) -> None:
    dtype = np.uint8 if num_sources <= 256 else np.uint16
    random = np.random.default_rng(seed)
    ids = random.integers(0, num_sources, steps * batch_size).astype(dtype)
    order = order_of(ids, num_sources, batch_size)
    samples = random.integers(0, max(len(ids), 1), 50 if len(ids) else 0)
    sources, draws = order.origins(samples)
    for sample, source, draw in zip(samples.tolist(), sources.tolist(), draws.tolist(), strict=True):
        position = order.position_of(sample)
        assert ids[position] == source
        assert np.count_nonzero(ids[:position] == source) == draw
        assert order.origin(sample) == (source, draw)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 10**9), min_size=2, max_size=9), seed=st.integers(0, 2**63),
    ranks=st.sampled_from([1, 2, 4, 8, 16]), of_rank=st.sampled_from([8, 16, 24, 64]),
)  # fmt: skip
def test_every_rank_gets_every_source_within_a_few_samples_in_every_step(
    weights: list[int], seed: int, ranks: int, of_rank: int
) -> None:
    batch, steps = ranks * of_rank, 40
    ids = np.zeros(batch * steps, dtype=np.uint8)
    _native.BlendOrder(np.array(weights)).fill(ids)
    positions = _native.batch_positions(seed, 0, steps, batch)
    assert np.array_equal(np.sort(positions, axis=1), np.broadcast_to(np.arange(batch), (steps, batch)))
    served = np.take_along_axis(ids.reshape(steps, batch), positions, axis=1).reshape(steps, ranks, of_rank)
    for source, weight in enumerate(weights):
        counts = (served == source).sum(axis=2)
        # Whole runs of 8 go to one rank: its part is a piece of the order, or two where the batch begins.
        quota = of_rank * weight / sum(weights)
        assert np.abs(counts - quota).max() < 4


def test_no_rank_is_favoured_over_a_run() -> None:
    """The order gives parallel samples to the same places of every batch; the turn spreads them over all ranks."""
    batch, steps = 32, 20_000
    ids = np.zeros(batch * steps, dtype=np.uint8)
    _native.BlendOrder(np.array([31, 1])).fill(ids)
    chosen = ids.reshape(steps, batch)
    assert (chosen.sum(axis=0) > 0).sum() == 1
    served = np.take_along_axis(chosen, _native.batch_positions(8, 0, steps, batch), axis=1)
    of_slot = served.sum(axis=0)
    expected = steps / batch
    # Chi-squared of 32 slots: 31 on average, above 80 once in 100,000 times.
    assert ((of_slot - expected) ** 2 / expected).sum() < 80


MASK = (1 << 64) - 1


def mixed(z: int) -> int:
    """One step of SplitMix64 from a state."""
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_positions(key: int, step: int, batch: int) -> list[int]:
    """The formula in Python's integers: the order turned by an offset, then shuffled in runs of eight."""
    of_step = mixed(key ^ mixed(step))
    turned = [(place + (of_step * batch >> 64)) % batch for place in range(batch)]
    positions: list[int] = []
    for first in range(0, batch, 8):
        run = turned[first : first + 8]
        word = mixed(of_step ^ mixed(MASK ^ (first // 8)))
        for left in range(len(run), 1, -1):
            word = mixed(word)
            other = word * left >> 64
            run[left - 1], run[other] = run[other], run[left - 1]
        positions += run
    return positions


@settings(max_examples=100, deadline=None)
@given(key=st.integers(0, MASK), step=st.integers(0, 2**62), batch=st.integers(1, 100))
def test_the_shuffle_inside_batches_never_changes(key: int, step: int, batch: int) -> None:
    """Part of the meaning of a run: the same in plain Python, for ever."""
    assert _native.batch_positions(key, step, 1, batch)[0].tolist() == plain_positions(key, step, batch)


def test_sizes_that_disagree_are_value_errors() -> None:
    ids = np.zeros(12, dtype=np.uint8)
    counts = np.array([[0, 0], [12, 0]])
    _native.SampleOrder(ids=ids, counts=counts, batch_size=4, batch_key=1)
    for changes, words in (
        ({"batch_size": 5}, "whole batches"),
        ({"batch_size": 0}, "whole batches"),
        ({"counts": counts[:1].copy()}, "counts"),
        ({"ids": ids.astype(np.int8)}, "dtype int8"),
        ({"ids": ids[::2]}, "not contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            _native.SampleOrder(**{"ids": ids, "counts": counts, "batch_size": 4, "batch_key": 1, **changes})
    order = _native.SampleOrder(ids=ids, counts=counts, batch_size=4, batch_key=1)
    for sample in (-1, 12):
        with pytest.raises(IndexError):
            order.origin(sample)


def test_an_order_keeps_its_arrays_alive() -> None:
    order = order_of(np.arange(200_000, dtype=np.uint32).astype(np.uint8), 256, 8)
    assert order.origins(np.arange(0, 200_000, 97))[0].tolist() == [
        order.position_of(sample) % 256 for sample in range(0, 200_000, 97)
    ]

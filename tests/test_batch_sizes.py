"""Sizes of steps against a loop that asks Megatron's own calculator before every step."""

from __future__ import annotations

import inspect

import pytest

from megatron_xalign.batch_sizes import BatchSizes
from megatron_xalign.config import TrainingConfig
from megatron_xalign.errors import ConfigError

RAMPS = [(4, 4, 40), (8, 8, 1), (16, 16, 1000), (24, 2, 333), (2, 2, 37), (32, 1, 50)]


def training(ramp: tuple[int, ...], steps: int = 20) -> TrainingConfig:
    return TrainingConfig(train_steps=steps, global_batch_size=32, micro_batch_size=2, rampup_batch_size=ramp)


def by_the_definition(ramp: tuple[int, ...], budget: int) -> list[int]:
    """Step by step, as Megatron's calculator updates itself."""
    start, increment, ramp_samples = ramp
    per_increment = ramp_samples / max((32 - start) // increment, 1)
    sizes: list[int] = []
    while sum(sizes) < budget:
        consumed = sum(sizes)
        grown = 32 if consumed > ramp_samples else min(start + int(consumed / per_increment) * increment, 32)
        sizes.append(min(grown, budget - consumed))
    return sizes


@pytest.mark.parametrize("ramp", RAMPS)
def test_every_step_has_the_size_that_the_samples_before_it_ask_for(ramp: tuple[int, ...]) -> None:
    sizes, expected = BatchSizes(training(ramp)), by_the_definition(ramp, 640)
    assert sizes.num_samples == 640
    assert sizes.num_steps == len(expected)
    assert [sizes.size_of(step) for step in range(sizes.num_steps)] == expected
    assert [sizes.samples_before(step) for step in range(sizes.num_steps + 1)] == [
        sum(expected[:step]) for step in range(len(expected) + 1)
    ]
    assert sizes.all_sizes() == sorted(set(expected))


@pytest.mark.parametrize("ramp", [ramp for ramp in RAMPS if ramp[0] < 32])
def test_sizes_are_those_of_megatrons_calculator(ramp: tuple[int, ...]) -> None:
    calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
    kind = getattr(calculators, "RampupBatchsizeNumMicroBatchesCalculator", None)
    if kind is None or "start_global_batch_size" not in inspect.signature(kind).parameters:
        pytest.skip("this version of Megatron-Core has no ramp-up")
    start, increment, ramp_samples = ramp
    theirs = kind(
        global_batch_size=32, micro_batch_size=1, data_parallel_size=1, decrease_batch_size_if_needed=False, rank=1,
        start_global_batch_size=start, batch_size_increment=increment, ramup_samples=ramp_samples,
    )
    sizes = BatchSizes(training(ramp))
    for step in range(sizes.num_steps - 1):
        theirs.update(sizes.samples_before(step), consistency_check=False)
        assert sizes.size_of(step) == theirs.current_global_batch_size


def test_without_a_ramp_every_step_is_a_full_batch() -> None:
    sizes = BatchSizes(training((), steps=3))
    assert (sizes.num_steps, [sizes.size_of(step) for step in range(3)]) == (3, [32, 32, 32])


def test_a_run_that_ends_inside_its_ramp_never_sees_a_full_batch() -> None:
    sizes = BatchSizes(training((4, 4, 100_000), steps=2))
    assert sizes.num_samples == 64 and sizes.samples_before(sizes.num_steps) == 64
    assert sizes.all_sizes() == [4]


def test_sizes_that_cannot_be_cut_into_micro_batches_are_refused() -> None:
    BatchSizes(training((8, 8, 64))).check(2, 4)
    with pytest.raises(ConfigError, match=r"global_batch_size=4, which ramps up over .* multiple of 8"):
        BatchSizes(training((4, 4, 40))).check(2, 4)
    with pytest.raises(ConfigError, match=r"global_batch_size=32 is not divisible .* multiple of 24"):
        BatchSizes(training(())).check(8, 3)


@pytest.mark.parametrize(
    ("ramp", "said"),
    [((4, 4), "three positive numbers"), ((4, 0, 9), "three positive numbers"), ((6, 4, 9), "does not reach")],
)
def test_a_ramp_that_makes_no_sense_is_refused(ramp: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        training(ramp)

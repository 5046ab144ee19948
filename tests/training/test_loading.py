"""Micro-batches read in the process and by data workers are the same."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from numbered_samples import NumberedSamples

from megatron_xalign.training.loading import batches_of

SCHEDULE = [[4, 5], [6, 7], [12, 13], [0, 1], [2, 3]]


def read(num_workers: int, schedule: list[list[int]]) -> list[torch.Tensor]:
    with batches_of(NumberedSamples(20), schedule, num_workers=num_workers) as get_batch:
        return [get_batch(numbers).tokens for numbers in schedule]


def test_workers_give_what_the_process_itself_reads_in_order() -> None:
    alone, ahead = read(0, SCHEDULE), read(2, SCHEDULE)
    for numbers, one, other in zip(SCHEDULE, alone, ahead, strict=True):
        assert one.tolist() == [[number * 10 + at for at in range(6)] for number in numbers]
        assert torch.equal(one, other)
    assert multiprocessing.active_children() == []


def test_numbers_that_are_not_next_are_refused() -> None:
    with batches_of(NumberedSamples(20), SCHEDULE, num_workers=1) as get_batch:
        get_batch([4, 5])
        with pytest.raises(ValueError, match=r"\[0, 1\] were asked for and the schedule has \[6, 7\]"):
            get_batch([0, 1])


def test_a_sample_that_cannot_be_read_by_a_worker_is_an_error_here() -> None:
    with (
        batches_of(NumberedSamples(20, fails_at=7), SCHEDULE, num_workers=1) as get_batch,
        pytest.raises(OSError, match="sample 7 cannot be read"),
    ):
        for numbers in SCHEDULE:
            get_batch(numbers)

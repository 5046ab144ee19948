"""Which samples a rank reads; what the loop does with them is tested in tests/distributed/test_loop.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_xalign.config import TrainingConfig
from megatron_xalign.training.loop import micro_batches, sample_numbers


def ranks(data_rank: int, data_size: int) -> Any:
    return SimpleNamespace(data_rank=data_rank, data_size=data_size)


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 12), (1, 4), (2, 3), (3, 2), (4, 1)])
def test_every_layout_reads_the_same_samples_in_a_step_and_each_once(data_size: int, micro_batch_size: int) -> None:
    config = TrainingConfig(global_batch_size=12, micro_batch_size=micro_batch_size)
    for step in (0, 7):
        read: list[int] = []
        for data_rank in range(data_size):
            for microbatch in range(12 // (data_size * micro_batch_size)):
                read += sample_numbers(step, microbatch, config, ranks(data_rank, data_size))
        # Rank by rank the numbers count up: each has a contiguous part of the batch.
        assert read == list(range(12 * step, 12 * (step + 1)))


def test_the_schedule_is_what_the_loop_asks_for() -> None:
    config = TrainingConfig(train_steps=3, global_batch_size=8, micro_batch_size=2)
    scheduled = list(micro_batches(1, config, ranks(1, 2)))
    assert scheduled == [[12, 13], [14, 15], [20, 21], [22, 23]]

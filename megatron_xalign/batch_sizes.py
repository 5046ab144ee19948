"""How many samples every optimizer step has, and which: constant, or growing as Megatron's ``rampup_batch_size``.

The budget of a run is ``train_steps`` full batches of samples whatever the steps are: a run that begins with smaller
batches takes more steps, over the same samples in the same order. What a step reads follows from its number alone.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from megatron_xalign.config import TrainingConfig
from megatron_xalign.errors import ConfigError


@dataclass(frozen=True)
class _Stretch:
    """Consecutive steps of one size."""

    first_step: int
    first_sample: int
    size: int


class BatchSizes:
    """Sizes of all steps of a run.

    The size of a step follows from the samples consumed before it: it grows from ``start`` by ``increment`` in equal
    numbers of samples until ``samples`` are consumed. The last step takes what is left of the budget.

    Args:
        config: ``train_steps``, ``global_batch_size`` and ``rampup_batch_size``.

    Source: Megatron-Core's ``RampupBatchsizeNumMicroBatchesCalculator`` (0.16.1; 0.19 takes the setting and ignores
    it).
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.num_samples = config.train_steps * config.global_batch_size
        """Samples of the whole run."""
        self._stretches = _stretches(config, self.num_samples)
        self.schedule_unit = config.global_batch_size if config.rampup_batch_size else 1
        """Units of the learning rate's schedule in a full batch; see ``schedule_units``."""
        last = self._stretches[-1]
        self.num_steps = last.first_step + -(-(self.num_samples - last.first_sample) // last.size)
        """Optimizer steps of the whole run."""

    def samples_before(self, step: int) -> int:
        """Samples consumed by the first ``step`` steps."""
        stretch = self._stretch_of(step)
        return min(stretch.first_sample + (step - stretch.first_step) * stretch.size, self.num_samples)

    def size_of(self, step: int) -> int:
        """Samples of a step, over all data-parallel ranks; ``step`` counts from 0."""
        return self.samples_before(step + 1) - self.samples_before(step)

    def all_sizes(self) -> list[int]:
        """Every size that occurs, in ascending order."""
        sizes = {self.size_of(stretch.first_step) for stretch in self._stretches}
        return sorted(sizes | {self.size_of(self.num_steps - 1)})

    def schedule_units(self, step: int) -> int:
        """What the learning rate's schedule counts after ``step`` steps: steps or, where they grow, samples."""
        return step if self.schedule_unit == 1 else self.samples_before(step)

    def check(self, micro_batch_size: int, data_size: int) -> None:
        """Refuse sizes that cannot be cut into micro-batches.

        Raises:
            ConfigError: a step has samples that are not a multiple of micro-batch size times data-parallel ranks.
        """
        at_once = micro_batch_size * data_size
        for size in self.all_sizes():
            if size % at_once:
                ramp = "" if len(self._stretches) == 1 else f", which ramps up over {self.all_sizes()}"
                raise ConfigError(
                    f"training.global_batch_size={size}{ramp} is not divisible by training.micro_batch_size="
                    f"{micro_batch_size} times {data_size} data-parallel ranks; use a multiple of {at_once}, or a "
                    "smaller micro-batch."
                )

    def _stretch_of(self, step: int) -> _Stretch:
        return self._stretches[bisect_right(self._stretches, step, key=lambda stretch: stretch.first_step) - 1]


def _stretches(config: TrainingConfig, num_samples: int) -> list[_Stretch]:
    full = config.global_batch_size
    if not config.rampup_batch_size:
        return [_Stretch(0, 0, full)]
    start, increment, ramp_samples = config.rampup_batch_size
    increments = (full - start) // increment
    found: list[_Stretch] = []
    step = consumed = 0
    while consumed < num_samples:
        # Whole numbers: consumed / (ramp_samples / increments), rounded down.
        grown = increments if consumed >= ramp_samples else consumed * increments // ramp_samples
        found.append(_Stretch(step, consumed, start + grown * increment))
        if grown == increments:
            break
        # The first step at which so much is consumed that the size grows again.
        until = -(-(grown + 1) * ramp_samples // increments)
        steps = -(-(until - consumed) // found[-1].size)
        step, consumed = step + steps, consumed + steps * found[-1].size
    return found


@lru_cache(maxsize=8)
def batch_sizes(config: TrainingConfig) -> BatchSizes:
    """The sizes of a run's steps."""
    return BatchSizes(config)

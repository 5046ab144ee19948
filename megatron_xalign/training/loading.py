"""Micro-batches for the loop, read in the process itself or ahead of time by data workers."""

# B micro-batch, S sequence

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_xalign.batch import Batch

log = logging.getLogger(__name__)


class Samples(Protocol):
    """What a run reads, by number: a blend."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> Mapping[str, np.ndarray]:
        """The samples with these numbers as arrays [B, S], named as the fields of ``batch.Batch``."""


@contextmanager
def batches_of(
    samples: Samples,
    schedule: Iterable[list[int]],
    *,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[Callable[[list[int]], Batch]]:
    """Give the loop its micro-batches.

    Args:
        samples: what is read; with workers it is pickled to them, so it should open its files again there.
        schedule: the sample numbers of every micro-batch of this rank, in the order the loop will ask for them; only
            workers need it.
        num_workers: processes that read ahead; 0 reads when asked.
        prefetch_factor: micro-batches each worker keeps ready.
        pin_memory: put them into page-locked memory, from which copies to a GPU do not wait.

    Yields:
        A function from sample numbers to the micro-batch; it raises ValueError if it is asked for other numbers than
        the schedule has next.
    """
    if num_workers == 0:
        yield lambda numbers: _pinned(Batch.from_arrays(samples.batch(numbers)), pin_memory)
        return
    loader = DataLoader(
        _ByNumbers(samples),
        sampler=_Schedule(schedule),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        # A fork would copy the threads' locks of gloo and NCCL, held or not.
        multiprocessing_context="spawn",
    )
    ahead = iter(loader)

    def get_batch(numbers: list[int]) -> Batch:
        read, tensors = next(ahead)
        if read != numbers:
            raise ValueError(f"samples {numbers} were asked for and the schedule has {read}.")
        return Batch(**tensors)

    try:
        yield get_batch
    finally:
        # Its __del__ would stop the workers some time; they are to be gone when the run is over.
        shutdown = getattr(ahead, "_shutdown_workers", None)
        if shutdown is not None:
            try:
                shutdown()
            except RuntimeError as error:
                # Nothing is read from them any more; one that does not listen in time on a busy machine is killed.
                log.warning("a data worker did not end by itself: %s", error)


class _ByNumbers(Dataset[tuple[list[int], dict[str, torch.Tensor]]]):
    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, numbers: list[int]) -> tuple[list[int], dict[str, torch.Tensor]]:
        return numbers, vars(Batch.from_arrays(self._samples.batch(numbers)))


class _Schedule:
    """An iterable as a sampler; sample lists of micro-batches, one after the other."""

    def __init__(self, schedule: Iterable[list[int]]) -> None:
        self._schedule = schedule

    def __iter__(self) -> Iterator[Any]:
        return iter(self._schedule)


def _pinned(batch: Batch, pin_memory: bool) -> Batch:
    return Batch(**{name: value.pin_memory() for name, value in vars(batch).items()}) if pin_memory else batch

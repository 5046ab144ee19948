"""One statistics folder by all processes of a job: each of the first model copy writes its shard, one completes it.

An error in one process becomes an error in all, at the same moment, so that none waits for another that has given up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.errors import XAlignError
from megatron_xalign.formats.neuron_stats import (
    Shard,
    ShardEntry,
    StatsIndex,
    begin_neuron_stats,
    finish_neuron_stats,
    write_shard,
)
from megatron_xalign.topology import Ranks

log = logging.getLogger(__name__)


def agree(ranks: Ranks, error: Exception | None) -> None:
    """Go on if no process has an error, else raise on all; every process of the job calls it.

    Raises:
        Exception: this process's own error.
        XAlignError: another process has one.
    """
    if ranks.world_size > 1:
        failed = ranks.sum_over(torch.tensor([int(error is not None)], device=ranks.device), "world")
        if error is None and int(failed) > 0:
            raise XAlignError(f"capture failed in {int(failed)} other process(es); their logs say why.")
    if error is not None:
        raise error


def residual_columns(recorder: Recorder, ranks: Ranks) -> tuple[int, int]:
    """Which residual coordinates this process writes: after reductions all tensor-parallel ranks hold all of them."""
    hidden, rank, size = recorder.hidden_size, ranks.tensor_rank, ranks.tensor_size
    return hidden * rank // size, hidden * (rank + 1) // size


def holds_totals(ranks: Ranks) -> bool:
    """Whether this process writes the arrays that no layer or neuron belongs to; the loss is known here."""
    return ranks.is_last_stage and ranks.tensor_rank == 0


def write_statistics(
    folder: Path, index: StatsIndex, arrays: Mapping[str, np.ndarray], recorder: Recorder, ranks: Ranks
) -> Path:
    """Write this process's arrays into a statistics folder; every process of the job calls it.

    Raises:
        XAlignError: a process could not write its part; all raise, and the folder does not appear.
    """
    shard = Shard(
        tensor_rank=ranks.tensor_rank,
        pipeline_rank=ranks.pipeline_rank,
        layers=recorder.layers,
        neurons=recorder.neurons,
        residual_rows=recorder.residual_rows,
        residual_columns=residual_columns(recorder, ranks),
        # A pipeline stage may hold none of the layers asked for.
        arrays={name: array for name, array in arrays.items() if array.size},
    )
    agree(ranks, error_of(lambda: begin_neuron_stats(folder) if ranks.rank == 0 else None))
    # What process 0 has to know of each shard, as numbers, so that nothing is pickled: size and SHA-256.
    note = torch.zeros(1 + 32, dtype=torch.int64)

    def write() -> None:
        if ranks.data_context_rank == 0:
            entry = write_shard(folder, shard)
            note.copy_(torch.tensor([entry.size_bytes, *bytes.fromhex(entry.sha256)], dtype=torch.int64))

    agree(ranks, error_of(write))
    place = torch.tensor([shard.tensor_rank, shard.pipeline_rank], dtype=torch.int64)
    notes = [found.tolist() for found in ranks.gather_over(torch.cat([place, note]).to(ranks.device), "world")]
    entries = [
        ShardEntry(Shard.name_of(tensor, pipeline), size, bytes(sha256).hex())
        for tensor, pipeline, size, *sha256 in notes
        if size
    ]
    agree(ranks, error_of(lambda: finish_neuron_stats(folder, index, entries) if ranks.rank == 0 else None))
    log.debug("neuron statistics of step %d: %s", index.step, folder)
    return folder


def error_of(work: Callable[[], object]) -> Exception | None:
    """The error that some work of this process alone ends in, to be agreed upon."""
    try:
        work()
    except Exception as error:
        return error
    return None

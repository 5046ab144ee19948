"""The checkpoints of one run as it trains: written at once or behind its back, counted, the old ones removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.config import TrainingConfig
from megatron_xalign.formats.checkpoint_folder import prune, step_folder
from megatron_xalign.topology import ObserverState, Ranks
from megatron_xalign.training.checkpoint import UnfinishedSave, begin_save


class Saver:
    """Saves a run. Every process makes one and calls it at the same moments.

    Args:
        folder: ``checkpoints/`` of the run.
        config: how many are kept, and how they are written.
        ranks: this process's place.
        model_chunks: what is saved,
        optimizer: with Megatron's optimizer
        scheduler: and its schedule.
    """

    def __init__(
        self, folder: Path, config: TrainingConfig, ranks: Ranks, model_chunks: Sequence[Any], optimizer: Any,
        scheduler: Any,
    ) -> None:
        self._folder, self._config, self._ranks = folder, config, ranks
        self._state = (model_chunks, optimizer, scheduler)
        self._unfinished: UnfinishedSave | None = None
        self._newest_step: int | None = None
        self._completed: list[tuple[int, Path]] = []

    def save(self, step: int, extra: dict[str, Any], observers: Mapping[str, ObserverState]) -> Path:
        """Save the state after ``step``; return where the checkpoint lies, or will lie when it is complete.

        With ``async_save`` one is written at a time: a save that comes while another is under way waits for it.

        Raises:
            CheckpointError: a process could not write its part, of this save or of the one before.
        """
        self._complete()
        self._unfinished = begin_save(
            self._folder, step, *self._state, self._ranks, extra, observers,
            with_hashes=self._config.checkpoint_hashes, in_background=self._config.async_save,
        )
        if not self._config.async_save:
            self._complete()
        return step_folder(self._folder, step)

    def completed(self, wait: bool) -> list[tuple[int, Path]]:
        """Steps and paths of the checkpoints completed since the last call; with ``wait``, of all that are begun.

        Raises:
            CheckpointError: a process could not write its part.
        """
        if self._unfinished is not None and (wait or self._is_written_everywhere()):
            self._complete()
        completed, self._completed = self._completed, []
        return completed

    def wait(self) -> None:
        """Wait until what is begun is a checkpoint; call it at the end, too, so that no old one is left over.

        Raises:
            CheckpointError: a process could not write its part.
        """
        self._complete()
        self._prune()

    def _is_written_everywhere(self) -> bool:
        assert self._unfinished is not None
        waits = torch.tensor([not self._unfinished.is_written()], dtype=torch.int32, device=self._ranks.device)
        return int(self._ranks.sum_over(waits, "world")) == 0

    def _complete(self) -> None:
        if self._unfinished is None:
            return
        unfinished, self._unfinished = self._unfinished, None
        path = unfinished.finish()
        self._newest_step = unfinished.step
        if self._config.async_save:
            self._completed.append((unfinished.step, path))
        self._prune()

    def _prune(self) -> None:
        """Remove old checkpoints, but none that ``completed`` has not told of: observers may want to link it."""
        if self._config.keep_checkpoints and self._ranks.rank == 0 and self._newest_step is not None:
            keep = max(self._config.keep_checkpoints, len(self._completed))
            prune(self._folder, keep, self._config.keep_every_steps, self._newest_step)

"""Loss on held-out documents while training: in all, per language, per source."""

# B micro-batch, S sequence

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.batch import Batch
from megatron_xalign.batch_sizes import batch_sizes
from megatron_xalign.config import TrainingConfig
from megatron_xalign.progress import progress_bar
from megatron_xalign.topology import Ranks
from megatron_xalign.training.forward import ForwardOnly
from megatron_xalign.training.loading import Samples
from megatron_xalign.training.metrics import LossSums, append_metrics, truncate_metrics

log = logging.getLogger(__name__)


class ValidationObserver:
    """Measures the loss on the same held-out samples at step 0, every ``eval_interval_steps`` and the last step.

    Writes one line each time: ``step, consumed_tokens, loss, loss_by_language, loss_by_source`` in nats per token,
    every token of every sample weighted alike. It must come before observers that listen to training batches.

    Args:
        samples: held-out samples, the same in every run of a series.
        config: intervals and batch sizes.
        seq_length: tokens of a training sample, for ``consumed_tokens``.
        ranks: this process's place.
        forward_only: what ``build_forward_only`` returned.
        languages: what language ids in the samples count.
        source_names: what source ids in the samples count.
        path: the file; lines after ``start_step`` are removed from it first.
        start_step: optimizer steps already done.
    """

    def __init__(
        self,
        samples: Samples,
        config: TrainingConfig,
        *,
        seq_length: int,
        ranks: Ranks,
        forward_only: ForwardOnly,
        languages: Sequence[str],
        source_names: Sequence[str],
        path: Path,
        start_step: int = 0,
    ) -> None:
        self._samples = samples
        self._config = config
        self._sizes = batch_sizes(config)
        self._seq_length = seq_length
        self._ranks = ranks
        self._forward_only = forward_only
        self._sums = LossSums(languages, source_names, ranks)
        self._path = path
        if ranks.rank == 0:
            truncate_metrics(path, start_step)

    def before_step(self, step: int) -> None:
        """Measure the untrained model."""
        if step == 0:
            self._measure(step)

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Measure at every interval and at the last step."""
        if step % self._config.eval_interval_steps == 0 or step == self._sizes.num_steps:
            self._measure(step)

    def after_save(self, step: int, path: Path) -> None:
        """Nothing: the samples are the same every time."""

    def close(self) -> None:
        """Nothing is held open."""

    def _measure(self, step: int) -> None:
        with progress_bar(len(self._samples), f"validation at step {step}", " samples") as bar:
            for batch in self._batches():
                of_batch = self._forward_only([batch])
                # Context-parallel ranks all get the losses of whole sequences; one of them counts.
                if of_batch is not None and self._ranks.context_rank == 0:
                    self._sums.add(batch.to(self._ranks.device), of_batch[0])
                bar.update(batch.tokens.shape[0] * self._ranks.data_size)
        losses = {name: value for name, value in self._sums.take().items() if name.startswith("loss")}
        line = {"step": step, "consumed_tokens": self._sizes.samples_before(step) * self._seq_length, **losses}
        if self._ranks.rank == 0:
            append_metrics(self._path, line)
        log.info("step %d: validation loss %.4f", step, line["loss"])

    def _batches(self) -> Iterator[Batch]:
        """This rank's share, as many micro-batches on every rank; what is over is filled with samples that count 0."""
        rows, ranks = self._config.micro_batch_size, self._ranks
        for first in range(0, len(self._samples), rows * ranks.data_size):
            wanted = np.arange(rows) + first + rows * ranks.data_rank
            batch = Batch.from_arrays(self._samples.batch([int(number) for number in wanted % len(self._samples)]))
            batch.loss_mask[wanted >= len(self._samples)] = 0.0
            yield batch

"""Held-out samples of every source: the validation or test documents of ``data.split``, the same in every run.

Neither the mixture nor its seed has a part in them, so runs of a series, and runs with other seeds, are measured on the
same text; a source that a run does not train on is measured too.
"""

# N samples, S sequence, B samples of a batch

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_xalign import _native
from megatron_xalign.config import RunConfig
from megatron_xalign.data.blend_reader import BlendReader
from megatron_xalign.data.index_cache import IndexCache
from megatron_xalign.data.source_stream import SourceStream
from megatron_xalign.data.sources import end_of_document, open_sources
from megatron_xalign.data.splits import Part
from megatron_xalign.errors import ConfigError

log = logging.getLogger(__name__)

# Of the order of held-out documents; the seed of a mixture is not in it.
_SEED = 0


def build_evaluation(config: RunConfig, part: Part = "validation") -> Evaluation:
    """Open held-out samples of every source.

    Args:
        config: ``data`` of it is used, and ``training.eval_samples_per_source``.
        part: ``validation`` or ``test``.

    Returns:
        The samples: of each source in turn as many as there are, up to ``eval_samples_per_source``. A source with less
        held-out text than one sample gives one with padding; one without any is named in the log.

    Raises:
        ConfigError: no source has a held-out document.
        FormatError: a token file is damaged.
        ValueError: ``part`` is ``train``.
    """
    if part not in ("validation", "test"):
        raise ValueError(f"part={part!r} is neither 'validation' nor 'test'.")
    data = replace(config.data, mixture=replace(config.data.mixture, seed=_SEED))
    cache = IndexCache.at(data.index_cache_dir)
    streams = open_sources(data, part, cache)
    sources: list[int] = []
    draws: list[int] = []
    empty = []
    for index, stream in enumerate(streams):
        if not stream.whole_documents and not stream.num_windows():
            # Less than one window: what there is, and padding.
            streams[index] = stream = _whole(stream, cache)
        count = min(stream.num_windows(0) if len(stream) else 0, config.training.eval_samples_per_source)
        if count == 0:
            empty.append(stream.name)
        sources += [index] * count
        draws += range(count)
    if not sources:
        raise ConfigError(
            f"data.split={data.split} leaves no {part} document of any source; give {part} a larger part, such as "
            "98,1,1."
        )
    if empty:
        log.warning("data.split=%s leaves no %s sample of %s.", data.split, part, ", ".join(empty))
    return Evaluation(streams, np.array(sources, dtype=np.int32), np.array(draws, dtype=np.int64), config)


def _whole(stream: SourceStream, cache: IndexCache) -> SourceStream:
    """The same part in windows of whole documents."""
    return SourceStream(
        stream.name, stream.file, stream.languages, seq_length=stream.seq_length, seed=stream.seed, part=stream.part,
        whole_documents=True, eod_mask_loss=stream.eod_mask_loss, cache=cache,
    )  # fmt: skip


class Evaluation:
    """Held-out samples by number, in an order that is the same in every run. Pickled, it carries names of files."""

    def __init__(
        self, streams: Sequence[SourceStream], sources_N: np.ndarray, draws_N: np.ndarray, config: RunConfig
    ) -> None:
        """Made by :func:`build_evaluation`.

        Args:
            streams: the sources.
            sources_N: int32 [N]: the source of each sample.
            draws_N: int64 [N]: which of the source's windows it is.
            config: says how samples are read.
        """
        self.languages = list(streams[0].languages)
        """Codes; language ids of samples index them. They are those of the run."""
        self.source_names = [stream.name for stream in streams]
        """Source ids of samples index them. They are those of the run."""
        self.sources_N = sources_N
        """int32 [N]: the source of each sample."""
        self._streams = list(streams)
        self._draws_N = draws_N
        self._config = config
        self._reader = self._read()

    def __len__(self) -> int:
        return len(self.sources_N)

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """Sample ``sample`` as arrays [S], named as the fields of ``batch.Batch``."""
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {name: rows[0] for name, rows in self.batch([sample % len(self)]).items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reader = self._read()

    def batch(
        self, samples: Sequence[int] | np.ndarray, out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Read samples, as ``Blend.batch`` does: arrays [B, S] by name."""
        return self._reader.batch(samples, out)

    def _read(self) -> BlendReader:
        data = self._config.data
        return BlendReader(
            self._streams,
            _native.ListedSamples(self.sources_N, self._draws_N),
            seq_length=data.seq_length,
            padding_token=end_of_document([stream.file for stream in self._streams]),
            reset_position_ids=data.reset_position_ids,
            eod_mask_loss=data.eod_mask_loss,
        )

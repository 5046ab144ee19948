"""The samples of a run, drawn from its sources so that the mixture holds at every step.

Which source gives a sample (or, where documents are mixed, a document) is decided by counting the content tokens of
what was really drawn (``order``); then the samples of each global batch are turned and shuffled among themselves, so
that no data-parallel rank sees another mixture than the others. Sample k of a run depends on seed, sources, mixture and
global batch size only.
"""

# N samples, B samples of a batch, S sequence, J sources

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_xalign.config import RunConfig
from megatron_xalign.data.audit import audit_order, describe_audit, miss
from megatron_xalign.data.blend_reader import BlendReader
from megatron_xalign.data.index_cache import IndexCache, file_identity
from megatron_xalign.data.mixture import MixturePlan, plan_mixture
from megatron_xalign.data.order import Order, build_order, reopen, sample_index
from megatron_xalign.data.source_stream import SourceStream
from megatron_xalign.data.sources import end_of_document, open_sources, text_of
from megatron_xalign.errors import CorpusError

__all__ = ["Blend", "build_blend", "describe_audit", "readable_samples"]

# Tokens that the entropy of the mixture is taken from, over all sources; and of each at least so many.
_ENTROPY_TOKENS = 1 << 26
_ENTROPY_TOKENS_OF_SOURCE = 1 << 14
_COUNTED_AT_A_TIME = 1 << 20


def build_blend(config: RunConfig) -> Blend:
    """Build the index of a run's samples, or open the one that is kept, and check it against what was asked.

    Args:
        config: ``data`` and ``training`` of it are used.

    Returns:
        The samples; ``blend.train_steps`` steps of ``training.global_batch_size``.

    Raises:
        ConfigError: the sources cannot give what is asked.
        CorpusError: a source has less text than a sample, or the built index misses what was asked.
        FormatError: a token file is damaged, or two were made with different tokenizers.
    """
    cache = IndexCache.at(config.data.index_cache_dir)
    streams = open_sources(config.data, "train", cache)
    plan = plan_mixture(
        config.data.mixture,
        [text_of(stream, source) for stream, source in zip(streams, config.data.sources, strict=True)],
        seq_length=config.data.seq_length,
        train_steps=config.training.train_steps,
        global_batch_size=config.training.global_batch_size,
    )
    blend = Blend(plan, streams, build_order(plan, streams, cache), config)
    if reason := miss(blend.audit()):
        raise CorpusError(reason)
    return blend


class Blend:
    """The samples of a run, by number. Pickled, it carries names of files and not what is in them."""

    def __init__(self, plan: MixturePlan, streams: Sequence[SourceStream], order: Order, config: RunConfig) -> None:
        """Made by :func:`build_blend`.

        Args:
            plan: what the blend holds to.
            streams: the sources.
            order: what was chosen.
            config: says how samples are read.
        """
        self.plan = plan
        self.windows = list(streams)
        """The sources; ``.file`` of each is its token file."""
        self.languages = list(plan.languages)
        """Codes; language ids of samples index them."""
        self.source_names = [item.text.name for item in plan.sources]
        """Source ids of samples index them."""
        self.train_steps = plan.train_steps
        """Steps of the run; more than ``training.train_steps`` with ``budget_rule: add``."""
        self.order = order
        """Which source gives each window or document."""
        self._config = config

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """Sample ``sample`` of the run as arrays [S], named as the fields of ``batch.Batch``."""
        return {name: rows[0] for name, rows in self.batch([self._number(sample)]).items()}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("index", "_reader")}
        if self.order.folder is not None:
            state["order"] = self.order.folder
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not isinstance(self.order, Order):
            self.order = reopen(self.order, self.plan)

    @property
    def files(self) -> list[Any]:
        """The token files of the sources."""
        return [stream.file for stream in self.windows]

    def fingerprint(self) -> dict[str, Any]:
        """By what the content of each source is known, JSON-able; the same wherever the files lie."""
        named: dict[str, Any] = {}
        for name, file in zip(self.source_names, self.files, strict=True):
            identity = file_identity(file)
            # Copies of Megatron's own files have other times of modification.
            sizes = {kind: value[0] if isinstance(value, list) else value for kind, value in identity.items()}
            named[name] = sizes
        return named

    @property
    def drawn(self) -> np.ndarray:
        """int64 [J]: windows (or documents) each source gives."""
        return self.order.drawn_J

    @cached_property
    def index(self) -> Any:
        """What each sample is made of, as the C++ library has it."""
        return sample_index(self.plan, self.order)

    @cached_property
    def _reader(self) -> BlendReader:
        data = self._config.data
        return BlendReader(
            self.windows,
            self.index,
            seq_length=self.plan.seq_length,
            padding_token=end_of_document(self.files),
            reset_position_ids=data.reset_position_ids,
            eod_mask_loss=data.eod_mask_loss,
        )

    def batch(
        self, samples: Sequence[int] | np.ndarray, out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Read samples.

        Args:
            samples: their numbers, in any order.
            out: arrays to fill, as an earlier call returned them for as many samples; new ones if left out.

        Returns:
            Arrays [B, S], named as the fields of ``batch.Batch``.
        """
        return self._reader.batch(samples, out)

    def origin_of(self, sample: int) -> tuple[int, int]:
        """Where a sample comes from.

        Args:
            sample: its number.

        Returns:
            Index of the source, and which of the source's windows it is, counted over all epochs. Where documents are
            mixed, source and number of the document that the sample begins in.
        """
        number = self._number(sample)
        if self.order.borders_N is None:
            return self.index.origin(number)
        row, _, _ = self.index.border(number)
        return self.index.rows_from(row, 1)[0]

    def audit(self, data_parallel_sizes: Sequence[int] = ()) -> dict[str, Any]:
        """Count what the built index holds against what was asked (docs/architecture.md, audit.json).

        Args:
            data_parallel_sizes: numbers of data-parallel ranks for which every rank's part is counted.
        """
        return audit_order(self.plan, self.order, self.windows, data_parallel_sizes)

    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies of the mixture, in nats per token: what a model that knows only them loses.

        Frequencies are those of the beginning of each source's file, weighted by the tokens it gives.
        """
        tokens_J = self.order.tally.tokens_J
        num_used = max(int(np.count_nonzero(tokens_J)), 1)
        most = max(_ENTROPY_TOKENS // num_used, _ENTROPY_TOKENS_OF_SOURCE)
        frequency_V = np.zeros(0)
        for stream, given in zip(self.windows, tokens_J.tolist(), strict=True):
            if not given:
                continue
            counts_V = np.zeros(0, dtype=np.int64)
            for begin in range(0, min(stream.file.num_tokens, most), _COUNTED_AT_A_TIME):
                end = min(begin + _COUNTED_AT_A_TIME, stream.file.num_tokens, most)
                counts_V = _added(counts_V, np.bincount(stream.file.tokens[begin:end]))
            frequency_V = _added(frequency_V, given / tokens_J.sum() * counts_V / counts_V.sum())
        seen = frequency_V[frequency_V > 0]
        return float(-(seen * np.log(seen)).sum())

    def _number(self, sample: int) -> int:
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return sample % len(self)


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two rows; the shorter one goes on with zeros."""
    shorter, longer = sorted((a, b), key=len)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total


def readable_samples(
    blend: Blend, decode: Callable[[list[int]], str], count: int, most_characters: int | None = None
) -> list[str]:
    """The first samples of a run as text, languages marked.

    Args:
        blend: the run's samples.
        decode: token ids to text.
        count: how many samples.
        most_characters: of a stretch of one language; the rest of it is left out.

    Returns:
        One text per sample: a heading, then a line for each stretch of one language; of mixed documents also a line
        for each document that begins.
    """
    shown = []
    for number in range(min(count, len(blend))):
        source, draw = blend.origin_of(number)
        sample = blend[number]
        lines = [f"sample {number}: {blend.source_names[source]} #{draw}"]
        columns = (sample[name].tolist() for name in ("source_ids", "document_ids", "language_ids", "tokens"))
        document = 0
        stretches = itertools.groupby(zip(*columns, strict=True), key=lambda token: token[:3])
        for (of_source, of_document, language), stretch in stretches:
            tokens = [token for *_, token in stretch]
            if of_document < 0:
                lines.append(f"  [padding] {len(tokens)} positions")
                continue
            if blend.plan.mixes_documents and of_document != document:
                document = of_document
                lines.append(f"  {blend.source_names[of_source]}:")
            mark = blend.languages[language] if language >= 0 else "-"
            text = decode(tokens).replace("\n", "\\n")
            if most_characters is not None and len(text) > most_characters:
                text = f"{text[:most_characters]}... ({len(tokens)} tokens)"
            lines.append(f"  [{mark}] {text}")
        shown.append("\n".join(lines))
    return shown

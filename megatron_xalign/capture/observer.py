"""Watches a run: probes the model at intervals, sums the stream of training batches, writes both to ``neurons/``.

Has the four moments of a training observer (``before_step``, ``after_step``, ``after_save``, ``close``), and a state
for checkpoints: the sums since the last probe.
"""

# K languages, L layers, F ffn width

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.capture.moments import StreamSums
from megatron_xalign.capture.probe import (
    COUNTED_TOKENS,
    POOLING,
    ForwardOnly,
    ProbeSentence,
    build_probe_batches,
    probe_sha256,
    run_probe,
)
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.config import RunConfig
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.neuron_stats import (
    Shard,
    ShardEntry,
    StatsIndex,
    begin_neuron_stats,
    finish_neuron_stats,
    stats_folder,
    write_shard,
)
from megatron_xalign.topology import LocalPart, ObserverState, Ranks

log = logging.getLogger(__name__)

_SUMS = ("sum_KLF", "sum_of_squares_KLF", "max_KLF", "positive_KLF", "gate_positive_KLF")


class NeuronObserver:
    """Probes at step 0, every ``probe_interval_steps`` and the last step; sums the stream between probes.

    A file of step n holds the probe of the model after n steps and the sums of the training batches since the file
    before. Checkpoints fall on probes, so a resumed run continues with empty sums and writes the same files; those of
    steps it does again are written again.

    Args:
        config: the run; ``config.capture`` says what is captured.
        model_chunks: this process's part of the model.
        ranks: this process's place among the others.
        current_batch: what the training loop announces micro-batches through.
        forward_only: runs batches through the model without training it.
        probe: tokenised held-out sentences; none turns the probe off.
        languages: codes that language ids of batches index.
        eod_id: end-of-document token.

    Raises:
        ConfigError: nothing is to be captured, or the model has a setting under which it could not be exact.
        CorpusError: a probe sentence does not fit the model.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model_chunks: Sequence[nn.Module],
        ranks: Ranks,
        current_batch: CurrentBatch,
        forward_only: ForwardOnly,
        probe: Sequence[ProbeSentence],
        languages: Sequence[str],
        eod_id: int,
    ) -> None:
        if config.capture is None:
            raise ValueError("config.capture is None: there is nothing to observe.")
        if not probe and not config.capture.stream:
            raise ConfigError(
                "capture.stream=false and there are no probe sentences (data.probe), so nothing would be captured; "
                "give one of them or leave out capture."
            )
        self._config = config
        self._capture = config.capture
        self._ranks = ranks
        self._forward_only = forward_only
        self._probe = tuple(probe)
        self._probe_sha256 = probe_sha256(probe) if probe else ""
        self._languages = tuple(languages)
        self._recorder = Recorder(model_chunks, ranks, current_batch, quantized=self._capture.quantized)
        self._batches = build_probe_batches(
            probe, languages, eod_id, self._capture.probe_batch_tokens, config.data.seq_length,
            multiple_of=math.lcm(
                ranks.tensor_size if self._recorder.sequence_parallel else 1, config.length_multiple_of
            ),
        )
        self._sums: StreamSums | None = None
        if self._capture.stream:
            width = self._recorder.neurons[1] - self._recorder.neurons[0]
            self._sums = StreamSums(len(languages), len(self._recorder.layers), width, ranks.device)
        self._window_first: int | None = None
        self._micro_batches = config.training.global_batch_size // (
            config.training.micro_batch_size * ranks.data_size
        )

    name = "neurons"

    def state(self) -> ObserverState:
        """The sums of the window that a checkpoint cuts in two, over all data-parallel ranks."""
        if self._sums is None or self._window_first is None:
            return {"window_first": None}, {}
        totals = self._totals()
        tokens_K = self._ranks.sum_over(self._sums.tokens_K, "data")
        return (
            {"window_first": self._window_first, "languages": list(self._languages), "tokens_K": tokens_K.tolist()},
            {name: self._part(total) for name, total in totals.items()},
        )

    def parts_of(self, values: Mapping[str, Any]) -> dict[str, LocalPart]:
        """Arrays that go with stored values, to be filled from a checkpoint.

        Raises:
            CheckpointError: they were summed for other languages, or this run does not sum.
        """
        if values["window_first"] is None:
            return {}
        if self._sums is None or tuple(values["languages"]) != self._languages:
            raise CheckpointError(
                f"the checkpoint holds neuron sums of {', '.join(values['languages'])} since step "
                f"{values['window_first']}; this run captures "
                f"{'no stream' if self._sums is None else ', '.join(self._languages)}. Resume with the settings of its "
                "config.yaml."
            )
        return {name: self._part(torch.empty_like(getattr(self._sums, name))) for name in _SUMS}

    def restore(self, state: ObserverState) -> None:
        """Go on from a state; one data-parallel rank holds the sums of all."""
        values, parts = state
        self._window_first = values["window_first"]
        if self._sums is None or self._window_first is None:
            return
        if self._ranks.data_rank == 0:
            self._sums.set({name: part.tensor for name, part in parts.items()}, values["tokens_K"])
        else:
            self._sums.reset()

    def before_step(self, step: int) -> None:
        """Probe the untrained model; listen to the coming step if it is one of those to be summed."""
        if step == 0:
            self._write(step)
        if self._sums is not None and self._window_first is None:
            self._sums.reset()
            self._window_first = step + 1
        if self._sums is not None and (step + 1) % self._capture.stream_interval_steps == 0:
            self._recorder.start(self._sums)

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stop listening; at every probe interval and at the last step probe and write.

        Raises:
            XAlignError: a layer was missed or counted twice in the step.
        """
        if self._recorder.listening:
            self._recorder.stop(self._micro_batches)
        if step % self._capture.probe_interval_steps == 0 or step == self._config.training.train_steps:
            self._write(step)
            self._window_first = None

    def after_save(self, step: int, path: Path) -> None:
        """Nothing: what is captured travels in the checkpoint."""

    def close(self) -> None:
        """Take all hooks away; called however training ended."""
        self._recorder.close()

    def _write(self, step: int) -> Path | None:
        """Probe, then write this step's folder; every process calls it."""
        arrays = self._probe_arrays() if self._probe else {}
        with_stream = self._sums is not None and self._window_first is not None
        if with_stream:
            arrays |= self._stream_arrays()
        if not arrays:
            return None
        index = StatsIndex(
            run_name=self._config.name,
            step=step,
            consumed_tokens=step * self._config.training.global_batch_size * self._config.data.seq_length,
            languages=self._languages,
            num_layers=self._recorder.num_layers,
            ffn_hidden_size=self._recorder.ffn_hidden_size,
            hidden_size=self._recorder.hidden_size,
            document_ids=tuple(sentence.document_id for sentence in self._probe),
            document_languages=tuple(sentence.language for sentence in self._probe),
            document_pairs=tuple(sentence.pair_id for sentence in self._probe),
            probe_sha256=self._probe_sha256,
            pooling=POOLING,
            counted_tokens=COUNTED_TOKENS,
            stream_first_step=self._window_first if with_stream else None,
            stream_last_step=step if with_stream else None,
            stream_interval_steps=self._capture.stream_interval_steps if with_stream else None,
        )
        return _write_together(stats_folder(self._config.output_dir, step), index, self._shard(arrays), self._ranks)

    def _probe_arrays(self) -> dict[str, np.ndarray]:
        result = run_probe(
            self._recorder, self._forward_only, self._batches, len(self._probe), len(self._languages), self._ranks
        )
        first, stop = self._residual_columns()
        arrays = {
            "probe_neuron_mean_DLF": result.neuron_mean_DLF,
            "probe_residual_mean_DMH": result.residual_mean_DMH[:, :, first:stop],
            "probe_gate_positive_KLF": result.gate_positive_KLF,
        }
        if self._holds_totals():
            tokens = np.array([len(sentence.tokens) for sentence in self._probe], dtype=np.int64)
            of_language = [self._languages.index(sentence.language) for sentence in self._probe]
            tokens_K = np.zeros(len(self._languages), dtype=np.int64)
            np.add.at(tokens_K, of_language, tokens)
            assert result.nll_D is not None
            arrays |= {
                "probe_tokens_D": tokens,
                "probe_bytes_D": np.array([sentence.num_bytes for sentence in self._probe], dtype=np.int64),
                "probe_nll_D": result.nll_D,
                "probe_tokens_K": tokens_K,
            }
        return arrays

    def _stream_arrays(self) -> dict[str, np.ndarray]:
        assert self._sums is not None
        totals = {f"stream_{name}": total for name, total in self._totals().items()}
        tokens_K = self._ranks.sum_over(self._sums.tokens_K, "data")
        if self._holds_totals():
            totals["stream_tokens_K"] = tokens_K
        return {name: total.cpu().numpy() for name, total in totals.items()}

    def _totals(self) -> dict[str, torch.Tensor]:
        """The sums over all data-parallel ranks, by their names in ``StreamSums``."""
        sums, ranks = self._sums, self._ranks
        assert sums is not None
        largest = torch.stack(ranks.gather_over(sums.max_KLF, "data")).amax(0)
        return {
            name: largest if name == "max_KLF" else ranks.sum_over(getattr(sums, name), "data") for name in _SUMS
        }

    def _part(self, tensor_KLF: torch.Tensor) -> LocalPart:
        return LocalPart(tensor=tensor_KLF, tensor_axis=2, pipeline_axis=1)

    def _holds_totals(self) -> bool:
        """Whether this process writes the arrays that no layer or neuron belongs to; the loss is known here."""
        return self._ranks.is_last_stage and self._ranks.tensor_rank == 0

    def _residual_columns(self) -> tuple[int, int]:
        # After the reductions all tensor-parallel ranks hold all coordinates; each writes its share.
        hidden, rank, size = self._recorder.hidden_size, self._ranks.tensor_rank, self._ranks.tensor_size
        return hidden * rank // size, hidden * (rank + 1) // size

    def _shard(self, arrays: Mapping[str, np.ndarray]) -> Shard:
        return Shard(
            tensor_rank=self._ranks.tensor_rank,
            pipeline_rank=self._ranks.pipeline_rank,
            layers=self._recorder.layers,
            neurons=self._recorder.neurons,
            residual_rows=self._recorder.residual_rows,
            residual_columns=self._residual_columns(),
            arrays=arrays,
        )


def _write_together(folder: Path, index: StatsIndex, shard: Shard, ranks: Ranks) -> Path:
    """Each process of the first model copy writes its shard; the first process of all completes the folder."""
    if ranks.rank == 0:
        begin_neuron_stats(folder)
    ranks.barrier()
    # What process 0 has to know of each shard, as numbers, so that nothing is pickled: size and SHA-256.
    note = torch.zeros(1 + 32, dtype=torch.int64)
    if ranks.data_rank == 0:
        entry = write_shard(folder, shard)
        note = torch.tensor([entry.size_bytes, *bytes.fromhex(entry.sha256)], dtype=torch.int64)
    place = torch.tensor([shard.tensor_rank, shard.pipeline_rank], dtype=torch.int64)
    notes = [note.tolist() for note in ranks.gather_over(torch.cat([place, note]).to(ranks.device), "world")]
    if ranks.rank == 0:
        entries = [
            ShardEntry(Shard.name_of(tensor, pipeline), size, bytes(sha256).hex())
            for tensor, pipeline, size, *sha256 in notes
            if size
        ]
        finish_neuron_stats(folder, index, entries)
        log.debug("neuron statistics of step %d: %s", index.step, folder)
    ranks.barrier()
    return folder

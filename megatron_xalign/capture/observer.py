"""Watches a run: probes the model at intervals, sums the stream of training batches, writes both to ``neurons/``.

Has the four moments of a training observer (``before_step``, ``after_step``, ``after_save``, ``close``), and a state
for checkpoints: the sums since the last probe.
"""

# K languages, L layers, F ffn width

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.batch_sizes import batch_sizes
from megatron_xalign.capture.moments import StreamSums
from megatron_xalign.capture.probe import (
    COUNTED_TOKENS,
    POOLING,
    ForwardOnly,
    ProbeResult,
    ProbeSentence,
    build_probe_batches,
    length_multiple,
    probe_arrays,
    probe_sha256,
    run_probe,
)
from megatron_xalign.capture.recorder import Recorder, Together
from megatron_xalign.capture.samples import NeuronSamples
from megatron_xalign.capture.scores import ScoreFunctions, append_scores, numbers_by_layer, score_probe, score_stream
from megatron_xalign.capture.writing import agree, error_of, holds_totals, residual_columns, write_statistics
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import to_tree
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats import neuron_samples
from megatron_xalign.formats.neuron_stats import StatsIndex, stats_folder
from megatron_xalign.topology import LocalPart, ObserverState, Ranks

log = logging.getLogger(__name__)

_SUMS = ("sum_KLF", "sum_of_squares_KLF", "max_KLF", "positive_KLF", "gate_positive_KLF")
_SAMPLE = "sample."
_HIDDEN_SUMS = ("residual_sums_2KMH", "attention_sums_2KLH")


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
        score: the measures to log at every probe; None logs none.

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
        score: ScoreFunctions | None = None,
    ) -> None:
        if config.capture is None:
            raise ValueError("config.capture is None: there is nothing to observe.")
        if not probe and not config.capture.stream and config.capture.sample is None:
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
        self._recorder = Recorder(
            model_chunks, ranks, current_batch, layers=self._capture.layers, defer_errors=True,
            quantized=self._capture.quantized,
        )
        self._batches = build_probe_batches(
            probe, languages, eod_id, self._capture.probe_batch_tokens, config.data.seq_length,
            multiple_of=length_multiple(self._recorder, ranks, config.length_multiple_of),
        )
        self._sums: StreamSums | None = None
        if self._capture.stream:
            self._sums = StreamSums(
                len(languages), len(self._recorder.layers), self._recorder.neurons[1] - self._recorder.neurons[0],
                ranks.device, self._recorder.hidden_size,
                len(self._recorder.residual_rows) if self._capture.stream_residual else 0,
                self._capture.stream_attention,
            )
        self._samples: NeuronSamples | None = None
        if self._capture.sample is not None:
            self._samples = NeuronSamples(self._capture.sample, len(languages), self._recorder, ranks)
        self._disabled = False
        self._score = score if self._capture.score_pairs else None
        self._scores: dict[str, Any] = {}
        self._window_first: int | None = None
        self._sizes = batch_sizes(config.training)
        # Where a step may be passed over, what is kept before it, so that nothing of the step stays.
        policies = (config.training.nonfinite_policy, config.training.loss_spike_policy)
        self._may_pass_over = "skip" in policies or "rewind" in policies
        self._before: list[tuple[Any, Any]] = []
        self._last_step = 0
        self._left_out: list[int] = []

    name = "neurons"

    def state(self) -> ObserverState:
        """What is kept of the window that a checkpoint cuts in two, over all data- and context-parallel ranks."""
        if self._window_first is None:
            return {"window_first": None}, {}
        values: dict[str, Any] = {
            "window_first": self._window_first, "languages": list(self._languages), "captured": self._what_is_kept(),
            "last_step": self._last_step, "left_out_steps": self._left_out,
        }
        parts: dict[str, LocalPart] = {}
        if self._sums is not None:
            totals = self._totals()
            values["tokens_K"] = self._tokens().tolist()
            parts |= {key: self._part(totals[name][cut], name) for key, (name, cut) in self._pieces().items()}
        if self._samples is not None:
            joined = self._samples.joined(self._ranks)
            parts |= {f"{_SAMPLE}{name}": LocalPart(tensor=array) for name, array in joined.items()}
        return values, parts

    def parts_of(self, values: Mapping[str, Any]) -> dict[str, LocalPart]:
        """Arrays that go with stored values, to be filled from a checkpoint.

        Raises:
            CheckpointError: they were taken of something else than this run takes.
        """
        if values["window_first"] is None:
            return {}
        own = {"languages": list(self._languages), "captured": self._what_is_kept()}
        for name, value in own.items():
            if values[name] != value:
                raise CheckpointError(
                    f"the checkpoint holds neuron sums since step {values['window_first']} of {name} {values[name]}; "
                    f"this run captures {value}. Resume with the settings of its config.yaml."
                )
        parts: dict[str, LocalPart] = {}
        if self._sums is not None:
            parts |= {
                key: self._part(torch.empty_like(getattr(self._sums, name)[cut]), name)
                for key, (name, cut) in self._pieces().items()
            }
        if self._samples is not None:
            parts |= {
                f"{_SAMPLE}{name}": LocalPart(tensor=torch.empty_like(array))
                for name, array in self._samples.arrays.items()
            }
        return parts

    def restore(self, state: ObserverState) -> None:
        """Go on from a state; one data- and context-parallel rank holds what was kept by all."""
        values, parts = state
        self._window_first = values["window_first"]
        # In the middle of a step, where the run goes back to a checkpoint: what was kept before the step is of no use.
        self._before = []
        self._left_out = list(values.get("left_out_steps", ()))
        self._last_step = values.get("last_step", self._last_step)
        for kept in self._kept():
            kept.reset()
        if self._window_first is None or self._ranks.data_context_rank > 0:
            return
        if self._sums is not None:
            self._sums.tokens_K += torch.tensor(values["tokens_K"], device=self._ranks.device)
            for key, (name, cut) in self._pieces().items():
                # Sums over tokens are whole in what was saved; under sequence parallelism each rank then adds those of
                # its own tokens to its own.
                if not (name in _HIDDEN_SUMS and self._recorder.sequence_parallel and self._ranks.tensor_rank > 0):
                    getattr(self._sums, name)[cut].copy_(parts[key].tensor)
        if self._samples is not None:
            self._samples.set({
                key.removeprefix(_SAMPLE): part.tensor for key, part in parts.items() if key.startswith(_SAMPLE)
            })

    def before_step(self, step: int) -> None:
        """Probe the untrained model; listen to the coming step if it is one of those to be summed."""
        if self._disabled:
            return
        if step == 0:
            with self._guarded("before the first step"):
                self._write(step)
        kept = self._kept()
        if not kept:
            return
        if self._window_first is None:
            for one in kept:
                one.reset()
            self._window_first, self._last_step, self._left_out = step + 1, step, []
        if (step + 1) % self._capture.stream_interval_steps == 0:
            if self._samples is not None:
                self._samples.step = step + 1
            self._before = [(one, one.copy()) for one in kept] if self._may_pass_over else []
            self._recorder.start(kept[0] if len(kept) == 1 else Together(kept))

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stop listening; at every probe interval and at the last step probe and write.

        Raises:
            XAlignError: a layer was missed or counted twice in the step, here or in another process, or a file could
                not be written; unless ``capture.on_error`` is ``disable``.
        """
        if self._disabled:
            return
        with self._guarded(f"after step {step}"):
            if self._recorder.listening:
                agree(self._ranks, error_of(lambda: self._recorder.stop(self._micro_batches(step))))
            if metrics.get("passed_over"):
                self._leave_out(step)
            self._before, self._last_step = [], step
            if step == 1 and self._scores and isinstance(metrics, MutableMapping):
                # Of the untrained model; nobody hears of anything before the first step.
                metrics["scores_at_start"] = numbers_by_layer(self._scores)
            if step % self._capture.probe_interval_steps == 0 or step == self._sizes.num_steps:
                self._write(step)
                self._window_first = None
                if self._scores and isinstance(metrics, MutableMapping):
                    # For observers that hear of this step later: the first in the run's list is the last.
                    metrics["scores"] = numbers_by_layer(self._scores)

    def after_save(self, step: int, path: Path) -> None:
        """Nothing: what is captured travels in the checkpoint."""

    def close(self) -> None:
        """Take all hooks away; called however training ended."""
        self._recorder.close()

    def _micro_batches(self, step: int) -> int:
        """Micro-batches of this process in a step, counted from 1."""
        at_once = self._config.training.micro_batch_size * self._ranks.data_size
        return self._sizes.size_of(step - 1) // at_once

    def _consumed_tokens(self, step: int) -> int:
        return self._sizes.samples_before(step) * self._config.data.seq_length

    def _leave_out(self, step: int) -> None:
        """Forget what a step gave that was passed over; after going back to a checkpoint, note all steps since."""
        for one, before in self._before:
            one.put_back(before)
        if self._window_first is not None:
            self._left_out += range(max(self._last_step + 1, self._window_first), step + 1)

    @contextmanager
    def _guarded(self, when: str) -> Iterator[None]:
        """Where the run asks for it, let an error end capture and not the run. All processes see it at one moment."""
        try:
            yield
        except Exception as error:
            if self._capture.on_error != "disable":
                raise
            self._recorder.close()
            self._disabled, self._sums, self._samples, self._window_first = True, None, None, None
            log.warning(
                "capture failed %s and is off for the rest of this run, as capture.on_error=disable asks; training "
                "goes on. No further statistics are written. The error: %s", when, error, exc_info=error,
            )

    def _write(self, step: int) -> Path | None:
        """Probe, then write this step's folder; every process calls it."""
        arrays: dict[str, np.ndarray] = {}
        self._scores = {}
        if self._probe:
            result = run_probe(
                self._recorder, self._forward_only, self._batches, len(self._probe), len(self._languages), self._ranks
            )
            self._score_probe(result)
            arrays |= probe_arrays(result, self._probe, self._languages, self._recorder, self._ranks)
        with_stream = self._sums is not None and self._window_first is not None
        if with_stream:
            arrays |= self._stream_arrays()
            self._score_stream(arrays["stream_gate_positive_KLF"])
        if self._scores and self._ranks.rank == 0:
            line = {"step": step, "consumed_tokens": self._consumed_tokens(step), **self._scores}
            append_scores(self._config.output_dir, line)
        if self._samples is not None and self._window_first is not None:
            self._write_samples(step, self._window_first)
        if not self._probe and not with_stream:
            return None
        index = StatsIndex(
            run_name=self._config.name,
            step=step,
            consumed_tokens=self._consumed_tokens(step),
            languages=self._languages,
            num_layers=self._recorder.num_layers,
            ffn_hidden_size=self._recorder.ffn_hidden_size,
            hidden_size=self._recorder.hidden_size,
            layers=self._capture.layers,
            document_ids=tuple(sentence.document_id for sentence in self._probe),
            document_languages=tuple(sentence.language for sentence in self._probe),
            document_pairs=tuple(sentence.pair_id for sentence in self._probe),
            probe_sha256=self._probe_sha256,
            pooling=POOLING,
            counted_tokens=COUNTED_TOKENS,
            stream_first_step=self._window_first if with_stream else None,
            stream_last_step=step if with_stream else None,
            stream_interval_steps=self._capture.stream_interval_steps if with_stream else None,
            stream_left_out_steps=tuple(self._left_out) if with_stream else (),
            stream_residual=with_stream and self._capture.stream_residual,
            stream_attention=with_stream and self._capture.stream_attention,
        )
        folder = stats_folder(self._config.output_dir, step)
        return write_statistics(folder, index, arrays, self._recorder, self._ranks)

    def _write_samples(self, step: int, first_step: int) -> None:
        assert self._samples is not None and self._capture.sample is not None
        arrays = {name: array.cpu().numpy() for name, array in self._samples.joined(self._ranks).items()}
        samples = neuron_samples.NeuronSamples(
            step=step, languages=self._languages, neurons=self._samples.neurons, first_step=first_step,
            seed=self._capture.sample.seed, arrays=arrays,
        )

        def write() -> None:
            if self._ranks.rank == 0:
                path = neuron_samples.samples_path(self._config.output_dir, step)
                neuron_samples.write_samples(path, samples)

        agree(self._ranks, error_of(write))

    def _kept(self) -> list[Any]:
        """What listens to training batches."""
        return [one for one in (self._sums, self._samples) if one is not None]

    @property
    def _captured(self) -> Sequence[int]:
        """Captured layers over all processes, in order."""
        return self._capture.layers or range(self._recorder.num_layers)

    def _score_probe(self, result: ProbeResult) -> None:
        if self._score is not None:
            self._scores |= score_probe(
                result, self._probe, self._languages, self._recorder, self._captured, self._ranks, self._score,
                self._capture.score_pairs,
            )

    def _score_stream(self, gate_positive_KLF: np.ndarray) -> None:
        if self._score is not None:
            tokens_K = self._tokens().cpu().numpy()
            self._scores |= score_stream(
                gate_positive_KLF, tokens_K, self._languages, self._recorder, self._captured, self._ranks, self._score
            )

    def _stream_arrays(self) -> dict[str, np.ndarray]:
        totals = self._totals()
        arrays = {f"stream_{name}": totals[name] for name in _SUMS}
        first, stop = residual_columns(self._recorder, self._ranks)
        for kind, axes in (("residual", "2KMH"), ("attention", "2KLH")):
            if getattr(self._capture, f"stream_{kind}"):
                sums = totals[f"{kind}_sums_{axes}"][..., first:stop]
                arrays[f"stream_{kind}_sum_{axes[1:]}"], arrays[f"stream_{kind}_sum_of_squares_{axes[1:]}"] = sums
        tokens_K = self._tokens()
        if holds_totals(self._ranks):
            arrays["stream_tokens_K"] = tokens_K
        return {name: total.cpu().numpy() for name, total in arrays.items()}

    def _totals(self) -> dict[str, torch.Tensor]:
        """The sums over all data- and context-parallel ranks, by their names in ``StreamSums``."""
        sums, ranks = self._sums, self._ranks
        assert sums is not None
        totals = {
            name: ranks.sum_over(getattr(sums, name), "data_context") for name in self._names() if name != "max_KLF"
        }
        totals["max_KLF"] = torch.stack(ranks.gather_over(sums.max_KLF, "data_context")).amax(0)
        if self._recorder.sequence_parallel:
            # In one order on all processes, as collectives must be.
            for name in (name for name in _HIDDEN_SUMS if name in totals):
                totals[name] = ranks.sum_over(totals[name], "tensor")
        return totals

    def _tokens(self) -> torch.Tensor:
        """int64 [K]: tokens counted, over all data- and context-parallel ranks."""
        assert self._sums is not None
        tokens_K = self._ranks.sum_over(self._sums.tokens_K, "data_context")
        # A stage that holds none of the layers asked for counts none; all others count the same.
        return torch.stack(self._ranks.gather_over(tokens_K, "pipeline")).amax(0)

    def _names(self) -> tuple[str, ...]:
        kinds = (self._capture.stream_residual, self._capture.stream_attention)
        return (*_SUMS, *(name for name, wanted in zip(_HIDDEN_SUMS, kinds, strict=True) if wanted))

    def _what_is_kept(self) -> dict[str, Any]:
        capture = self._capture
        return {
            "layers": None if capture.layers is None else list(capture.layers),
            "stream": self._sums is not None,
            "residual": capture.stream_residual,
            "attention": capture.stream_attention,
            # As JSON gives it back.
            "sample": None if capture.sample is None else json.loads(json.dumps(to_tree(capture.sample))),
        }

    def _pieces(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """What goes into a checkpoint: for each array there, which of the sums it is and which part of it.

        An array for each layer, so that a run can go on with another pipeline layout.
        """
        layers, rows = self._recorder.layers, self._recorder.residual_rows
        everything = slice(None)
        pieces: dict[str, tuple[str, tuple[Any, ...]]] = {}
        for name in self._names():
            if name == "residual_sums_2KMH":
                pieces |= {f"{name}.{row}": (name, (everything, everything, n)) for n, row in enumerate(rows)}
            elif name == "attention_sums_2KLH":
                pieces |= {f"{name}.{layer}": (name, (everything, everything, n)) for n, layer in enumerate(layers)}
            else:
                pieces |= {f"{name}.{layer}": (name, (everything, n)) for n, layer in enumerate(layers)}
        return pieces

    def _part(self, tensor: torch.Tensor, name: str) -> LocalPart:
        return LocalPart(
            tensor=tensor.contiguous(), tensor_axis=None if name in _HIDDEN_SUMS else 1, of_stage=True
        )

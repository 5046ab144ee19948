"""Observers of one's own: they watch a run, and go on with it from a checkpoint.

xalign train RUN.yaml with

    observers:
    - factory: examples/observers.py:LanguageGap
      options: {first: eng_Latn, second: fin_Latn}
    - factory: examples/observers.py:MlpNorms
      options: {interval_steps: 50}

docs/training.md says what is called when; ``RunContext`` (megatron_xalign/training/observers.py), what one is given.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.errors import ConfigError
from megatron_xalign.topology import LocalPart, ObserverState
from megatron_xalign.training.checkpoint import unwrap
from megatron_xalign.training.metrics import append_metrics, truncate_metrics
from megatron_xalign.training.observers import RunContext


class LanguageGap:
    """How much higher one language's loss is than another's, smoothed over time; for TensorBoard and the like.

    Args:
        run: the run.
        first: the one, such as eng_Latn.
        second: the other.
        half_life_steps: after so many steps a value counts half.
    """

    name = "language_gap"

    def __init__(self, run: RunContext, first: str, second: str, half_life_steps: float = 100.0) -> None:
        for language in (first, second):
            if language not in run.languages:
                raise ConfigError(f"LanguageGap: {language} is not among the run's languages {list(run.languages)}.")
        self._first, self._second, self._half_life = first, second, half_life_steps
        self._gap: float | None = None
        self._step = 0

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """At logged steps: what is added to the metrics here, trackers get to see."""
        losses = metrics.get("loss_by_language", {})
        if self._first not in losses or self._second not in losses:
            return
        gap = losses[self._second] - losses[self._first]
        if self._gap is not None:
            weight = 0.5 ** ((step - self._step) / self._half_life)
            gap = weight * self._gap + (1 - weight) * gap
        self._gap, self._step = gap, step
        if isinstance(metrics, MutableMapping):
            metrics["language_gap"] = gap

    def after_save(self, step: int, path: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def state(self) -> ObserverState:
        """Numbers go into the checkpoint as they are."""
        return {"gap": self._gap, "step": self._step}, {}

    def restore(self, state: ObserverState) -> None:
        """Go on with them."""
        self._gap, self._step = state[0]["gap"], state[0]["step"]


class MlpNorms:
    """How long the rows that a layer's neurons write with have become since the start: ``mlp_norms.jsonl`` in the run.

    On any layout: a tensor-parallel process has some of a layer's neurons, a pipeline stage some of the layers.

    Args:
        run: the run.
        interval_steps: between lines.
    """

    name = "mlp_norms"

    def __init__(self, run: RunContext, interval_steps: int = 100) -> None:
        self._run, self._interval = run, interval_steps
        self._path = run.run_folder / "mlp_norms.jsonl"
        self._at_start_L = self._norms()
        if run.ranks.rank == 0:
            truncate_metrics(self._path, run.start_step)

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Every process takes part; the first writes."""
        if step % self._interval and step != self._run.train_steps:
            return
        growth_L = self._norms() / self._at_start_L
        if self._run.ranks.rank == 0:
            append_metrics(self._path, {"step": step, "growth_by_layer": growth_L.tolist()})

    def after_save(self, step: int, path: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def state(self) -> ObserverState:
        """The norms at the start; without them a run that goes on would begin to count anew."""
        return {}, {"at_start": LocalPart(tensor=self._at_start_L)}

    def parts_of(self, values: Mapping[str, Any]) -> dict[str, LocalPart]:
        """What the arrays of a state look like; their content comes from the checkpoint."""
        return {"at_start": LocalPart(tensor=torch.empty_like(self._at_start_L))}

    def restore(self, state: ObserverState) -> None:
        """Go on."""
        self._at_start_L = state[1]["at_start"].tensor

    def _norms(self) -> torch.Tensor:
        """float64 [L]: Frobenius norm of every layer's ``mlp.linear_fc2``, the same on all processes."""
        ranks = self._run.ranks
        squares_L = torch.zeros(self._run.config.model.num_layers, dtype=torch.float64, device=ranks.device)
        for chunk in self._run.model_chunks:
            for layer in unwrap(chunk).decoder.layers:
                # Megatron counts layers from 1, over the whole model.
                squares_L[layer.layer_number - 1] = layer.mlp.linear_fc2.weight.detach().double().square().sum()
        return ranks.sum_over(ranks.sum_over(squares_L, "tensor"), "pipeline").sqrt()

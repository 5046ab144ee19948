"""What is recorded of a run: capture, logging, observers of the user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_xalign.config.checks import require
from megatron_xalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Tokens that are kept with their text, to see what chosen neurons fire on."""

    neurons: dict[str, tuple[int, ...]]
    """Layer to neurons, both counting from 0: ``{3: [17, 40]}``."""
    tokens_per_language: int = 256
    """Tokens of each language kept of a window, drawn without regard to activations."""
    top: int = 16
    """Tokens of the largest activations kept for each neuron."""
    context_tokens: int = 16
    """Tokens of text kept on either side."""
    seed: int = 1234
    """Of the draw."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_language", "top"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(self.context_tokens >= 0, f"context_tokens={self.context_tokens} is negative.")
        require(0 <= self.seed < 1 << 32, f"seed={self.seed} is outside 0..4294967295.")
        for layer, neurons in self.neurons.items():
            require(layer.isdecimal(), f"neurons.{layer}: layers are numbers from 0, such as {{3: [17, 40]}}.")
            require(
                bool(neurons) and min(neurons) >= 0 and len(set(neurons)) == len(neurons),
                f"neurons.{layer}={list(neurons)} must be different numbers from 0.",
            )
        require(bool(self.neurons), "neurons={} names no neuron; {3: [17, 40]} names two of layer 3.")

    @property
    def chosen(self) -> list[tuple[int, int]]:
        """(layer, neuron) of each, in order."""
        return sorted((int(layer), neuron) for layer, neurons in self.neurons.items() for neuron in neurons)


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What is recorded of the model's insides while it trains (docs/capture.md)."""

    probe_interval_steps: int = 50
    """Steps between probes (and between files in ``neurons/``); step 0 and the last step are always probed."""
    probe_batch_tokens: int = 4096
    """Padded tokens of one probe forward pass."""
    stream: bool = True
    """Whether per-language neuron sums are taken from the training batches."""
    stream_interval_steps: int = 1
    """Take the sums at every n-th step."""
    layers: tuple[int, ...] | None = None
    """Layers to capture, counting from 0; all if left out."""
    stream_residual: bool = False
    """Whether the stream also sums the residual stream, per language and coordinate."""
    stream_attention: bool = False
    """Whether it also sums what attention adds to the residual stream."""
    sample: SampleConfig | None = None
    """Neurons whose tokens are kept with their text; none if left out."""
    score_pairs: int = 512
    """Probe pairs that scores (``scores.jsonl``) are computed on at every probe; 0: no scores at all."""
    on_error: Literal["stop", "disable"] = "stop"
    """What becomes of the run when capture fails: it stops, or goes on without capture and says so in its log."""
    quantized: bool = False
    """Record neurons as an FP8 product reads them, not as they are before; with FP8 layers of this project only."""

    def __post_init__(self) -> None:
        for name in ("probe_interval_steps", "probe_batch_tokens", "stream_interval_steps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(self.score_pairs >= 0, f"score_pairs={self.score_pairs} is negative; 0 computes no scores.")
        if self.layers is not None:
            require(
                bool(self.layers) and min(self.layers) >= 0 and list(self.layers) == sorted(set(self.layers)),
                f"layers={list(self.layers)} must be layer numbers in order, counting from 0, such as [0, 6, 12].",
            )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where the numbers of ``metrics.jsonl`` go besides that file."""

    tensorboard: bool = True
    """Write them to ``tensorboard/`` in the run folder; looking at them takes ``pip install tensorboard``."""
    wandb_project: str | None = None
    """Project of Weights & Biases; none if left out."""
    wandb_mode: Literal["online", "offline"] = "online"
    """``offline`` writes to the run folder, for ``wandb sync`` later; compute nodes often see no network."""
    mlflow_experiment: str | None = None
    """Experiment of MLflow; none if left out."""
    mlflow_tracking_uri: str | None = None
    """MLflow's server; ``MLFLOW_TRACKING_URI``, or else a folder of the run, if left out."""


@dataclass(frozen=True, kw_only=True)
class ObserverConfig:
    """An observer of the user's own; docs/training.md says how one is written."""

    factory: str
    """``FILE.py:NAME`` or ``package.module:NAME``: a class, or a function that returns an observer; called with the
    run (``RunContext``) and the options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments."""

    def __post_init__(self) -> None:
        place, _, name = self.factory.rpartition(":")
        require(
            bool(place) and name.isidentifier(),
            f"factory={self.factory!r} should be FILE.py:NAME or package.module:NAME.",
        )
        try:
            json.dumps(self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"options={self.options!r} should be of numbers, texts and lists: {error}.") from None

"""One training run: all its settings together, and the file they are read from."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from megatron_xalign.config.checks import require
from megatron_xalign.config.data import DataConfig
from megatron_xalign.config.model import ModelConfig
from megatron_xalign.config.parallel import ParallelConfig
from megatron_xalign.config.precision import (
    FP8_MULTIPLE_OF,
    BackendConfig,
    Fp8Config,
    Fp16Config,
    ParamsDtype,
    Precision,
    PrecisionConfig,
)
from megatron_xalign.config.training import OptimizerConfig, TrainingConfig
from megatron_xalign.config.tree import ConfigType, apply_override, from_tree, read_yaml
from megatron_xalign.config.watching import CaptureConfig, LoggingConfig, ObserverConfig
from megatron_xalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str = "run"
    """Shown in logs and reports."""
    output_dir: str = "run"
    """Run folder: config, metrics, checkpoints, neuron statistics."""
    seed: int = 1234
    """Initial weights (and dropout, where there is any)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its layout over processes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights move."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it reads."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long, in what batches."""
    precision: Precision = "fp32"
    """``bf16``, ``fp16`` (both keep fp32 main weights and gradients), ``fp32``, or ``{fp8: {recipe: ...}}``."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    """Whose kernels compute."""
    capture: CaptureConfig | None = None
    """What is watched; nothing if left out."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where its numbers go."""
    observers: tuple[ObserverConfig, ...] = ()
    """What else watches it: observers of the user's own."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name is empty.")
        require(self.seed >= 0, f"seed={self.seed} is negative.")
        tensor, pipeline = self.parallel.tensor_model_parallel_size, self.parallel.pipeline_model_parallel_size
        for name, size in (
            ("num_attention_heads", self.model.num_attention_heads),
            ("num_query_groups", self.model.query_groups),
            ("ffn_hidden_size", self.model.ffn_hidden_size),
        ):
            require(
                size % tensor == 0,
                f"model.{name}={size} is not divisible by parallel.tensor_model_parallel_size={tensor}.",
            )
        virtual, context = self.parallel.virtual_size, self.parallel.context_parallel_size
        require(
            self.model.num_layers % (pipeline * virtual) == 0,
            f"model.num_layers={self.model.num_layers} is not divisible by "
            f"parallel.pipeline_model_parallel_size={pipeline}"
            + (f" times parallel.virtual_pipeline_model_parallel_size={virtual}." if virtual > 1 else "."),
        )
        captured = self.capture.layers if self.capture is not None else None
        sampled = self.capture.sample.chosen if self.capture is not None and self.capture.sample is not None else []
        for layer, neuron in sampled:
            require(
                layer in (captured or range(self.model.num_layers)) and neuron < self.model.ffn_hidden_size,
                f"capture.sample.neurons names neuron {neuron} of layer {layer}, which is not captured: layers are "
                f"{list(captured or range(self.model.num_layers))}, neurons 0 to {self.model.ffn_hidden_size - 1}.",
            )
        require(
            captured is None or captured[-1] < self.model.num_layers,
            f"capture.layers={captured} names layers beyond the {self.model.num_layers} of model.num_layers, which "
            "are counted from 0.",
        )
        require(
            context == 1 or self.data.seq_length % (2 * context) == 0,
            f"data.seq_length={self.data.seq_length} is not divisible by {2 * context}, twice "
            f"parallel.context_parallel_size={context}: every process holds two chunks of a sequence.",
        )
        require(
            not self.parallel.sequence_parallel or self.data.seq_length // context % tensor == 0,
            f"data.seq_length={self.data.seq_length}"
            + (f" over parallel.context_parallel_size={context}" if context > 1 else "")
            + f" is not divisible by parallel.tensor_model_parallel_size={tensor}, which sequence_parallel needs.",
        )

    @classmethod
    def from_older(cls, tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """Settings as they are written now; configs of older runs and checkpoints say ``training.params_dtype``."""
        training = tree.get("training")
        if not isinstance(training, Mapping) or "params_dtype" not in training:
            return tree
        older = training["params_dtype"]
        if older not in get_args(ParamsDtype):
            raise ConfigError(
                f"{path}training.params_dtype={older!r} is not one of fp32, bf16, fp16; the setting is called "
                f"{path}precision now."
            )
        if tree.get("precision", older) != older:
            raise ConfigError(
                f"{path}training.params_dtype={older} and {path}precision={tree['precision']} say different things; "
                "leave out the first, which is the older name."
            )
        rest = {key: value for key, value in training.items() if key != "params_dtype"}
        return {**tree, "training": rest, "precision": older}

    @property
    def params_dtype(self) -> ParamsDtype:
        """Type of weights and activations."""
        if isinstance(self.precision, PrecisionConfig):
            return "bf16" if self.precision.fp8 is not None else "fp16"
        return self.precision

    @property
    def fp8(self) -> Fp8Config | None:
        """The FP8 settings; None where matrix products are of the type of weights."""
        return self.precision.fp8 if isinstance(self.precision, PrecisionConfig) else None

    @property
    def precision_name(self) -> str:
        """The precision in a few words: ``bf16``, ``FP8 (delayed, hybrid)``."""
        return self.params_dtype if self.fp8 is None else f"FP8 ({self.fp8.recipe}, {self.fp8.format})"

    @property
    def length_multiple_of(self) -> int:
        """What the padded length of a batch must be a multiple of: whole FP8 blocks on every rank."""
        if self.fp8 is None:
            return 1
        parts = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return FP8_MULTIPLE_OF[self.fp8.recipe] * parts

    @property
    def fp16(self) -> Fp16Config | None:
        """How the loss is scaled; None where it is not fp16."""
        if isinstance(self.precision, PrecisionConfig):
            return self.precision.fp16
        return Fp16Config() if self.precision == "fp16" else None

    @property
    def train_samples(self) -> int:
        """Samples of the whole run."""
        return self.training.train_steps * self.training.global_batch_size

    @property
    def parallel_fraction(self) -> float:
        """The parallel fraction that is asked for; of a schedule, its mean over ``train_tokens``."""
        return self.data.mixture.mean_fraction(self.train_tokens)

    @property
    def train_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train_samples * self.data.seq_length


def read_config(path: str | Path, overrides: Sequence[str] = (), into: type[ConfigType] | None = None) -> ConfigType:
    """Read a YAML file into a config dataclass.

    Args:
        path: the YAML file.
        overrides: ``path.to.key=value`` strings, applied after the file; values are YAML.
        into: the dataclass to build; ``RunConfig`` if left out.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    target: type[Any] = into or RunConfig
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return typing.cast(ConfigType, from_tree(target, tree))

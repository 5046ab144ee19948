"""Every knob of a training run as a frozen dataclass; YAML in, YAML out, overrides from the command line.

Precedence: field default, then YAML, then ``--set path.to.key=value``. An unknown key is an error that
names the nearest known one; so is a value of the wrong type. Field names are Megatron's where Megatron
has the thing.
"""

from __future__ import annotations

from megatron_xalign.config.data import DataConfig, MixtureConfig, SchedulePhase, SourceConfig
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
from megatron_xalign.config.run import RunConfig, read_config
from megatron_xalign.config.training import OptimizerConfig, TrainingConfig
from megatron_xalign.config.watching import CaptureConfig, LoggingConfig, ObserverConfig, SampleConfig

__all__ = [
    "FP8_MULTIPLE_OF", "BackendConfig", "CaptureConfig", "DataConfig", "Fp8Config", "Fp16Config", "LoggingConfig",
    "MixtureConfig", "ModelConfig", "ObserverConfig", "OptimizerConfig", "ParallelConfig", "ParamsDtype", "Precision",
    "PrecisionConfig", "RunConfig", "SampleConfig", "SchedulePhase", "SourceConfig", "TrainingConfig", "read_config",
]

"""What a precision means on this device, and in Megatron-Core's words; what cannot run is refused before it is built.

Nothing here imports torch or Megatron, so that `xalign doctor` and a dry run on a laptop ask the same questions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from megatron_xalign.config import FP8_MULTIPLE_OF, Fp8Config, RunConfig
from megatron_xalign.errors import ConfigError

Implementation = Literal["te", "own"]
"""Whose FP8: Transformer Engine's, or ``training.fp8_linear``."""

# By compute capability of NVIDIA devices, from Transformer Engine's documentation of its recipes.
_RECIPES = (
    ((10, 0), ("delayed", "tensorwise", "blockwise", "mxfp8")),
    ((9, 0), ("delayed", "tensorwise", "blockwise")),
    ((8, 9), ("delayed", "tensorwise")),
)
# The first Transformer Engine that Megatron-Core asks for each.
_TE_SINCE = {"delayed": "1.8.0", "tensorwise": "2.2.0", "blockwise": "2.3.0", "mxfp8": "2.1.0"}
OWN_RECIPES = ("delayed", "tensorwise")
"""What ``training.fp8_linear`` knows."""


@dataclass(frozen=True)
class Device:
    """What matters of the device a process computes on."""

    kind: Literal["cpu", "nvidia", "amd"]
    name: str = "CPU"
    capability: tuple[int, int] | None = None
    """Compute capability of an NVIDIA device."""

    @property
    def recipes(self) -> tuple[str, ...]:
        """FP8 recipes of Transformer Engine it has the hardware for."""
        return recipes_for(self.capability, self.kind == "amd")


def recipes_for(capability: tuple[int, int] | None, is_rocm: bool = False) -> tuple[str, ...]:
    """FP8 recipes of Transformer Engine that a device has the hardware for; none for AMD devices and older ones.

    Args:
        capability: compute capability of an NVIDIA device.
        is_rocm: the device is AMD's; Megatron's FP8 goes through Transformer Engine's CUDA kernels.
    """
    if capability is None or is_rocm:
        return ()
    return next((names for least, names in _RECIPES if capability >= least), ())


def check(config: RunConfig, implementation: Implementation, device: Device, te_version: str | None = None) -> None:
    """Raise if a run's precision cannot run on this device or does not fit its layout.

    Args:
        config: the run's.
        implementation: whose FP8 it would be; of no meaning without FP8.
        device: what this process computes on.
        te_version: of the Transformer Engine installed; None if it does not matter or there is none.

    Raises:
        ConfigError: with the setting, the reason and the way out.
    """
    if config.params_dtype == "bf16" and device.kind == "nvidia" and (device.capability or (0, 0)) < (8, 0):
        raise ConfigError(
            f"precision={_said(config)} needs compute capability 8.0; {device.name} has {_dotted(device.capability)}. "
            "Use precision: fp16."
        )
    fp8 = config.fp8
    if fp8 is None:
        if config.capture is not None and config.capture.quantized:
            raise ConfigError("capture.quantized=true has nothing to show without precision: {fp8: ...}; leave it out.")
        return
    _check_device(fp8, implementation, device)
    if implementation == "te":
        _check_te(fp8, te_version)
    else:
        _check_own(fp8)
    _check_first_and_last(config, fp8, implementation)
    _check_param_gather(config, fp8)
    _check_multiples(config, fp8)
    _check_recompute(config, fp8, implementation)
    _check_capture(config, implementation)


def megatron_settings(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` for Transformer Engine's FP8; the same in Megatron-Core 0.16.1 to 0.19.x."""
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }


def data_parallel_settings(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of ``DistributedDataParallelConfig`` for it."""
    return {} if fp8 is None else {"fp8_param_gather": fp8.param_gather}


def optimizer_settings(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of Megatron's ``OptimizerConfig`` for it."""
    return {} if fp8 is None else {"fp8_recipe": fp8.recipe}


def is_bf16_layer(fp8: Fp8Config, layer: int, num_layers: int) -> bool:
    """Whether a layer (global, 0-based) of an FP8 run stays in bf16."""
    return fp8.first_last_layers_bf16 and (
        layer < fp8.num_layers_at_start_in_bf16 or layer >= num_layers - fp8.num_layers_at_end_in_bf16
    )


def _said(config: RunConfig) -> str:
    return config.params_dtype if config.fp8 is None else f"{{fp8: {{recipe: {config.fp8.recipe}}}}}"


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else ".".join(map(str, capability))


def _check_device(fp8: Fp8Config, implementation: Implementation, device: Device) -> None:
    asked = f"precision.fp8.recipe={fp8.recipe}"
    if device.kind == "cpu":
        if implementation == "own":
            return
        raise ConfigError(
            f"{asked} needs an NVIDIA GPU of compute capability 8.9 or higher; there is none here. Use precision: "
            "bf16, or backend.layers=local, which tries this project's own FP8 arithmetic on the CPU, slowly."
        )
    if device.kind == "amd":
        raise ConfigError(
            f"{asked} needs an NVIDIA GPU; {device.name} is AMD's, for which Megatron-Core has no FP8. Use precision: "
            "bf16."
        )
    if fp8.recipe not in device.recipes:
        able = f"it can run {', '.join(device.recipes)}" if device.recipes else "it has no FP8"
        least = next(least for least, names in reversed(_RECIPES) if fp8.recipe in names)
        raise ConfigError(
            f"{asked} needs compute capability {_dotted(least)}; {device.name} has {_dotted(device.capability)}, "
            f"{able}. {'Use one of these, or' if device.recipes else 'Use'} precision: bf16."
        )


def _check_te(fp8: Fp8Config, te_version: str | None) -> None:
    if te_version is None:
        raise ConfigError(
            f"precision.fp8.recipe={fp8.recipe} needs Transformer Engine, which is not installed; `xalign doctor` says "
            "how to get it. Without it Megatron-Core would silently train in bf16."
        )
    if _numbers(te_version) < _numbers(_TE_SINCE[fp8.recipe]):
        raise ConfigError(
            f"precision.fp8.recipe={fp8.recipe} needs Transformer Engine {_TE_SINCE[fp8.recipe]} or newer; "
            f"{te_version} is installed."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _check_own(fp8: Fp8Config) -> None:
    if fp8.recipe not in OWN_RECIPES:
        raise ConfigError(
            f"precision.fp8.recipe={fp8.recipe} with backend.layers=local: this project's own FP8 layers know "
            f"{' and '.join(OWN_RECIPES)} only. Use one of them, or backend.layers=te."
        )
    if fp8.param_gather:
        raise ConfigError(
            "precision.fp8.param_gather=true with backend.layers=local: weights in FP8 are Transformer Engine's; leave "
            "it out, or use backend.layers=te."
        )


def _check_first_and_last(config: RunConfig, fp8: Fp8Config, implementation: Implementation) -> None:
    if not fp8.first_last_layers_bf16:
        return
    if implementation == "te" and fp8.recipe == "delayed":
        raise ConfigError(
            "precision.fp8.first_last_layers_bf16=true does not go with recipe=delayed: Transformer Engine then "
            "reduces all layers' histories in one context. Use recipe=tensorwise, or leave it out."
        )
    layers, stages = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        number = getattr(fp8, name)
        if number > layers // stages:
            raise ConfigError(
                f"precision.fp8.{name}={number} is more than the {layers // stages} layers of a pipeline stage."
            )
    if fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 >= layers:
        raise ConfigError(
            f"precision.fp8 keeps {fp8.num_layers_at_start_in_bf16} + {fp8.num_layers_at_end_in_bf16} of {layers} "
            "layers in bf16, which leaves none in FP8; use precision: bf16."
        )


def _check_param_gather(config: RunConfig, fp8: Fp8Config) -> None:
    if not fp8.param_gather:
        return
    if not config.parallel.use_distributed_optimizer:
        raise ConfigError(
            "precision.fp8.param_gather=true needs parallel.use_distributed_optimizer=true: what is gathered in FP8 "
            "are the weights that its shards have updated."
        )
    if fp8.recipe == "mxfp8":
        raise ConfigError(
            "precision.fp8.param_gather=true with recipe=mxfp8 makes Megatron-Core gather weights in the gradients' "
            "buffer, with overlap, which is not supported here. Leave param_gather out."
        )


def _check_multiples(config: RunConfig, fp8: Fp8Config) -> None:
    """Both axes of every matrix, on one rank, must be whole blocks; a ragged one fails in the middle of a kernel."""
    model, parallel, multiple = config.model, config.parallel, FP8_MULTIPLE_OF[fp8.recipe]
    tensor = parallel.tensor_model_parallel_size
    query, key = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
    tokens = config.data.seq_length * config.training.micro_batch_size
    along = f" / tensor_model_parallel_size={tensor}"
    # Transformer Engine quantises what a rank holds, before it is gathered.
    parts = getattr(parallel, "context_parallel_size", 1) * (tensor if parallel.sequence_parallel else 1)
    sizes = (
        ("model.hidden_size", model.hidden_size, 1, ""),
        ("model.ffn_hidden_size", model.ffn_hidden_size, tensor, along),
        ("the width of all query heads", query, tensor, along),
        ("the rows of query, key and value together", query + 2 * key, tensor, along),
        ("the tokens of a micro-batch on one rank (data.seq_length x training.micro_batch_size)", tokens, parts,
         f" / {parts}"),
    )
    for what, size, divisor, said in sizes:
        if size % (multiple * divisor):
            raise ConfigError(
                f"precision.fp8.recipe={fp8.recipe} works on blocks of {multiple}; {what}, {size}"
                f"{said if divisor > 1 else ''}, is not a multiple of {multiple}. Change it, the layout or the recipe, "
                "or use precision: bf16."
            )


def _check_recompute(config: RunConfig, fp8: Fp8Config, implementation: Implementation) -> None:
    recomputed = tuple(getattr(config.training, "recompute_modules", ()) or ())
    if implementation == "te" and fp8.recipe == "delayed" and "layernorm" in recomputed:
        raise ConfigError(
            "training.recompute_modules has layernorm, which Megatron-Core does not recompute with "
            "precision.fp8.recipe=delayed; leave it out, or use another recipe."
        )


def _check_capture(config: RunConfig, implementation: Implementation) -> None:
    if implementation == "te" and config.capture is not None and config.capture.quantized:
        raise ConfigError(
            "capture.quantized=true reads what this project's own FP8 layers quantise (backend.layers=local); "
            "Transformer Engine keeps its copy to itself. Leave it out: neurons are then recorded before quantisation."
        )

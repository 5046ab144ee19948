"""Types of numbers, and whose kernels compute with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_xalign.config.checks import require

FP8_MULTIPLE_OF = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""What both axes of a matrix must be a multiple of for each FP8 recipe."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix products of transformer layers in 8-bit floating point; everything else as in bf16 (docs/precision.md)."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How a tensor's scale is found: ``delayed`` from the largest values of past steps, ``tensorwise`` from the tensor
    itself, ``blockwise`` for blocks of 128, ``mxfp8`` for blocks of 32 (Blackwell)."""
    format: Literal["e4m3", "hybrid"] = "hybrid"
    """``hybrid`` gives gradients the wider range of E5M2; ``e4m3`` uses E4M3 for everything."""
    margin: int = 0
    """``delayed``: scales are divided by two to this power, room for values larger than any seen."""
    amax_history_len: int = 1024
    """``delayed``: how many past steps count."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """``delayed``: which of them gives the scale."""
    first_last_layers_bf16: bool = False
    """Whether the first and the last layers stay in bf16, which is where FP8 hurts most."""
    num_layers_at_start_in_bf16: int = 1
    """How many of the first ones."""
    num_layers_at_end_in_bf16: int = 1
    """How many of the last ones."""
    param_gather: bool = False
    """Keep weights in FP8 and gather them so from the distributed optimizer, which holds float32 main weights."""

    def __post_init__(self) -> None:
        require(0 <= self.margin <= 16, f"margin={self.margin} is outside 0..16; it is a power of two.")
        require(self.amax_history_len > 0, f"amax_history_len={self.amax_history_len} must be positive.")
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; 0 keeps none of them.")
        if self.recipe != "delayed":
            for name, default in (("margin", 0), ("amax_history_len", 1024), ("amax_compute_algo", "max")):
                require(
                    getattr(self, name) == default,
                    f"{name}={getattr(self, name)} belongs to recipe=delayed and does nothing with recipe="
                    f"{self.recipe}; leave it out.",
                )


@dataclass(frozen=True, kw_only=True)
class Fp16Config:
    """Weights and activations in fp16, with a scaled loss: small gradients would vanish otherwise."""

    loss_scale: float | None = None
    """A fixed scale; left out, the scale is halved when gradients overflow and doubled when they have not for long."""
    initial_loss_scale: float = 16.0
    """Scale of the first step. The loss of a micro-batch is a sum over its tokens, so scales are as many times smaller
    as it has tokens than those of a mean."""
    min_loss_scale: float = 2.0**-10
    """The scale is never lowered below this."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the scale is doubled."""
    hysteresis: int = 2
    """Overflows after which it is halved."""

    def __post_init__(self) -> None:
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
            value = getattr(self, name)
            require(
                value is None or (math.isfinite(value) and value > 0), f"{name}={value} must be positive and finite."
            )
        require(
            self.min_loss_scale <= self.initial_loss_scale,
            f"min_loss_scale={self.min_loss_scale} is above initial_loss_scale={self.initial_loss_scale}.",
        )
        for name in ("loss_scale_window", "hysteresis"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """A precision with settings of its own: exactly one of the two."""

    fp8: Fp8Config | None = None
    """FP8 matrix products on top of bf16."""
    fp16: Fp16Config | None = None
    """fp16 with these settings of the loss scale; ``precision: fp16`` takes the defaults."""

    def __post_init__(self) -> None:
        require(
            (self.fp8 is None) != (self.fp16 is None),
            "fp8 and fp16: exactly one of them is a precision, as in precision: {fp8: {recipe: delayed}}; or write one "
            "of the words bf16, fp16, fp32.",
        )


Precision = Literal["bf16", "fp16", "fp32"] | PrecisionConfig
ParamsDtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Whose kernels compute (docs/precision.md). ``auto`` takes the fastest there is; the log says which and why."""

    layers: Literal["auto", "te", "local"] = "auto"
    """Linear layers and norms: Transformer Engine's, or Megatron's own with our norm (``local``)."""
    attention: Literal["auto", "te", "flash", "sdpa", "unfused"] = "auto"
    """Attention: Transformer Engine's, the flash-attn package, torch's scaled dot product, or plain matrix products."""
    optimizer: Literal["auto", "te", "apex", "torch"] = "auto"
    """AdamW's kernel: fused of Transformer Engine or NVIDIA apex, or torch's."""

"""Whose kernels compute: chosen by name or automatically, with the reason, before anything is built."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_xalign.config import Fp8Config, ModelConfig, RunConfig
from megatron_xalign.errors import ConfigError
from megatron_xalign.training import precision
from megatron_xalign.training.precision import Device, Implementation

# The module that has to import for each, and the package that says its version.
_LIBRARIES = {
    "te": ("transformer_engine.pytorch", "transformer-engine", "Transformer Engine"),
    "flash": ("flash_attn", "flash-attn", "flash-attn"),
    "apex": ("apex.optimizers", "apex", "NVIDIA apex"),
}


@dataclass(frozen=True)
class Found:
    """What this process has to compute with."""

    device: Device = field(default_factory=lambda: Device("cpu"))
    versions: dict[str, str] = field(default_factory=dict)
    """Version of each library that imports, by ``te``, ``flash``, ``apex``."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why another one does not."""

    def why_not(self, library: str) -> str:
        """Why a library cannot be used, in a few words."""
        return self.problems.get(library, "not installed")


@dataclass(frozen=True)
class Choice:
    """What is used."""

    layers: Literal["te", "local"] = "local"
    attention: Literal["te", "flash", "sdpa", "unfused"] = "sdpa"
    optimizer: Literal["te", "apex", "torch"] = "torch"
    fp8: Fp8Config | None = None
    """FP8 settings of the layers, if any."""
    reasons: tuple[str, str, str] = ("", "", "")
    """Why layers, attention and optimizer are these."""

    @property
    def fp8_implementation(self) -> Implementation:
        """Whose FP8 it is."""
        return "te" if self.layers == "te" else "own"

    def describe(self) -> str:
        """One line for the log."""
        words = {
            "te": "Transformer Engine", "local": "Megatron's own", "flash": "flash-attn", "unfused": "unfused",
            "sdpa": "torch's scaled dot product", "apex": "apex FusedAdam", "torch": "torch AdamW",
        }
        chosen = (("layers", self.layers), ("attention", self.attention), ("optimizer", self.optimizer))
        line = "; ".join(
            f"{what}: {words[name]} ({why})" if why else f"{what}: {words[name]}"
            for (what, name), why in zip(chosen, self.reasons, strict=True)
        )
        if self.fp8 is None:
            return line
        whose = "Transformer Engine's" if self.layers == "te" else "this project's own"
        return f"{line}; FP8: {whose}, recipe {self.fp8.recipe}, format {self.fp8.format}"


PLAIN = Choice()
"""Megatron's own layers with our norm and torch's attention and AdamW: what runs everywhere."""


def look(local_rank: int = 0) -> Found:
    """What this process can use. A library that cannot be imported is as good as absent; the reason is kept.

    Libraries are imported only where there is a GPU: they are of no use elsewhere, and Transformer Engine refuses.
    """
    import torch

    if not torch.cuda.is_available():
        return Found(problems=dict.fromkeys(_LIBRARIES, "no GPU"))
    facts = torch.cuda.get_device_properties(local_rank)
    is_amd = torch.version.hip is not None
    device = Device("amd" if is_amd else "nvidia", facts.name, None if is_amd else (facts.major, facts.minor))
    versions, problems = {}, {}
    for name, (module, package, _) in _LIBRARIES.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            # Whatever a package built for another torch or driver raises.
            is_absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
            said = str(error).strip().splitlines() or [type(error).__name__]
            problems[name] = "not installed" if is_absent else said[0]
            continue
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "0"
    return Found(device, versions, problems)


def choose(config: RunConfig, found: Found) -> Choice:
    """Take what is asked for by name, the fastest that is there for ``auto``, and check the precision against it.

    Raises:
        ConfigError: what is asked for is not there or does not go together, or the precision cannot run.
    """
    layers, why_layers = _layers(config, found)
    attention, why_attention = _attention(config, found, layers)
    optimizer, why_optimizer = _optimizer(config, found)
    choice = Choice(layers, attention, optimizer, config.fp8, (why_layers, why_attention, why_optimizer))
    te_version = found.versions.get("te")
    precision.check(config, choice.fp8_implementation, found.device, te_version)
    return choice


def _require(config: RunConfig, found: Found, setting: str, library: str) -> str:
    """That a library asked for by name is there; returns the reason for the log."""
    if library not in found.versions:
        raise ConfigError(
            f"backend.{setting}={library} asks for {_LIBRARIES[library][2]}, which cannot be used here: "
            f"{found.why_not(library)}. `xalign doctor` says how to get it; backend.{setting}=auto takes what is there."
        )
    return f"asked for, version {found.versions[library]}"


def _layers(config: RunConfig, found: Found) -> tuple[Literal["te", "local"], str]:
    asked = config.backend.layers
    if asked == "local":
        return "local", "asked for"
    if asked == "te":
        return "te", _require(config, found, "layers", "te")
    if "te" in found.versions:
        return "te", f"version {found.versions['te']} is there"
    if config.fp8 is not None:
        # Own FP8 layers are for trying the arithmetic; nobody should train on them without having said so.
        precision.check(config, "te", found.device, None)
    return "local", f"Transformer Engine: {found.why_not('te')}"


def _attention(
    config: RunConfig, found: Found, layers: str
) -> tuple[Literal["te", "flash", "sdpa", "unfused"], str]:
    asked = config.backend.attention
    half = config.params_dtype != "fp32"
    if asked == "te":
        return "te", _require(config, found, "attention", "te")
    if asked == "flash":
        why = _require(config, found, "attention", "flash")
        if not half:
            raise ConfigError("backend.attention=flash computes in bf16 or fp16; precision is fp32. Use sdpa.")
        if config.model.head_size > 256:
            raise ConfigError(
                f"backend.attention=flash has heads up to 256 wide; the model's are {config.model.head_size}. Use sdpa."
            )
        return "flash", why
    if asked == "unfused":
        if getattr(config.parallel, "context_parallel_size", 1) > 1:
            raise ConfigError("backend.attention=unfused has no context parallelism; use sdpa or te.")
        return "unfused", "asked for; it holds the whole matrix of scores"
    if asked == "sdpa":
        return "sdpa", "asked for"
    if layers == "te":
        return "te", "goes with Transformer Engine's layers"
    if "flash" in found.versions and half and config.model.head_size <= 256:
        return "flash", f"version {found.versions['flash']} is there"
    return "sdpa", f"flash-attn: {found.why_not('flash') if half else 'not for fp32'}"


def _optimizer(config: RunConfig, found: Found) -> tuple[Literal["te", "apex", "torch"], str]:
    asked = config.backend.optimizer
    if asked == "torch":
        if config.fp8 is not None and config.fp8.param_gather:
            raise ConfigError(
                "backend.optimizer=torch cannot update weights in FP8 (precision.fp8.param_gather=true); use te."
            )
        return "torch", "asked for"
    if asked != "auto":
        return asked, _require(config, found, "optimizer", asked)
    if "te" in found.versions:
        return "te", f"version {found.versions['te']} is there"
    if "apex" in found.versions:
        return "apex", "Transformer Engine is not there"
    return "torch", f"Transformer Engine: {found.why_not('te')}, apex: {found.why_not('apex')}"


# Layers ---------------------------------------------------------------------------------------------------------------


def te_layer_spec(config: ModelConfig, choice: Choice, norm: type, attention: type) -> Any:
    """Megatron's transformer layer of Transformer Engine's parts.

    Args:
        config: the network.
        choice: whose attention.
        norm: our norm, for the one that Transformer Engine does not have.
        attention: our causal attention by torch's scaled dot product.
    """
    # Imported late, here and below: the CPU backend must be in place first.
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if config.normalization == "LayerNorm":
        _keep_norms_apart(spec, norm)
    spec.submodules.self_attention.submodules.core_attention = attention_class(choice, attention)
    return spec


def attention_class(choice: Choice, sdpa: type) -> type:
    """The module between query, key, value and the output projection."""
    if choice.attention == "te":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    if choice.attention == "flash":
        from megatron_xalign.training.flash_attention import FlashAttention

        return FlashAttention
    if choice.attention == "unfused":
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        return DotProductAttention
    return sdpa


def final_norm(config: ModelConfig, choice: Choice, norm: type) -> type:
    """The norm after the last layer."""
    if choice.layers == "te" and config.normalization == "RMSNorm":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return norm


def mlp_submodules(spec: Any) -> Any:
    """``linear_fc1`` and ``linear_fc2`` of a layer's specification: a ModuleSpec in core 0.16, a partial in 0.19."""
    mlp = spec.submodules.mlp
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def _keep_norms_apart(spec: Any, norm: type) -> None:
    """Transformer Engine's fused norm and matrix always has a weight and a bias; OLMo's norm has neither."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    mlp_submodules(spec).linear_fc1 = TEColumnParallelLinear


def with_own_fp8(spec: Any) -> None:
    """Put our FP8 layers into Megatron's own."""
    from megatron_xalign.training.fp8_linear import fp8_linear_classes

    column, row = fp8_linear_classes()
    attention, mlp = spec.submodules.self_attention.submodules, mlp_submodules(spec)
    attention.linear_qkv, attention.linear_proj = column, row
    mlp.linear_fc1, mlp.linear_fc2 = column, row


# Optimizer ------------------------------------------------------------------------------------------------------------


def use_optimizer(choice: Choice) -> None:
    """Make Megatron build the chosen AdamW; by itself it takes what it finds, Transformer Engine's first.

    Raises:
        ConfigError: the installed Megatron-Core does not choose in the way this relies on.
    """
    from megatron.core import optimizer as core
    from megatron.core.optimizer import distrib_optimizer

    for name in ("Adam", "USING_PYTORCH_OPTIMIZER"):
        if not hasattr(core, name):
            raise ConfigError(f"the installed megatron-core has no optimizer.{name}; use backend.optimizer=auto.")
    adam = _adam_class(choice.optimizer)
    # The distributed optimizer checks the type of what it is given.
    for module, name, value in (
        (core, "Adam", adam), (core, "USING_PYTORCH_OPTIMIZER", choice.optimizer == "torch"),
        (distrib_optimizer, "Adam", adam),
    ):
        setattr(module, name, value)


def _adam_class(name: str) -> Callable[..., Any]:
    if name == "te":
        return importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
    if name == "apex":
        return importlib.import_module("apex.optimizers").FusedAdam
    from torch.optim import AdamW

    return AdamW

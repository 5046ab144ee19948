"""Where a model keeps its neurons, gates, attention outputs and residual stream: Megatron's, and those of transformers.

A neuron is one coordinate of the input of the MLP's last linear module; its gate is the same coordinate of what the
activation function is applied to. In a gated MLP the neuron is act(gate) * up, in one without an up projection (GPT-2,
GPT-NeoX) act(gate). The attention output is what attention adds to the residual stream, its output projection included.
The residual stream is the input of the first layer (row 0) and the output of every layer, before the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from megatron_xalign import names
from megatron_xalign.errors import ConfigError
from megatron_xalign.topology import Ranks


@dataclass(frozen=True)
class LayerPoints:
    """The modules of one layer that hooks go on."""

    layer: int
    """Global, 0-based."""
    neurons: nn.Module
    """Its first argument are the neurons."""
    gate: nn.Module
    """Its output is the gate, or [gate | up]."""
    gate_is_half: bool
    """Whether the gate is the first half of that output only."""
    attention: nn.Module | None
    """Its output is what attention adds; None in models without attention."""
    output: nn.Module
    """Its output is the residual stream after the layer."""


@dataclass(frozen=True)
class ModelPoints:
    """The hook points of this process's part of a model."""

    layers: tuple[LayerPoints, ...]
    """Layers this process holds, in order."""
    embedding: tuple[nn.Module, Literal["input", "output"]] | None
    """Where the residual stream begins; None where another pipeline stage holds it."""
    num_layers: int
    """Layers of the whole model."""
    ffn_hidden_size: int
    """Neurons of a layer, over all tensor-parallel ranks."""
    hidden_size: int
    """Width of the residual stream."""
    neurons: tuple[int, int]
    """First and one past the last neuron of a layer that this process sees."""
    sequence_parallel: bool
    """Whether this process sees only its part of the tokens of the residual stream."""
    batch_first: bool
    """Whether tensors are [B, S, ...] and not [S, B, ...]."""


# What these settings do to the forward pass, by the attribute of Megatron's TransformerConfig and its harmless values.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_transformer_engine_op_fuser", (None, False), "the fused MLP never shows its post-activation"),
    ("use_te_op_fuser", (None, False), "the fused MLP never shows its post-activation"),
    ("use_grouped_gemm_for_dense_mlp", (None, False), "the grouped MLP never shows its post-activation"),
    ("cuda_graph_impl", (None, "none"), "a replayed CUDA graph runs no hooks"),
    ("enable_cuda_graph", (None, False), "a replayed CUDA graph runs no hooks"),
    ("external_cuda_graph", (None, False), "a replayed CUDA graph runs no hooks"),
    ("mlp_chunks_for_training", (None, 1), "the MLP then runs several times per micro-batch"),
    ("num_moe_experts", (None,), "experts see their tokens in another order"),
)


def megatron_points(model_chunks: Sequence[nn.Module], ranks: Ranks) -> ModelPoints:
    """Hook points of Megatron's model, bare or wrapped; several chunks under interleaved pipelining.

    Raises:
        ConfigError: the model has a setting under which the numbers could not be exact; the message names it.
    """
    found = _find_layers(model_chunks)
    if not found:
        raise ConfigError("capture finds no transformer layer with an MLP in this process's part of the model.")
    layers = [module for _, module in sorted(found.items())]
    config = layers[0].config
    _refuse_inexact(config, layers)
    width = int(config.ffn_hidden_size) // ranks.tensor_size
    embedding = _find_embedding(model_chunks)
    return ModelPoints(
        layers=tuple(
            LayerPoints(
                number, layer.mlp.linear_fc2, layer.mlp.linear_fc1, True, getattr(layer, "self_attention", None), layer
            )
            for number, layer in sorted(found.items())
        ),
        embedding=None if embedding is None else (embedding, "output"),
        num_layers=int(config.num_layers),
        ffn_hidden_size=int(config.ffn_hidden_size),
        hidden_size=int(config.hidden_size),
        neurons=(ranks.tensor_rank * width, (ranks.tensor_rank + 1) * width),
        sequence_parallel=bool(config.sequence_parallel) and ranks.tensor_size > 1,
        batch_first=False,
    )


def hugging_face_points(model: Any) -> ModelPoints:
    """Hook points of a causal language model of transformers, by the table ``names.HOOK_MODULES``.

    Raises:
        ConfigError: the table has no entry for this kind of model.
    """
    modules = hook_modules(model.config.model_type)
    layers = list(model.get_submodule(modules.layers))
    points = tuple(
        LayerPoints(
            number, layer.get_submodule(modules.neurons), layer.get_submodule(modules.gate), False,
            layer.get_submodule(modules.attention), layer,
        )
        for number, layer in enumerate(layers)
    )
    last_linear = points[0].neurons
    # torch's Linear keeps [out, in], the Conv1D of GPT-2 [in, out].
    inputs, outputs = (
        (last_linear.in_features, last_linear.out_features) if isinstance(last_linear, nn.Linear)
        else last_linear.weight.shape  # type: ignore[misc]
    )
    return ModelPoints(
        layers=points,
        # Not the output of the embedding: some models scale it or add positions to it afterwards.
        embedding=(layers[0], "input"),
        num_layers=len(layers),
        ffn_hidden_size=int(inputs),
        hidden_size=int(outputs),
        neurons=(0, int(inputs)),
        sequence_parallel=False,
        batch_first=True,
    )


def hook_modules(model_type: str) -> names.HookModules:
    """Where a kind of transformers model keeps its hook points.

    Raises:
        ConfigError: the table has no entry for it.
    """
    if model_type not in names.HOOK_MODULES:
        raise ConfigError(
            f"capture has no hook points for models of type {model_type!r}; it knows "
            f"{', '.join(sorted(names.HOOK_MODULES))}. Another one with a dense MLP needs one line in "
            "megatron_xalign/names.py, HOOK_MODULES."
        )
    return names.HOOK_MODULES[model_type]


def _find_layers(model_chunks: Sequence[nn.Module]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for chunk in model_chunks:
        for module in chunk.modules():
            if hasattr(module, "layer_number") and hasattr(module, "mlp"):
                layer = int(module.layer_number) - 1  # type: ignore[arg-type]
                if not (hasattr(module.mlp, "linear_fc1") and hasattr(module.mlp, "linear_fc2")):
                    raise ConfigError(
                        f"layer {layer} has a {type(module.mlp).__name__} without linear_fc1 and linear_fc2; capture "
                        "reads the neurons of dense MLPs only."
                    )
                found[layer] = module
    return found


def _find_embedding(model_chunks: Sequence[nn.Module]) -> nn.Module | None:
    for chunk in model_chunks:
        for module in chunk.modules():
            embedding = getattr(module, "embedding", None)
            if hasattr(module, "decoder") and isinstance(embedding, nn.Module) and getattr(module, "pre_process", True):
                return embedding
    return None


def _refuse_inexact(config: Any, layers: Sequence[Any]) -> None:
    for name, harmless, why in _REFUSED:
        value = getattr(config, name, None)
        if value not in harmless:
            raise ConfigError(f"{name}={value} does not go with capture: {why}. Use {name}={harmless[-1]}.")
    if not config.gated_linear_unit:
        raise ConfigError("gated_linear_unit=False does not go with capture: the MLP has no gate to count.")
    for layer in layers:
        if "Fused" in type(layer.mlp).__name__:
            raise ConfigError(
                f"{type(layer.mlp).__name__} does not go with capture: the fused MLP never shows its post-activation. "
                "Build the model from an unfused layer spec."
            )

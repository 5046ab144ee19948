"""One table: a weight or hook point in Megatron's words and in Hugging Face's, and how the rows are laid out.

Every layout is the same picture: view a Megatron matrix as ``[blocks, width, ...]``; each Hugging Face matrix is a
range of the second axis, in every block. So one entry serves both directions: read the range, or write into it.

    plain     one block, one range: the matrix itself
    vocab     one block; rows past the tokenizer's size are padding and belong to no Hugging Face matrix
    gate_up   one block ``[gate | up]``; Megatron puts the gate first
    qkv       one block for each key/value group: its query heads, its key head, its value head
"""

# H hidden size, F ffn width, V vocabulary, L layers, D head width, Q width of all query heads

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_xalign.config import ModelConfig
from megatron_xalign.errors import ConfigError

Layout = Literal["plain", "vocab", "gate_up", "qkv"]

OLMO_LAYERNORM_EPSILON = 1e-5
"""``OlmoLayerNorm`` of transformers has this epsilon in its code, not in its config."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3.1's rotary scaling beside its factor, as transformers names it; fixed in Megatron-Core's RotaryEmbedding."""


@dataclass(frozen=True)
class Weight:
    """One Megatron tensor and the Hugging Face tensors that hold the same numbers."""

    megatron: tuple[str, ...]
    """Names in a checkpoint, without layer number; the first one found is taken. Transformer Engine keeps a norm's
    weight inside the linear layer after it, and core's local layers are saved under the same name."""
    hugging_face: tuple[str, ...]
    """Names in a Hugging Face file, in the order of the layout; ``{layer}`` stands for the 0-based layer."""
    layout: Layout
    shape: tuple[str, ...]
    """Axes of the Megatron tensor, to be filled in by ``sizes``."""
    per_layer: bool = True
    when: Literal["always", "weighted_norm", "untied", "qk_norm", "qkv_bias"] = "always"
    """Which models have it."""


WEIGHTS: tuple[Weight, ...] = (
    Weight(
        ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), "vocab", ("V", "H"), per_layer=False
    ),
    Weight(
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.input_layernorm.weight"),
        ("model.layers.{layer}.input_layernorm.weight",),
        "plain", ("H",), when="weighted_norm",
    ),
    Weight(
        ("decoder.layers.self_attention.linear_qkv.weight",),
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        "qkv", ("QKV", "H"),
    ),
    Weight(
        ("decoder.layers.self_attention.linear_qkv.bias",),
        (
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        ),
        "qkv", ("QKV",), when="qkv_bias",
    ),
    Weight(
        ("decoder.layers.self_attention.q_layernorm.weight",), ("model.layers.{layer}.self_attn.q_norm.weight",),
        "plain", ("D",), when="qk_norm",
    ),
    Weight(
        ("decoder.layers.self_attention.k_layernorm.weight",), ("model.layers.{layer}.self_attn.k_norm.weight",),
        "plain", ("D",), when="qk_norm",
    ),
    Weight(
        ("decoder.layers.self_attention.linear_proj.weight",), ("model.layers.{layer}.self_attn.o_proj.weight",),
        "plain", ("H", "Q"),
    ),
    Weight(
        ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"),
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        "plain", ("H",), when="weighted_norm",
    ),
    Weight(
        ("decoder.layers.mlp.linear_fc1.weight",),
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        "gate_up", ("2F", "H"),
    ),
    Weight(
        ("decoder.layers.mlp.linear_fc2.weight",), ("model.layers.{layer}.mlp.down_proj.weight",), "plain", ("H", "F")
    ),
    Weight(
        ("decoder.final_layernorm.weight",), ("model.norm.weight",), "plain", ("H",), per_layer=False,
        when="weighted_norm",
    ),
    Weight(
        ("output_layer.weight",), ("lm_head.weight",), "vocab", ("V", "H"), per_layer=False, when="untied"
    ),
)
"""Every weight of the decoder-only models we know, in the order of a forward pass."""


FP8_STATE = ("fp8_scale", "fp8_amax_history")
"""What our FP8 layers keep in a checkpoint beside their weights, as the last part of its name; no weight of a model."""

MAIN_WEIGHT = "optimizer.state.param."
"""In front of a weight's name: the float32 copy that the optimizer of a run in fewer bits moves."""


@dataclass(frozen=True)
class HookPoint:
    """A tensor inside one layer, by the module it enters or leaves."""

    megatron: str
    """Module path below ``decoder.layers.{local layer}``; "" is the layer itself."""
    hugging_face: str
    """Module path below ``model.layers.{layer}``."""
    side: Literal["input", "output"]


POST_ACTIVATION = HookPoint("mlp.linear_fc2", "mlp.down_proj", "input")
"""SiLU(gate) * up; one coordinate is one neuron. Megatron's last axis is the ffn width over the tensor size."""

GATE = HookPoint("mlp.linear_fc1", "mlp.gate_proj", "output")
"""What SiLU is applied to; in Megatron ``gate_half`` of the tensor."""

MLP = HookPoint("mlp", "mlp", "output")
"""What the MLP adds to it."""

RESIDUAL = HookPoint("", "", "output")
"""The residual stream after the layer's second addition, before the final norm."""

ATTENTION = HookPoint("self_attention", "self_attn", "output")
"""What attention adds to the residual stream, the output projection included."""


@dataclass(frozen=True)
class HookModules:
    """Where a model of transformers keeps what Megatron's hook points name."""

    layers: str
    """Module path of the list of layers."""
    neurons: str
    """Below a layer: the MLP's last linear module, whose input are the neurons."""
    gate: str
    """Below a layer: the linear module whose output the activation function is applied to."""
    attention: str
    """Below a layer: the attention with its output projection."""
    gated: bool
    """Whether a neuron is act(gate) * up; without an up projection it is act(gate) alone."""


_LLAMA_LIKE = HookModules(
    "model.layers", POST_ACTIVATION.hugging_face, GATE.hugging_face, ATTENTION.hugging_face, gated=True
)

HOOK_MODULES: dict[str, HookModules] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "olmo3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "gpt2": HookModules("transformer.h", "mlp.c_proj", "mlp.c_fc", "attn", gated=False),
    "gpt_neox": HookModules("gpt_neox.layers", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "attention", gated=False),
}
"""By ``model_type`` of ``config.json``."""


LAYERS = HookPoint("decoder.layers", "model.layers", "output")
"""Where the layers are in the whole model, as lists of modules."""

EMBEDDING = HookPoint("embedding", "model.embed_tokens", "output")
"""The residual stream before the first layer."""

COMPARED = (ATTENTION, MLP, RESIDUAL)
"""What is compared inside every layer, in the order of a forward pass."""


def place_in_layer(point: HookPoint, layer: int) -> str:
    """A place inside a layer by Hugging Face's name: ``model.layers.3.mlp``."""
    return f"{LAYERS.hugging_face}.{layer}" + (f".{point.hugging_face}" if point.hugging_face else "")


def stored_name(name: str, stored: Container[str]) -> str:
    """The name under which a checkpoint has a Megatron tensor: its own, or another one of the same entry."""
    same = next((weight.megatron for weight in WEIGHTS if name in weight.megatron), ())
    return next((candidate for candidate in (name, *same) if candidate in stored), name)


def gate_half(fc1_width: int) -> slice:
    """The gate in the last axis of ``mlp.linear_fc1``'s output: its first half, on every tensor-parallel rank."""
    return slice(0, fc1_width // 2)


@dataclass(frozen=True)
class RowView:
    """Where the rows of one Hugging Face matrix lie in a Megatron matrix seen as ``[blocks, width, ...]``."""

    blocks: int
    width: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the Hugging Face matrix."""
        return self.blocks * (self.stop - self.start)


def architecture(model: ModelConfig) -> str:
    """The transformers class that computes what this model computes.

    Raises:
        ConfigError: no class of transformers does; the setting in the way is named.
    """
    if model.normalization == "RMSNorm":
        if model.qk_layernorm and model.add_qkv_bias:
            raise ConfigError(
                "model.qk_layernorm=true with model.add_qkv_bias=true has no counterpart in transformers: Qwen3 has "
                "the norms, Qwen2 the biases. Train with one of them."
            )
        if model.qk_layernorm:
            return "Qwen3ForCausalLM"
        return "Qwen2ForCausalLM" if model.add_qkv_bias else "LlamaForCausalLM"
    if model.head_size * model.num_attention_heads != model.hidden_size:
        raise ConfigError(
            f"model.kv_channels={model.kv_channels} with model.normalization=LayerNorm has no counterpart in "
            "transformers: heads of OlmoForCausalLM are hidden_size over num_attention_heads wide. Leave it out."
        )
    if model.layernorm_epsilon != OLMO_LAYERNORM_EPSILON:
        raise ConfigError(
            f"model.layernorm_epsilon={model.layernorm_epsilon} with model.normalization=LayerNorm has no counterpart "
            f"in transformers: OlmoForCausalLM always adds {OLMO_LAYERNORM_EPSILON}. Train with "
            f"model.layernorm_epsilon={OLMO_LAYERNORM_EPSILON}, or with model.normalization=RMSNorm."
        )
    return "OlmoForCausalLM"


SAME_FUNCTION = (("MistralForCausalLM", "LlamaForCausalLM"),)
"""Classes that compute the same as the one ``architecture`` gives: Mistral's without a sliding window is Llama's."""


def weights_of(model: ModelConfig) -> Iterator[Weight]:
    """The entries of ``WEIGHTS`` that this model has."""
    has = {
        "always": True,
        "weighted_norm": model.normalization == "RMSNorm",
        "untied": model.untie_embeddings_and_output_weights,
        "qk_norm": model.qk_layernorm,
        "qkv_bias": model.add_qkv_bias,
    }
    return (weight for weight in WEIGHTS if has[weight.when])


def megatron_shape(weight: Weight, model: ModelConfig, padded_vocab_size: int) -> tuple[int, ...]:
    """Shape of one layer's Megatron tensor, whole over tensor parallelism."""
    sizes = {
        "H": model.hidden_size,
        "F": model.ffn_hidden_size,
        "2F": 2 * model.ffn_hidden_size,
        "V": padded_vocab_size,
        "D": model.head_size,
        "Q": model.num_attention_heads * model.head_size,
        "QKV": (model.num_attention_heads + 2 * model.query_groups) * model.head_size,
    }
    return tuple(sizes[axis] for axis in weight.shape)


def row_views(weight: Weight, model: ModelConfig, vocab_size: int, padded_vocab_size: int) -> tuple[RowView, ...]:
    """One view for each name in ``weight.hugging_face``."""
    rows = megatron_shape(weight, model, padded_vocab_size)[0]
    if weight.layout == "plain":
        return (RowView(1, rows, 0, rows),)
    if weight.layout == "vocab":
        return (RowView(1, rows, 0, vocab_size),)
    if weight.layout == "gate_up":
        half = model.ffn_hidden_size
        return (RowView(1, rows, 0, half), RowView(1, rows, half, rows))
    head = model.head_size
    queries = model.num_attention_heads // model.query_groups * head
    width = queries + 2 * head
    return tuple(
        RowView(model.query_groups, width, start, stop)
        for start, stop in ((0, queries), (queries, queries + head), (queries + head, width))
    )


def hugging_face_names(weight: Weight, layer: int | None) -> tuple[str, ...]:
    """``weight.hugging_face`` with the layer filled in."""
    return tuple(name.format(layer=layer) for name in weight.hugging_face)

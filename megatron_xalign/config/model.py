"""The network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_xalign.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: rotary positions, SwiGLU (Megatron's ``GPTModel``)."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 192
    """Width of the residual stream."""
    ffn_hidden_size: int = 512
    """Width of the SwiGLU MLP after the gate; one neuron is one of these coordinates."""
    num_attention_heads: int = 6
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: int | None = None
    """Width of one attention head; default: ``hidden_size`` over ``num_attention_heads``."""
    qk_layernorm: bool = False
    """Normalise every query and key head before the rotary positions (Qwen3)."""
    add_qkv_bias: bool = False
    """Biases of query, key and value projections (Qwen2); nothing else has a bias."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """``RMSNorm`` with a weight (Llama) or ``LayerNorm`` without weight and bias (OLMo, the study's model)."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance inside the norm."""
    rotary_base: int = 10_000
    """Base of the rotary position frequencies."""
    rope_scaling_factor: float | None = None
    """Stretch low rotary frequencies by this, for contexts beyond 8,192 tokens (Llama 3.1); none if left out."""
    untie_embeddings_and_output_weights: bool = True
    """Whether input embedding and output projection are two matrices."""
    init_method: Literal["scaled", "mitchell"] = "scaled"
    """Initial matrices: ``scaled``, normal with ``init_method_std``, a layer's outputs with that over sqrt(2 *
    num_layers), as Megatron's; ``mitchell``, OLMo's: normal cut at 3 deviations of 1 / sqrt(inputs), the outputs of
    layer n with that over sqrt(2 * n)."""
    init_method_std: float = 0.02
    """Standard deviation of the ``scaled`` initialisation."""
    vocab_size: int | None = None
    """Ids the model has; default: as many as the tokenizer. Imported models may have more."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size, as Megatron pads it."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "rotary_base"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
            "change one of them or set kv_channels.",
        )
        require(
            self.head_size > 0 and self.head_size % 2 == 0,
            f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads} and kv_channels="
            f"{self.kv_channels} give heads {self.head_size} wide; rotary positions need an even, positive width.",
        )
        require(
            not (self.normalization == "LayerNorm" and (self.qk_layernorm or self.add_qkv_bias)),
            "normalization=LayerNorm (OLMo) goes without qk_layernorm and add_qkv_bias; no known model has both.",
        )
        require(
            self.vocab_size is None or self.vocab_size > 0, f"vocab_size={self.vocab_size} must be positive."
        )
        require(
            self.rope_scaling_factor is None or self.rope_scaling_factor >= 1.0,
            f"rope_scaling_factor={self.rope_scaling_factor} is below 1.",
        )
        require(
            self.num_query_groups is None
            or (self.num_query_groups > 0 and self.num_attention_heads % self.num_query_groups == 0),
            f"num_attention_heads={self.num_attention_heads} is not divisible by "
            f"num_query_groups={self.num_query_groups}.",
        )
        require(self.init_method_std > 0, f"init_method_std={self.init_method_std} must be positive.")
        require(
            self.make_vocab_size_divisible_by > 0,
            f"make_vocab_size_divisible_by={self.make_vocab_size_divisible_by} must be positive.",
        )

    @property
    def query_groups(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

"""The two parts of a transformer layer that Megatron-Core has only for CUDA kernels: norms and causal attention.

Both are plain torch, so the same model runs on CPU and GPU, with sequence parallelism on either. Megatron's own
device-neutral norm refuses sequence parallelism, and its attention builds a full mask with a CUDA kernel in mind.
"""

# S sequence, B micro-batch, N heads on this rank, G key/value heads on this rank, D head width, H hidden

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class Norm(torch.nn.Module):
    """RMSNorm with a weight, or LayerNorm without weight and bias, as ``config.normalization`` says.

    Computed in float32 and rounded to the input's type before the weight, as Hugging Face's Llama and OLMo do it.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        """Built by Megatron from a layer specification.

        Args:
            config: Megatron's ``TransformerConfig``.
            hidden_size: H, width of what is normalised.
            eps: added to the variance.
            **kwargs: what some versions of Megatron pass to some norms; nothing that changes the result.
        """
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization={config.normalization!r} is not RMSNorm or LayerNorm.")
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight: torch.nn.Parameter | None = None
        if config.normalization == "RMSNorm":
            self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
            # Each tensor-parallel rank then sees only its part of the sequence: Megatron sums the gradients of
            # weights marked so over the tensor-parallel group.
            self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        single = hidden_SBH.float()
        if self.weight is None:
            return functional.layer_norm(single, (self.hidden_size,), None, None, self.eps).type_as(hidden_SBH)
        return self.weight * functional.rms_norm(single, (self.hidden_size,), None, self.eps).type_as(hidden_SBH)


class CausalAttention(torch.nn.Module):
    """Causal (grouped-query) attention by torch's scaled dot product, which never holds the S x S matrix."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Built by Megatron from a layer specification; see Megatron's ``DotProductAttention`` for the arguments."""
        super().__init__()
        if attn_mask_type.name != "causal" or attention_type != "self":
            raise ValueError(f"this is causal self-attention, not {attn_mask_type.name} {attention_type}-attention.")
        if config.context_parallel_size != 1 or config.attention_dropout != 0.0:
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size} and attention_dropout="
                f"{config.attention_dropout} must be 1 and 0."
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend to all earlier positions; returns [S, B, N * D].

        Raises:
            ValueError: a mask, bias or packing was passed, which this attention would not honour.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention_mask, attention_bias and packed_seq_params must be None; the mask is causal.")
        repeats = query_SBND.shape[2] // key_SBGD.shape[2]
        if repeats > 1:
            key_SBGD = key_SBGD.repeat_interleave(repeats, dim=2)
            value_SBGD = value_SBGD.repeat_interleave(repeats, dim=2)
        out_BNSD = functional.scaled_dot_product_attention(
            query_SBND.permute(1, 2, 0, 3), key_SBGD.permute(1, 2, 0, 3), value_SBGD.permute(1, 2, 0, 3),
            is_causal=True, scale=self.softmax_scale,
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

"""Causal attention by the flash-attn package, for layers that are not Transformer Engine's."""

# S sequence, B micro-batch, N heads on this rank, G key/value heads on this rank, D head width

from __future__ import annotations

from typing import Any

import torch


class FlashAttention(torch.nn.Module):
    """Causal (grouped-query) self-attention; the package repeats no key or value head."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
        softmax_scale: float | None = None, **kwargs: Any,
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
        from flash_attn import flash_attn_func

        self._attend = flash_attn_func
        self.softmax_scale = softmax_scale

    def forward(
        self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None, attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None, packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend to all earlier positions; returns [S, B, N * D].

        Raises:
            ValueError: a mask, bias or packing was passed, which this attention would not honour.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention_mask, attention_bias and packed_seq_params must be None; the mask is causal.")
        out_BSND: torch.Tensor = self._attend(
            query_SBND.transpose(0, 1), key_SBGD.transpose(0, 1), value_SBGD.transpose(0, 1),
            softmax_scale=self.softmax_scale, causal=True,
        )
        return out_BSND.transpose(0, 1).flatten(2)

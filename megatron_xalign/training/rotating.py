"""Megatron's self-attention with rotary positions of our own on the CPU: they give attention its heads in one piece."""

# S sequence on this rank, B micro-batch, D head width

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_xalign.training.fused import Rotate, SplitAndRotate


@functools.cache
def rotating_attention() -> type:
    """Megatron's ``SelfAttention`` that turns query and key itself, by the angles that its layer is given."""
    # Imported late: the CPU backend must be in place first.
    from megatron.core.transformer.attention import SelfAttention

    class RotatingSelfAttention(SelfAttention):
        """Where it is told of no angles it is Megatron's."""

        angles: torch.Tensor | None = None
        """[S, 1 or B, 1, D] of the forward pass that is under way."""
        turns: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None
        """The angles last seen, their cosines and sines; Megatron gives the same tensor again and again."""

        def forward(
            self, hidden_states: torch.Tensor, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any
        ) -> Any:
            """See Megatron's; positions come by name."""
            if hidden_states.device.type != "cpu":
                return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
            if kwargs.get("inference_context") is not None or kwargs.get("packed_seq_params") is not None:
                raise ValueError("inference_context and packed_seq_params must be None; whole sequences are turned.")
            self.angles = rotary_pos_emb
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                self.angles = None

        def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
            """Query, key and value [S, B, heads, D]."""
            if self.angles is None:
                return super().get_query_key_value_tensors(*args, **kwargs)
            cos, sin = self._turns(self.angles)
            # Fewer groups than tensor-parallel ranks: Megatron picks each rank's queries after splitting.
            shares_groups = self.config.num_query_groups < self.world_size
            if not self.config.qk_layernorm and not shares_groups:
                mixed, _ = super().get_query_key_value_tensors(*args, **{**kwargs, "split_qkv": False})
                return SplitAndRotate.apply(mixed, cos.to(mixed.dtype), sin.to(mixed.dtype))
            query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
            cos, sin = cos.to(query.dtype), sin.to(query.dtype)
            return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin), value

        def _turns(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.turns is None or self.turns[0] is not angles:
                self.turns = angles, angles.cos(), angles.sin()
            return self.turns[1:]

    return RotatingSelfAttention

"""The two parts of a transformer layer that Megatron-Core has only for CUDA kernels: norms and causal attention.

Both are plain torch, so the same model runs on CPU and GPU, with sequence parallelism on either. Megatron's own
device-neutral norm refuses sequence parallelism, and its attention builds a full mask with a CUDA kernel in mind.
"""

# S sequence on this rank, T whole sequence, B micro-batch, N heads on this rank, G key/value heads on this rank,
# D head width, H hidden

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from megatron_xalign.batch import context_chunks
from megatron_xalign.training.fused import RootMeanSquareNorm


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
        if self.weight is not None and hidden_SBH.device.type == "cpu":
            normed: torch.Tensor = RootMeanSquareNorm.apply(hidden_SBH, self.weight, self.eps)
            return normed
        single = hidden_SBH.float()
        if self.weight is None:
            return functional.layer_norm(single, (self.hidden_size,), None, None, self.eps).type_as(hidden_SBH)
        return self.weight * functional.rms_norm(single, (self.hidden_size,), None, self.eps).type_as(hidden_SBH)


class CausalAttention(torch.nn.Module):
    """Causal (grouped-query) attention by torch's scaled dot product, which never holds the S x S matrix of scores.

    Under context parallelism every rank gathers keys and values of the whole sequence and attends from its own two
    chunks. Given document ids, tokens attend to earlier tokens of their own document only.
    """

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
        if config.attention_dropout != 0.0:
            raise ValueError(f"attention_dropout={config.attention_dropout} must be 0.")
        self.softmax_scale = softmax_scale
        self.context_size = config.context_parallel_size

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
        """Attend to all earlier positions, or to those of the same document.

        Args:
            query_SBND: of the positions this rank holds.
            key_SBGD: likewise.
            value_SBGD: likewise.
            attention_mask: document ids of the whole sequence, integer [B, T]; None: one document.
            attn_mask_type: causal, whatever is said.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [S, B, N * D].

        Raises:
            ValueError: a mask of another kind, a bias or packing was passed, which this attention would not honour.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention_bias and packed_seq_params must be None; the mask is causal.")
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype == torch.bool):
            raise ValueError(
                f"attention_mask must be None or document ids [B, T], not {attention_mask.dtype} "
                f"{list(attention_mask.shape)}; the mask is causal."
            )
        rows, (length, *_) = [slice(0, query_SBND.shape[0])], query_SBND.shape
        if self.context_size > 1:
            from megatron.core import parallel_state

            group = parallel_state.get_context_parallel_group()
            length *= self.context_size
            rows = list(context_chunks(length, group.rank(), self.context_size))
            key_SBGD, value_SBGD = _GatherSequence.apply(torch.cat([key_SBGD, value_SBGD], -1), group).chunk(2, -1)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        out = [
            self._attend(piece, key[:, :, : where.stop], value[:, :, : where.stop], where, attention_mask)
            for piece, where in zip(query.chunk(len(rows), dim=2), rows, strict=True)
        ]
        whole = out[0] if len(out) == 1 else torch.cat(out, dim=2)
        return whole.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: slice,
        document_ids_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """From the positions ``where`` of a sequence to all up to there; tensors are [B, N, S, D]."""
        if document_ids_BT is not None:
            positions = torch.arange(where.stop, device=query.device)
            visible = positions[None, :] <= positions[where, None]
            own = document_ids_BT[:, where, None] == document_ids_BT[:, None, : where.stop]
            mask: torch.Tensor | None = (visible & own)[:, None]
        else:
            mask = None if where.start == 0 else causal_lower_right(query.shape[2], key.shape[2])
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )


class _GatherSequence(torch.autograd.Function):
    """The parts of all context-parallel ranks as one tensor in the order of the sequence; gradients go back and add."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        size = group.size()
        gathered = part.new_empty(size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        # Rank r gave its chunk r, then its chunk 2 * size - 1 - r.
        halves = gathered.chunk(2 * size)
        return torch.cat([*halves[0::2], *reversed(halves[1::2])])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        chunks = gradients[0].chunk(2 * size)
        by_rank = torch.cat([chunks[number] for rank in range(size) for number in (rank, 2 * size - 1 - rank)])
        own = by_rank.new_empty(by_rank.shape[0] // size, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank, group=ctx.group)
        return own, None

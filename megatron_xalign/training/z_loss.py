"""The z-loss: a little weight on the squared logarithm of the softmax's denominator, which keeps logits from drifting.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5: 1e-4 * log^2 Z.
"""

# S sequence, B micro-batch, V vocabulary rows of this rank

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_xalign.topology import Ranks


def add_z_loss(model: Any, coefficient: float, ranks: Ranks) -> None:
    """Let a ``GPTModel`` with an output layer compute the z-loss of every training forward pass.

    It is kept beside the model's output, so that losses stay comparable; ``take_z_loss`` hands it over.
    """
    group = ranks.group_of("tensor") if ranks.tensor_size > 1 else None

    def hook(module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        if model.training:
            log_z_SB = _LogSumExp.apply(output[0], group)
            model.z_loss_BS = (coefficient * log_z_SB.square()).transpose(0, 1)

    model.output_layer.register_forward_hook(hook)


def take_z_loss(model: Any) -> torch.Tensor | None:
    """The z-loss of the forward pass that just ended, float32 [B, S], once; None if the model has none."""
    z_loss_BS: torch.Tensor | None = model.__dict__.pop("z_loss_BS", None)
    return z_loss_BS


class _LogSumExp(torch.autograd.Function):
    """Logarithm of the sum of exponentials over a vocabulary that lies over tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        single = logits_SBV.float()
        largest_SB = single.amax(-1)
        if group is not None:
            dist.all_reduce(largest_SB, op=dist.ReduceOp.MAX, group=group)
        total_SB = (single - largest_SB[..., None]).exp().sum(-1)
        if group is not None:
            dist.all_reduce(total_SB, group=group)
        log_z_SB = largest_SB + total_SB.log()
        # Megatron's cross-entropy subtracts from float32 logits and takes their exponential in place.
        kept = logits_SBV.clone() if logits_SBV.dtype == torch.float32 else logits_SBV
        ctx.save_for_backward(kept, log_z_SB)
        return log_z_SB

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_SBV, log_z_SB = ctx.saved_tensors
        share_SBV = (logits_SBV.float() - log_z_SB[..., None]).exp()
        return (gradients[0][..., None] * share_SBV).to(logits_SBV.dtype), None

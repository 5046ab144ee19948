"""Cross-entropy over a vocabulary that one process holds whole, in fewer passes over the logits than Megatron's own.

Megatron-Core's cross-entropy is made for a vocabulary that lies over tensor-parallel ranks. Without those it pays for
indices of the largest logits that nobody asks for, and for a division of the whole matrix that can wait for the
gradient, with which it is one multiplication. For small models with real vocabularies that is a good part of a step.
"""

# S sequence, B micro-batch, V vocabulary

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def use_whole_vocabulary(model: Any) -> None:
    """Let a bare ``GPTModel`` whose output layer has all rows of the vocabulary take its losses from here."""
    model.compute_language_model_loss = MethodType(_loss_of_model, model)


def _loss_of_model(model: Any, labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> torch.Tensor:
    """What ``LanguageModule.compute_language_model_loss`` gives: float32 [B, S]."""
    loss_SB: torch.Tensor = CrossEntropy.apply(logits_SBV, labels_BS.T)
    return loss_SB.T.contiguous()


class CrossEntropy(torch.autograd.Function):
    """Negative log-probability of every label, float32 [S, B], from logits [S, B, V] of any floating type.

    As Megatron's, it overwrites float32 logits: nothing else may need them afterwards.
    """

    @staticmethod
    def forward(ctx: Any, logits_SBV: torch.Tensor, labels_SB: torch.Tensor) -> torch.Tensor:
        single = logits_SBV.float()
        index_SB1 = labels_SB[..., None]
        largest_SB1 = single.amax(-1, keepdim=True)
        of_label_SB1 = single.gather(-1, index_SB1) - largest_SB1
        weight_SBV = single.sub_(largest_SB1).exp_()
        total_SB1 = weight_SBV.sum(-1, keepdim=True)
        ctx.save_for_backward(weight_SBV, total_SB1, index_SB1)
        ctx.dtype = logits_SBV.dtype
        return (total_SB1.log() - of_label_SB1).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight_SBV, total_SB1, index_SB1 = ctx.saved_tensors
        gradient_SB1 = gradients[0][..., None]
        # Nothing else holds the weights: as Megatron's, the gradient takes their place.
        result_SBV = weight_SBV.mul_(gradient_SB1 / total_SB1)
        return result_SBV.scatter_add_(-1, index_SB1, -gradient_SB1).to(ctx.dtype), None

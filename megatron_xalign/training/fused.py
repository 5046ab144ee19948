"""RMSNorm, SwiGLU and rotary positions with their gradients written out: torch's own kernels, in fewer passes.

They run on the CPU, where they were measured and tested; on other devices torch's and Megatron's do. Left to autograd
each of them is a chain of small operations, every one of which reads and writes all of its tensors. Where a layer is a
few hundred wide that costs about as much as half of its matrix products. The results are those of Hugging Face's Llama
up to rounding.
"""

# S sequence on this rank, B micro-batch, H hidden, F ffn width, N heads on this rank, G key/value heads, R = N / G,
# D head width

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class RootMeanSquareNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), in float32 and rounded to the type of x before the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        single = x.float()
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(single, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        normed = (single * scale).type_as(x)
        return normed.mul_(weight_H) if weight_H.dtype == x.dtype else weight_H * normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight_H, scale = ctx.saved_tensors
        gradient, weight = gradients[0].float(), weight_H.float()
        width = x.shape[-1]
        # The gradient of LayerNorm with a mean of zero differs by one term only, the mean of what comes in.
        to_x, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x.float(), [width], torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        mean = (gradient @ weight)[..., None].div_(width)
        return to_x.add_(mean.mul_(scale)).type_as(x), to_weight.type_as(weight_H), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, -1)
        activated = functional.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        to_gate, to_up = result.chunk(2, -1)
        torch.mul(gradients[0], activated, out=to_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=to_gate)
        return result


class SwiGLU(torch.nn.Module):
    """[.., 2F], gate before up, to silu(gate) * up, [.., F]. Built by Megatron from a layer specification."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        if gate_and_up.device.type != "cpu":
            gate, up = gate_and_up.chunk(2, -1)
            return functional.silu(gate) * up
        out: torch.Tensor = _SwiGLU.apply(gate_and_up)
        return out

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """It has no weights; Megatron asks every part of its MLP."""
        return {}


def _rotate_into(
    out: torch.Tensor, heads: torch.Tensor, cos_S11D: torch.Tensor, sin_S11D: torch.Tensor, forwards: bool
) -> None:
    """Write heads [S, B, N, D] turned by their angles, or back, to ``out``."""
    half = heads.shape[-1] // 2
    sin = sin_S11D[..., :half]
    torch.mul(heads, cos_S11D, out=out)
    sign = 1 if forwards else -1
    out[..., :half].addcmul_(heads[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(heads[..., :half], sin, value=sign)


def _empty_by_head(like_SBND: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[S, B, N, D] whose every head lies in one piece, as attention reads it."""
    length, rows, _, width = like_SBND.shape
    return like_SBND.new_empty(rows, num_heads, length, width).permute(2, 0, 1, 3)


class Rotate(torch.autograd.Function):
    """Heads [S, B, N, D] turned by the angles whose cosines and sines are given, [S, 1 or B, 1, D]."""

    @staticmethod
    def forward(ctx: Any, heads_SBND: torch.Tensor, cos_S11D: torch.Tensor, sin_S11D: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_S11D, sin_S11D)
        out = _empty_by_head(heads_SBND, heads_SBND.shape[2])
        _rotate_into(out, heads_SBND, cos_S11D, sin_S11D, forwards=True)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        out = torch.empty_like(gradients[0], memory_format=torch.contiguous_format)
        cos_S11D, sin_S11D = ctx.saved_tensors
        _rotate_into(out, gradients[0], cos_S11D, sin_S11D, forwards=False)
        return out, None, None


class SplitAndRotate(torch.autograd.Function):
    """Query, key and value [S, B, N or G, D] out of what the layer's one matrix gave, query and key turned.

    The input is [S, B, G, (R + 2) * D]: each group's queries, then its key, then its value.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, cos_S11D: torch.Tensor, sin_S11D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width, groups = cos_S11D.shape[-1], mixed.shape[2]
        repeats = mixed.shape[3] // width - 2
        ctx.save_for_backward(cos_S11D, sin_S11D)
        ctx.shape, ctx.repeats = mixed.shape, repeats
        query = _empty_by_head(mixed[..., :width], groups * repeats)
        for number in range(repeats):
            part = mixed[..., number * width : (number + 1) * width]
            _rotate_into(query[:, :, number::repeats], part, cos_S11D, sin_S11D, forwards=True)
        key = _empty_by_head(mixed[..., :width], groups)
        _rotate_into(key, mixed[..., -2 * width : -width], cos_S11D, sin_S11D, forwards=True)
        value = _empty_by_head(mixed[..., :width], groups).copy_(mixed[..., -width:])
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        query, key, value = gradients
        cos_S11D, sin_S11D = ctx.saved_tensors
        width, repeats = cos_S11D.shape[-1], ctx.repeats
        mixed = query.new_empty(ctx.shape)
        for number in range(repeats):
            part = mixed[..., number * width : (number + 1) * width]
            _rotate_into(part, query[:, :, number::repeats], cos_S11D, sin_S11D, forwards=False)
        _rotate_into(mixed[..., -2 * width : -width], key, cos_S11D, sin_S11D, forwards=False)
        mixed[..., -width:].copy_(value)
        return mixed, None, None

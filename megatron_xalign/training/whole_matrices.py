"""Products with matrices that one process holds whole, on the CPU.

Megatron-Core's linear layers are made for matrices that lie over tensor-parallel ranks. Without those, every product
still passes through three autograd functions and a hook of data parallelism, in Python, and hands on a gradient that
nobody reads. For small models that is a few percent of a step.
"""

# M tokens, I inputs, O outputs

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from megatron_xalign.platform import add_weight_gradient


def use_whole_matrices(model: torch.nn.Module) -> None:
    """Let the linear layers of a bare ``GPTModel`` that are Megatron's own and have no other part elsewhere do less.

    Gradients of weights go to Megatron's buffers as before. It is for gradients that are reduced when all are there:
    no hook hears of them one by one.
    """
    # Imported late: the CPU backend must be in place first.
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for module in model.modules():
        if type(module) in (ColumnParallelLinear, RowParallelLinear):
            module.forward = MethodType(_forward, module)


def _forward(
    layer: Any, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a ``ColumnParallelLinear`` or ``RowParallelLinear`` alone in its group gives: output and bias to add."""
    weight = layer.weight if weight is None else weight
    output: torch.Tensor = _Product.apply(input_, weight)
    if layer.bias is None:
        return output, None
    return (output, layer.bias) if layer.skip_bias_add else (output + layer.bias, None)


class _Product(torch.autograd.Function):
    """x [..., I] times the transpose of w [O, I]; the gradient of w goes to its buffer where it has one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_MI, weight_OI)
        # As Megatron does: what it saves may be a copy of the parameter without its buffer.
        ctx.main_grad = getattr(weight_OI, "main_grad", None)
        # Not a view of the product: what comes after may overwrite it.
        out = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
        torch.mm(x_MI, weight_OI.t(), out=out.view(-1, weight_OI.shape[0]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (gradient,) = gradients
        x_MI, weight_OI = ctx.saved_tensors
        gradient_MO = gradient.reshape(-1, gradient.shape[-1])
        to_x = (gradient_MO @ weight_OI).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        if ctx.main_grad is None:
            return to_x, gradient_MO.t() @ x_MI
        add_weight_gradient(x_MI, gradient_MO, ctx.main_grad)
        return to_x, None

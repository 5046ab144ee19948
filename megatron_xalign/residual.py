"""Pushes the residual stream along a vector while a model runs: what interventions of capture and steering share."""

# S sequence, B batch, H hidden width

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def pushed(hidden_SBH: torch.Tensor, push_H: torch.Tensor, keep_norm: bool) -> torch.Tensor:
    """Add a vector at every token, in float32 or more, and give the type back.

    Args:
        hidden_SBH: any leading axes.
        push_H: what is added, on the same device.
        keep_norm: whether the sum is scaled to the length the state had, token by token. Where nothing is left there is
            no direction, and the state stays.
    """
    wide = hidden_SBH.to(torch.promote_types(hidden_SBH.dtype, torch.float32))
    moved = wide + push_H.to(wide.dtype)
    if keep_norm:
        old, new = (values.norm(dim=-1, keepdim=True) for values in (wide, moved))
        moved = torch.where(new > 0, moved * (old / new.clamp_min(torch.finfo(wide.dtype).tiny)), wide)
    return moved.to(hidden_SBH.dtype)


def change_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change what a module gives out, or the first of it where it gives a tuple, until the handle is removed."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)

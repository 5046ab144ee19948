"""Keep what Transformer Engine remembers between forward passes from being touched by passes that only look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def undisturbed(model_chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put back scales and largest values of delayed FP8 scaling after the block.

    Its kernels note the largest value of everything they quantise, in evaluation mode too, and the next training step
    would scale by what a probe had shown. Weights kept for later micro-batches are forgotten as well: Megatron asks for
    them anew at the first micro-batch of every step.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    firsts: list[tuple[Any, Any]] = []
    for chunk in model_chunks:
        for module in chunk.modules():
            if hasattr(module, "is_first_microbatch"):
                firsts.append((module, module.is_first_microbatch))
            meta = getattr(module, "fp8_meta", None)
            for scaling in (meta or {}).values() if isinstance(meta, dict) else ():
                for name in ("amax_history", "scale", "scale_inv"):
                    value = getattr(scaling, name, None)
                    if isinstance(value, torch.Tensor):
                        kept.append((value, value.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for value, before in kept:
                value.copy_(before)
        for module, first in firsts:
            module.is_first_microbatch = first

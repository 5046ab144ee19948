"""A pass that only looks leaves Transformer Engine's memory as it was; modules here are made like its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_xalign.training.te_state import undisturbed


class Linear(torch.nn.Module):
    """Notes the largest value it sees, as Transformer Engine's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first_microbatch = True
        self.fp8_meta: dict[str, Any] = {
            "scaling_fwd": SimpleNamespace(amax_history=torch.zeros(4, 3), scale=torch.ones(3)), "recipe": "delayed",
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        history = self.fp8_meta["scaling_fwd"].amax_history
        history[0, 0] = torch.maximum(history[0, 0], x.abs().max())
        self.is_first_microbatch = False
        return x


def test_largest_values_and_scales_are_put_back_in_place_even_after_an_error() -> None:
    layer = Linear()
    model = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    history = layer.fp8_meta["scaling_fwd"].amax_history
    history[0, 0] = 2.0
    with undisturbed([model]):
        layer(torch.tensor([7.0]))
        assert history[0, 0] == 7
    assert history[0, 0] == 2 and layer.fp8_meta["scaling_fwd"].amax_history is history
    assert layer.is_first_microbatch is True
    with pytest.raises(RuntimeError, match="stopped"), undisturbed([model]):
        layer(torch.tensor([7.0]))
        raise RuntimeError("stopped")
    assert history[0, 0] == 2

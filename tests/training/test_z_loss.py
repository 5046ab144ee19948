"""The z-loss and its gradient against torch's own logarithm of summed exponentials."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_xalign.training.z_loss import add_z_loss, take_z_loss


class Model(torch.nn.Module):
    """As much of a ``GPTModel`` as the z-loss looks at; it spoils its logits in place, as Megatron's loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.output_layer = OutputLayer()

    def forward(self, logits_SBV: torch.Tensor) -> torch.Tensor:
        out, _ = self.output_layer(logits_SBV)
        with torch.no_grad():
            out.zero_()
        return out


class OutputLayer(torch.nn.Module):
    def forward(self, logits_SBV: torch.Tensor) -> tuple[torch.Tensor, None]:
        return logits_SBV * 1.0, None


ONE_PROCESS: Any = SimpleNamespace(tensor_size=1)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_loss_and_gradient_are_those_of_the_formula(scale: float) -> None:
    torch.manual_seed(1)
    model = Model()
    add_z_loss(model, 0.1, ONE_PROCESS)
    logits = (torch.randn(5, 2, 11) * scale).requires_grad_()
    model(logits)
    found = take_z_loss(model)
    assert found is not None and found.shape == (2, 5)
    expected = 0.1 * torch.logsumexp(logits, -1).square().T
    torch.testing.assert_close(found, expected)
    weight = torch.rand(2, 5)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), logits, retain_graph=True)
    (own,) = torch.autograd.grad((found * weight).sum(), logits)
    torch.testing.assert_close(own, gradient)


def test_it_is_handed_over_once_and_not_computed_in_evaluation() -> None:
    model = Model()
    add_z_loss(model, 0.1, ONE_PROCESS)
    model(torch.zeros(1, 1, 4, requires_grad=True))
    assert take_z_loss(model) is not None and take_z_loss(model) is None
    model.eval()
    model(torch.zeros(1, 1, 4, requires_grad=True))
    assert take_z_loss(model) is None

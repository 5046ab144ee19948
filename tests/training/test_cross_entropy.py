"""Cross-entropy over a whole vocabulary: torch's own is the oracle."""

from __future__ import annotations

import pytest
import torch

from megatron_xalign.training.cross_entropy import CrossEntropy

S, B, V = 5, 3, 37


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_losses_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits_SBV = (6 * torch.randn(S, B, V, generator=generator)).to(dtype)
    # Padded rows of the vocabulary, as the model masks them, and a logit that float32 exponentials would not survive.
    logits_SBV[..., 30:] = torch.finfo(dtype).min
    logits_SBV[0, 0, 3] = 500.0
    labels_SB = torch.randint(30, (S, B), generator=generator)
    weight_SB = torch.rand(S, B, generator=generator)
    expected = logits_SBV.float().clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels_SB.flatten(), reduction="none")
    (losses.view(S, B) * weight_SB).sum().backward()

    given = logits_SBV.clone().requires_grad_()
    # The function overwrites float32 logits, as Megatron's does; a leaf may not be.
    found = CrossEntropy.apply(given * 1, labels_SB)
    (found * weight_SB).sum().backward()

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses.view(S, B), atol=2e-5, rtol=1e-6)
    assert given.grad is not None and expected.grad is not None and given.grad.dtype == dtype
    torch.testing.assert_close(given.grad.float(), expected.grad, atol=tolerance, rtol=0)

"""Products with whole matrices: torch's own linear is the oracle. Whole models are compared in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from megatron_xalign.training.whole_matrices import _forward

S, B, I, O = 5, 3, 7, 4  # noqa: E741


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_buffer", [False, True])
@pytest.mark.parametrize("in_one_piece", [False, True])
def test_outputs_and_gradients_are_those_of_torch(dtype: torch.dtype, has_buffer: bool, in_one_piece: bool) -> None:
    torch.manual_seed(4)
    given = torch.randn(S, B, I).to(dtype) if in_one_piece else torch.randn(B, S, I).to(dtype).transpose(0, 1)
    weight = torch.nn.Parameter(torch.randn(O, I).to(dtype))
    arriving = torch.randn(B, S, O).to(dtype).transpose(0, 1)
    x, expected_x, expected_weight = (t.detach().clone().requires_grad_() for t in (given, given, weight))
    functional.linear(expected_x, expected_weight).backward(arriving)
    if has_buffer:
        weight.main_grad = torch.ones(O, I)  # type: ignore[attr-defined]
    out, bias = _forward(SimpleNamespace(weight=weight, bias=None), x)
    assert bias is None
    torch.testing.assert_close(out, functional.linear(given, weight))
    out.backward(arriving)
    torch.testing.assert_close(x.grad, expected_x.grad)
    assert expected_weight.grad is not None
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-1}
    if has_buffer:
        # Added to the buffer, in float32; nothing is left for anybody to add once more.
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad, 1 + expected_weight.grad.float(), **close)
    else:
        torch.testing.assert_close(weight.grad, expected_weight.grad, **close)


def test_a_bias_is_added_or_handed_on_and_another_weight_may_be_given() -> None:
    torch.manual_seed(5)
    x, bias, own, shared = torch.randn(S, B, I), torch.randn(O), torch.randn(O, I), torch.randn(O, I)
    layer = SimpleNamespace(weight=own, bias=bias, skip_bias_add=False)
    torch.testing.assert_close(_forward(layer, x)[0], functional.linear(x, own, bias))
    layer.skip_bias_add = True
    out, left = _forward(layer, x, shared)
    torch.testing.assert_close(out, functional.linear(x, shared))
    assert left is bias


def test_a_frozen_weight_and_an_input_without_gradient_get_none() -> None:
    weight = torch.nn.Parameter(torch.randn(O, I), requires_grad=False)
    weight.main_grad = torch.zeros(O, I)  # type: ignore[attr-defined]
    x = torch.randn(S, B, I, requires_grad=True)
    _forward(SimpleNamespace(weight=weight, bias=None), x)[0].sum().backward()
    assert x.grad is not None and not weight.main_grad.any()
    weight.requires_grad_()
    _forward(SimpleNamespace(weight=weight, bias=None), x.detach())[0].sum().backward()
    assert weight.main_grad.any()

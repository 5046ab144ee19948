"""Norm, SwiGLU and rotary positions against transformers' Llama and torch's autograd, gradients too."""

# S sequence, B micro-batch, N heads, G key/value heads, R = N / G, D head width, H hidden, F ffn width

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from megatron_xalign.training.fused import RootMeanSquareNorm, Rotate, SplitAndRotate, SwiGLU

S, B, D = 7, 2, 8


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 48), (5, 3, 4, 16)])
def test_the_norm_and_its_gradients_are_llamas(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    theirs = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    theirs.weight.data = torch.randn(shape[-1]).to(dtype)
    given = (3 * torch.randn(shape) + 1).to(dtype)
    given[0, 0] = 0.0
    # As the gradient of an attention head comes: not in one piece.
    arriving = torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    x, weight = given.clone().requires_grad_(), theirs.weight.detach().clone().requires_grad_()
    out = RootMeanSquareNorm.apply(x, weight, 1e-5)
    out.backward(arriving)
    expected_x = given.clone().requires_grad_()
    expected = theirs(expected_x)
    expected.backward(arriving)
    assert x.grad is not None and expected_x.grad is not None and weight.grad is not None
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    # Row by row: that of the row of zeros is hundreds of times as large.
    largest = expected_x.grad.abs().amax(-1, keepdim=True)
    close = 1e-6 if dtype == torch.float32 else 2e-2
    assert ((x.grad - expected_x.grad).abs() <= close * largest).all()
    torch.testing.assert_close(weight.grad, theirs.weight.grad, **tolerance(dtype))
    assert x.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient_are_those_of_autograd_to_the_bit(dtype: torch.dtype) -> None:
    """The input of the last matrix is what capture counts: it must be silu(gate) * up exactly."""
    torch.manual_seed(2)
    given, arriving = (2 * torch.randn(S, B, 2 * 24)).to(dtype), torch.randn(S, B, 24).to(dtype)
    x, expected_x = given.clone().requires_grad_(), given.clone().requires_grad_()
    out = SwiGLU()(x)
    out.backward(arriving)
    gate, up = expected_x.chunk(2, -1)
    expected = functional.silu(gate) * up
    expected.backward(arriving)
    assert torch.equal(out, expected)
    assert x.grad is not None and expected_x.grad is not None and torch.equal(x.grad, expected_x.grad)


def angles(own_of_each_row: bool) -> torch.Tensor:
    """[S, 1 or B, 1, D], both halves the same, as Megatron's."""
    positions = torch.stack([torch.arange(S), (torch.arange(S) - 3) % S], 1)[:, : 2 if own_of_each_row else 1]
    half = positions[..., None] * 100.0 ** -(torch.arange(0, D, 2) / D)
    return torch.cat([half, half], -1)[:, :, None]


def turned_by_transformers(query_SBND: torch.Tensor, key_SBGD: torch.Tensor, angles_SBD: torch.Tensor) -> list:
    of_all = angles_SBD.transpose(0, 1)
    turned = apply_rotary_pos_emb(
        query_SBND.permute(1, 2, 0, 3), key_SBGD.permute(1, 2, 0, 3),
        of_all.cos().to(query_SBND.dtype), of_all.sin().to(query_SBND.dtype),
    )
    return [heads.permute(2, 0, 1, 3) for heads in turned]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "repeats"), [(3, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("own_of_each_row", [False, True])
def test_query_key_and_value_are_cut_and_turned_as_llamas(
    dtype: torch.dtype, groups: int, repeats: int, own_of_each_row: bool
) -> None:
    torch.manual_seed(3)
    given = torch.randn(S, B, groups, (repeats + 2) * D).to(dtype)
    turns = angles(own_of_each_row)
    cos, sin = turns.cos().to(dtype), turns.sin().to(dtype)
    num_heads = (groups * repeats, groups, groups)
    arriving = [torch.randn(B, heads, S, D).to(dtype).permute(2, 0, 1, 3) for heads in num_heads]

    def cut(mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = mixed.split([repeats * D, D, D], dim=-1)
        return query.reshape(S, B, groups * repeats, D), key, value

    expected_x = given.clone().requires_grad_()
    query, key, value = cut(expected_x)
    expected = [*turned_by_transformers(query, key, turns[:, :, 0].expand(S, B, D)), value]
    torch.autograd.backward(expected, arriving)
    assert expected_x.grad is not None

    at_once = given.clone().requires_grad_()
    torch.autograd.backward(found := SplitAndRotate.apply(at_once, cos, sin), arriving)
    apart = given.clone().requires_grad_()
    query, key, value = cut(apart)
    one_by_one = [Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin), value]
    torch.autograd.backward(one_by_one, arriving)
    for out, x in ((found, at_once), (one_by_one, apart)):
        assert x.grad is not None
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance(dtype))
        torch.testing.assert_close(x.grad, expected_x.grad, **tolerance(dtype))
    # Attention reads every head in one piece.
    assert all(heads.permute(1, 2, 0, 3).is_contiguous() for heads in found)

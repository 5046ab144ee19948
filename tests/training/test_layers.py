"""Norms against Hugging Face's, attention against its definition."""

# S sequence, B micro-batch, N heads, G key/value heads, D head width, H hidden

from __future__ import annotations

import enum
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from megatron_xalign.training.layers import CausalAttention, Norm


class Mask(enum.Enum):
    causal = 1
    padding = 2


def norm_config(normalization: str, dtype: torch.dtype, sequence_parallel: bool = False) -> Any:
    return SimpleNamespace(normalization=normalization, params_dtype=dtype, sequence_parallel=sequence_parallel)


def attention(**changes: Any) -> CausalAttention:
    settings = {"context_parallel_size": 1, "attention_dropout": 0.0, **changes.pop("config", {})}
    arguments = {"layer_number": 1, "attn_mask_type": Mask.causal, "attention_type": "self", **changes}
    return CausalAttention(SimpleNamespace(**settings), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    ours, theirs = Norm(norm_config("RMSNorm", dtype), 48, eps=1e-5), LlamaRMSNorm(48, eps=1e-5).to(dtype)
    assert ours.weight is not None
    ours.weight.data = theirs.weight.data = torch.randn(48).to(dtype)
    hidden_SBH = torch.randn(5, 3, 48).to(dtype) * 3
    torch.testing.assert_close(ours(hidden_SBH), theirs(hidden_SBH), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_has_no_weights_and_is_olmos(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    norm = Norm(norm_config("LayerNorm", dtype), 48, eps=1e-5)
    assert list(norm.parameters()) == []
    hidden_SBH = torch.randn(5, 3, 48).to(dtype) * 3 + 1
    assert torch.equal(norm(hidden_SBH), OlmoLayerNorm(48)(hidden_SBH))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_weights_are_marked_for_the_sum_over_sequence_shards(sequence_parallel: bool) -> None:
    norm = Norm(norm_config("RMSNorm", torch.float32, sequence_parallel), 8)
    assert norm.weight is not None and norm.weight.sequence_parallel is sequence_parallel


def test_another_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'BatchNorm'"):
        Norm(norm_config("BatchNorm", torch.float32), 8)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_attention_is_a_softmax_over_earlier_positions(heads: int, groups: int) -> None:
    torch.manual_seed(3)
    length, rows, width = 7, 2, 8
    query = torch.randn(length, rows, heads, width, requires_grad=True)
    key, value = torch.randn(2, length, rows, groups, width).unbind()
    out = attention()(query, key, value)
    assert out.shape == (length, rows, heads * width)
    for row in range(rows):
        for head in range(heads):
            group = head * groups // heads
            for position in range(length):
                scores = key[: position + 1, row, group] @ query[position, row, head] / math.sqrt(width)
                expected = torch.softmax(scores, 0) @ value[: position + 1, row, group]
                found = out[position, row, head * width : (head + 1) * width]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_documents_apart_see_nothing_of_one_another() -> None:
    """Each row like its documents one by one; the ids need not be in order, and -1 is a document like any other."""
    torch.manual_seed(4)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 2, -1], [3, 3, -1, -1, -1, -1, -1]], dtype=torch.int32)
    query = torch.randn(7, 2, 4, 8, requires_grad=True)
    key, value = torch.randn(2, 7, 2, 2, 8).unbind()
    out = attention()(query, key, value, document_ids)
    for row in range(2):
        for document in document_ids[row].unique():
            own = document_ids[row] == document
            alone = attention()(query[own, row : row + 1], key[own, row : row + 1], value[own, row : row + 1])
            torch.testing.assert_close(out[own, row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_what_the_attention_would_not_honour_is_refused() -> None:
    tensors = [torch.zeros(2, 1, 1, 4)] * 3
    with pytest.raises(ValueError, match="must be None or document ids"):
        attention()(*tensors, attention_mask=torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be None"):
        attention()(*tensors, packed_seq_params=object())
    with pytest.raises(ValueError, match="padding self-attention"):
        attention(attn_mask_type=Mask.padding)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        attention(config={"attention_dropout": 0.1})

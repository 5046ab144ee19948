"""Which tokens of a sequence a context-parallel rank holds, against Megatron's own cut."""

from __future__ import annotations

import pytest
import torch

from megatron_xalign.batch import Batch, context_chunks


def megatrons_cut(sequence: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What ``megatron.core.utils.get_batch_on_this_cp_rank`` does to one [B, S] tensor (its call needs CUDA)."""
    rows, length = sequence.shape
    pieces = sequence.view(rows, 2 * size, length // (2 * size))
    return pieces.index_select(1, torch.tensor([rank, 2 * size - rank - 1])).reshape(rows, -1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_on_one_rank_cut_as_megatron_cuts(size: int) -> None:
    length = 24
    fields = {name: torch.arange(2 * length).view(2, length) * (n + 1) for n, name in enumerate(Batch.__annotations__)}
    whole = Batch(**fields)
    parts = [whole.part(rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        for name, tensor in vars(part).items():
            assert torch.equal(tensor, megatrons_cut(fields[name], rank, size))
    assert torch.equal(torch.cat([part.tokens for part in parts], 1).sort().values, whole.tokens)


def test_chunks_are_equal_or_refused() -> None:
    assert context_chunks(16, 1, 2) == (slice(4, 8), slice(8, 12))
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 4 equal chunks"):
        context_chunks(10, 0, 2)

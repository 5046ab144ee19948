"""Where the tokens of a process are: their rotary positions, and which of them see one another.

Under context parallelism a process holds two chunks of every sequence, and with ``data.reset_position_ids`` positions
start again at every document. Megatron's rotary embedding counts positions from 0 through a sequence and knows the
former only, with a call that needs CUDA.
"""

# S sequence on this rank, T whole sequence, B micro-batch, D rotary width

from __future__ import annotations

from typing import Any

import torch

from megatron_xalign.batch import Batch, context_chunks
from megatron_xalign.topology import Ranks


class Rotary(torch.nn.Module):
    """Megatron's rotary angles at the positions that this process holds.

    Args:
        megatron: the ``RotaryEmbedding`` that a ``GPTModel`` built.
        context_rank: which part of every sequence this process holds.
        context_size: processes that share every sequence.
        by_position_ids: whether positions are those of the batch.
    """

    def __init__(self, megatron: Any, context_rank: int, context_size: int, by_position_ids: bool) -> None:
        super().__init__()
        self.megatron = megatron
        self.context_rank, self.context_size = context_rank, context_size
        self.by_position_ids = by_position_ids
        self.position_ids_BS: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Length of the whole sequence; the model asks for it."""
        return int(self.megatron.get_rotary_seq_len(*args, **kwargs))

    def forward(self, max_seq_len: int, **kwargs: Any) -> torch.Tensor:
        """Angles [S, 1, 1, D], or [S, B, 1, D] by position ids; called before anything that may be recomputed."""
        angles_T11D: torch.Tensor = self.megatron.get_emb(max_seq_len)
        if self.by_position_ids:
            assert self.position_ids_BS is not None
            return angles_T11D[self.position_ids_BS.T, 0]
        if self.context_size == 1:
            return angles_T11D
        pieces = context_chunks(max_seq_len, self.context_rank, self.context_size)
        return torch.cat([angles_T11D[piece] for piece in pieces])


def place_tokens(model: Any, ranks: Ranks, *, reset_position_ids: bool, reset_attention_mask: bool) -> None:
    """Let a bare ``GPTModel`` know where the tokens are that ``call_model`` will give it."""
    model.attends_within_documents = reset_attention_mask
    if reset_position_ids or ranks.context_size > 1:
        model.rotary_pos_emb = Rotary(
            model.rotary_pos_emb, ranks.context_rank, ranks.context_size, by_position_ids=reset_position_ids
        )


def call_model(chunk: Any, gpt: Any, whole: Batch, part: Batch) -> Any:
    """Run a model chunk over the part of a micro-batch that this process holds.

    Args:
        chunk: the chunk as ``build_model`` gives it.
        gpt: the bare ``GPTModel`` inside.
        whole: the micro-batch, [B, T].
        part: this process's part of it, [B, S].

    Returns:
        The loss of every token of the part, [B, S], where the chunk is the model's last, else its residual stream.
    """
    if isinstance(gpt.rotary_pos_emb, Rotary) and gpt.rotary_pos_emb.by_position_ids:
        gpt.rotary_pos_emb.position_ids_BS = part.position_ids
    # It travels as the mask does, so that it is there again when an activation is recomputed.
    document_ids_BT = whole.document_ids if gpt.attends_within_documents else None
    return chunk(part.tokens, part.position_ids, document_ids_BT, labels=part.labels)

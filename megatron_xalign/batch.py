"""One micro-batch as it travels from the data to the loss and to the capture hooks."""

# B micro-batch, S sequence

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

NO_LANGUAGE = -1
"""Language id of tokens that belong to no language: end of document, template, padding."""


@dataclass
class Batch:
    """Tensors of one micro-batch, all on one device."""

    tokens: torch.Tensor
    """int64 [B, S]: what the model reads."""
    labels: torch.Tensor
    """int64 [B, S]: the next token at every position."""
    loss_mask: torch.Tensor
    """float32 [B, S]: 1 where the label bears loss."""
    position_ids: torch.Tensor
    """int64 [B, S]."""
    language_ids: torch.Tensor
    """int8 [B, S]: language of each token read, an index into the run's languages; ``NO_LANGUAGE`` for none."""
    label_language_ids: torch.Tensor
    """int8 [B, S]: language of each label."""
    source_ids: torch.Tensor
    """int16 [B, S]: source of each token, an index into ``data.sources``; -1 for padding and probes."""
    document_ids: torch.Tensor
    """int32 [B, S]: which document of its row a token is of, counting from 0; -1 for padding of training samples."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Batch:
        """Take arrays [B, S] by name, without copying them where torch allows it."""
        return cls(**{item.name: torch.from_numpy(arrays[item.name]) for item in fields(cls)})

    def part(self, context_rank: int, context_size: int) -> Batch:
        """The tokens of every sequence that one context-parallel rank holds, [B, S / context_size]."""
        if context_size == 1:
            return self
        pieces = context_chunks(self.tokens.shape[1], context_rank, context_size)
        return Batch(
            **{name: torch.cat([tensor[:, piece] for piece in pieces], dim=1) for name, tensor in vars(self).items()}
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; itself where it is there."""
        if self.tokens.device == device:
            return self
        return Batch(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


def context_positions(length: int, context_rank: int, context_size: int) -> torch.Tensor:
    """int64 [S / context_size]: where in the sequence the tokens of ``Batch.part`` are."""
    if context_size == 1:
        return torch.arange(length)
    pieces = context_chunks(length, context_rank, context_size)
    return torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])


def context_chunks(length: int, context_rank: int, context_size: int) -> tuple[slice, slice]:
    """Positions of a sequence that one context-parallel rank holds, in the order in which it holds them.

    Of ``2 * context_size`` equal chunks rank r has r and, counted from the end, r: under a causal mask every rank then
    has as much to attend to.

    Raises:
        ValueError: the sequence cannot be cut so.

    Source: Megatron-Core's ``get_batch_on_this_cp_rank``.
    """
    if length % (2 * context_size):
        raise ValueError(f"{length} tokens cannot be cut into {2 * context_size} equal chunks.")
    width = length // (2 * context_size)
    first, second = context_rank, 2 * context_size - 1 - context_rank
    return slice(first * width, (first + 1) * width), slice(second * width, (second + 1) * width)


def collate(samples: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Stack samples (dicts of [S] arrays, as a blend gives them) into a batch of [B, S] tensors."""
    return Batch(
        **{item.name: torch.from_numpy(np.stack([sample[item.name] for sample in samples])) for item in fields(Batch)}
    )


class CurrentBatch:
    """Tells hooks which micro-batch the forward pass now running belongs to; the training loop sets it."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        """What the model sees: this process's part of every sequence under context parallelism."""
        self.whole: Batch | None = None
        """Whole sequences; None where the part is the whole."""

"""A checkpoint's model without its training: on the processes of a job, or as a function from tokens to logits."""

# B sequences, S tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_xalign import topology
from megatron_xalign.config import ParallelConfig, ParamsDtype, RunConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.checkpoint_folder import MANIFEST, read_manifest
from megatron_xalign.training.checkpoint import load_weights, unwrap
from megatron_xalign.training.model import build_model, padded_vocab_size

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids int64 [B, S] to logits float32 [B, S, V], V without padding."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model on the processes of this job."""

    model_chunks: list[Any]
    """This process's part, as ``build_model`` gives it, in evaluation mode."""
    ranks: topology.Ranks
    """This process's place."""
    config: RunConfig
    """Of the run that wrote the checkpoint."""
    vocab_size: int
    """Ids of the tokenizer."""
    step: int
    """Finished optimizer steps."""

    @property
    def layers(self) -> list[torch.nn.Module]:
        """This process's blocks in order; their output is [S, B, H], first of a tuple."""
        return [layer for chunk in self.model_chunks for layer in unwrap(chunk).decoder.layers]

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """float32 [B, S, vocabulary] on the CPU, of a model that lies on this process alone."""
        device = self.ranks.device
        tokens = tokens_BS.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        logits_BSV: torch.Tensor = unwrap(self.model_chunks[0])(tokens, positions, None)
        return logits_BSV[..., : self.vocab_size].float().cpu()


def read_checkpoint(checkpoint: str | Path) -> tuple[RunConfig, int, int]:
    """The config of the run that wrote a checkpoint, ids of its tokenizer, and finished steps.

    Raises:
        CheckpointError: the checkpoint does not say what model it holds.
    """
    manifest = read_manifest(Path(checkpoint))
    extra = manifest["extra"]
    if not isinstance(extra.get("vocab_size"), int) or not extra.get("config"):
        raise CheckpointError(f"{Path(checkpoint) / MANIFEST} lacks the run's config or its vocabulary size.")
    return from_tree(RunConfig, extra["config"]), extra["vocab_size"], int(manifest["step"])


@contextmanager
def load_model(
    checkpoint: str | Path, parallel: ParallelConfig | None = None, params_dtype: ParamsDtype = "fp32",
    documents_apart: bool = False,
) -> Iterator[LoadedModel]:
    """Rebuild the model of a checkpoint, whatever layout wrote it, in a layout of this job; leave it after the block.

    It is Megatron's model with weights read by Megatron, in float32 unless asked otherwise, whatever the run computed
    in. A row of tokens is one document to it, where the run's ``data.reset_position_ids`` and
    ``data.reset_attention_mask`` change nothing. With ``documents_apart`` they hold as in the run; the model then runs
    on batches, which say where documents begin, through ``forward.build_forward_only`` alone.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say what model it holds.
        ValueError: this process already belongs to a job.
    """
    if dist.is_initialized():
        raise ValueError("this process already belongs to a job; call it in a process of its own.")
    checkpoint, parallel = Path(checkpoint), parallel or ParallelConfig()
    config, vocab_size, step = read_checkpoint(checkpoint)
    with topology.start(parallel, config.seed) as ranks:
        divisible_by = config.model.make_vocab_size_divisible_by
        chunks = build_model(
            config.model, padded_vocab_size=padded_vocab_size(vocab_size, divisible_by, ranks.tensor_size),
            seq_length=config.data.seq_length, parallel=parallel, params_dtype=params_dtype, recompute="none",
            ranks=ranks, seed=config.seed, vocab_size=vocab_size,
            reset_position_ids=documents_apart and config.data.reset_position_ids,
            reset_attention_mask=documents_apart and config.data.reset_attention_mask,
        )
        load_weights(checkpoint, chunks, ranks)
        for chunk in chunks:
            chunk.eval()
        yield LoadedModel(chunks, ranks, config, vocab_size, step)


@contextmanager
def load_for_inference(checkpoint: str | Path) -> Iterator[Logits]:
    """The model of a checkpoint on this process alone, in float32, as a function; leave it after the block.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say what model it holds.
        ValueError: this process already belongs to a job.
    """
    with load_model(checkpoint) as loaded:
        yield loaded.logits

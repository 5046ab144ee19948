"""A checkpoint's model on one process, as a function from tokens to logits."""

# B sequences, S tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_xalign import topology
from megatron_xalign.config import ParallelConfig, RunConfig, from_tree
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.checkpoint_folder import MANIFEST, read_manifest
from megatron_xalign.training.checkpoint import load_weights, unwrap
from megatron_xalign.training.model import build_model, padded_vocab_size

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids int64 [B, S] to logits float32 [B, S, V], V without padding."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model on this process."""

    logits: Logits
    layers: Sequence[torch.nn.Module]
    """Its blocks in order; their output is [S, B, H], first of a tuple."""
    vocab_size: int
    seq_length: int
    config: RunConfig
    """Of the run that wrote the checkpoint."""


@contextmanager
def load_for_inference(checkpoint: str | Path) -> Iterator[Logits]:
    """``load_model`` for who needs logits only."""
    with load_model(checkpoint) as model:
        yield model.logits


@contextmanager
def load_model(checkpoint: str | Path) -> Iterator[LoadedModel]:
    """Rebuild the model of a checkpoint, whatever layout wrote it, on this process alone; leave it after the block.

    It is Megatron's model with weights read by Megatron, in float32 whatever the run computed in, so that it can be
    compared with another program's reading of the same weights.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say what model it holds.
        ValueError: this process already belongs to a job.
    """
    if dist.is_initialized():
        raise ValueError("this process already belongs to a job; call it in a process of its own.")
    checkpoint = Path(checkpoint)
    extra = read_manifest(checkpoint)["extra"]
    if not isinstance(extra.get("vocab_size"), int) or not extra.get("config"):
        raise CheckpointError(f"{checkpoint / MANIFEST} lacks the run's config or its vocabulary size.")
    config, vocab_size = from_tree(RunConfig, extra["config"]), extra["vocab_size"]
    parallel = ParallelConfig()
    with topology.start(parallel, config.seed) as ranks:
        chunks = build_model(
            config.model,
            padded_vocab_size=padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, 1),
            seq_length=config.data.seq_length, parallel=parallel, params_dtype="fp32", recompute="none", ranks=ranks,
            seed=config.seed, vocab_size=vocab_size,
        )
        load_weights(checkpoint, chunks, ranks)
        model = unwrap(chunks[0]).eval()

        @torch.no_grad()
        def logits_of(tokens_BS: torch.Tensor) -> torch.Tensor:
            tokens = tokens_BS.to(ranks.device)
            positions = torch.arange(tokens.shape[1], device=ranks.device).expand_as(tokens)
            logits_BSV: torch.Tensor = model(tokens, positions, None)
            return logits_BSV[..., :vocab_size].float().cpu()

        yield LoadedModel(logits_of, list(model.decoder.layers), vocab_size, config.data.seq_length, config)

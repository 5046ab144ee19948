"""Micro-batches through Megatron's pipeline schedules: with a backward pass for training, without for probes."""

# B micro-batch, S sequence

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.topology import Ranks
from megatron_xalign.training.fp8_linear import end_step as end_fp8_step
from megatron_xalign.training.te_state import undisturbed

ForwardOnly = Callable[[Sequence[Batch]], list[torch.Tensor] | None]


def forward_backward(
    model_chunks: Sequence[Any],
    batches: Sequence[Batch],
    current_batch: CurrentBatch,
    see_losses: Callable[[Batch, torch.Tensor], None],
) -> None:
    """Leave in Megatron's gradient buffers the gradient of the mean loss over the tokens of the global batch.

    Tokens are weighted by ``loss_mask``; the division is by their number over all data-parallel ranks and
    micro-batches, so the gradient does not depend on how the batch is cut. Gradients are summed over data-parallel
    ranks, over sequence shards for norms, and over both ends of the pipeline for tied embeddings.

    Args:
        model_chunks: what ``build_model`` returned.
        batches: this rank's micro-batches of one global batch, all of one shape, on the rank's device.
        current_batch: set to each micro-batch while its forward pass runs.
        see_losses: called on the last stage with each micro-batch and its losses, float32 [B, S], not masked.
    """
    # Imported late, here and below: the CPU backend must be in place first.
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    micro_batch_size, seq_length = batches[0].tokens.shape

    def loss_sum(batch: Batch, loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        see_losses(batch, loss_BS.detach())
        return (loss_BS * batch.loss_mask).sum(), batch.loss_mask.sum().to(torch.int), None

    def step(rest: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(rest)
        return _forward(model, batch, current_batch), partial(loss_sum, batch)

    # Megatron calls it at the end of the schedule with the number of tokens, because of calculate_per_token_loss.
    get_model_config(model_chunks[0]).finalize_model_grads_func = finalize_model_grads
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=list(model_chunks),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
    )
    end_fp8_step(model_chunks)


def build_forward_only(model_chunks: Sequence[Any], ranks: Ranks, current_batch: CurrentBatch) -> ForwardOnly:
    """A function that runs batches through the model as it is now and leaves no trace in training.

    It takes batches [B, S] on any device, of any shape each (S divisible by the tensor-parallel size under sequence
    parallelism), and must be called by every process with the same batches (data-parallel ranks may differ in theirs).
    It returns the loss of every token, float32 [B, S] for each batch, on the last pipeline stage and None elsewhere.
    The model runs in evaluation mode without gradients, random states are put back, and ``current_batch`` is set
    while each batch runs.
    """

    def run(batches: Sequence[Batch]) -> list[torch.Tensor] | None:
        modes = [chunk.training for chunk in model_chunks]
        losses: list[torch.Tensor] = []
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        try:
            for chunk in model_chunks:
                chunk.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=devices), undisturbed(model_chunks):
                for batch in batches:
                    losses += _forward_one(model_chunks, batch.to(ranks.device), current_batch)
        finally:
            for chunk, mode in zip(model_chunks, modes, strict=True):
                chunk.train(mode)
        return losses if ranks.is_last_stage else None

    return run


def _forward_one(model_chunks: Sequence[Any], batch: Batch, current_batch: CurrentBatch) -> list[torch.Tensor]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        return _forward(model, next(iterator), current_batch), lambda loss_BS, non_loss_data: loss_BS.float()

    micro_batch_size, seq_length = batch.tokens.shape
    # One schedule per batch: the pipeline's messages have the shape announced to it.
    results: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=list(model_chunks),
        num_microbatches=1,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results


def _forward(model: Any, batch: Batch, current_batch: CurrentBatch) -> torch.Tensor:
    """Loss per token [B, S] on the last stage, the residual stream on the others."""
    current_batch.batch = batch
    try:
        return model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    finally:
        current_batch.batch = None


"""Micro-batches through Megatron's pipeline schedules: with a backward pass for training, without for probes."""

# B micro-batch, S sequence

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megatron_xalign.batch import Batch, CurrentBatch, context_chunks
from megatron_xalign.topology import Ranks
from megatron_xalign.training.checkpoint import unwrap
from megatron_xalign.training.fp8_linear import end_step as end_fp8_step
from megatron_xalign.training.positions import call_model
from megatron_xalign.training.te_state import undisturbed
from megatron_xalign.training.z_loss import take_z_loss

ForwardOnly = Callable[[Sequence[Batch]], list[torch.Tensor] | None]


def forward_backward(
    model_chunks: Sequence[Any],
    batches: Sequence[Batch],
    current_batch: CurrentBatch,
    see_losses: Callable[[Batch, torch.Tensor, torch.Tensor | None], None],
    ranks: Ranks,
) -> None:
    """Leave in Megatron's gradient buffers the gradient of the mean loss over the tokens of the global batch.

    Tokens are weighted by ``loss_mask``; the division is by their number over all data- and context-parallel ranks and
    micro-batches, so the gradient does not depend on how the batch is cut. Gradients are summed over those ranks, over
    sequence shards for norms, and over both ends of the pipeline for tied embeddings.

    Args:
        model_chunks: what ``build_model`` returned.
        batches: this rank's micro-batches of one global batch, all of one shape, on the rank's device, whole
            sequences.
        current_batch: set to each micro-batch while its forward pass runs; under context parallelism to the part of it
            that this process holds.
        see_losses: called on the last stage with the same and its losses, float32 [B, S], not masked and without
            z-loss, and the z-loss likewise or None.
        ranks: this process's place.
    """
    # Imported late, here and below: the CPU backend must be in place first.
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    micro_batch_size, seq_length = batches[0].tokens.shape

    def loss_sum(
        batch: Batch, z_loss_BS: torch.Tensor | None, loss_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        see_losses(batch, loss_BS.detach(), None if z_loss_BS is None else z_loss_BS.detach())
        if z_loss_BS is not None:
            loss_BS = loss_BS + z_loss_BS
        return (loss_BS * batch.loss_mask).sum(), batch.loss_mask.sum().to(torch.int), None

    parts = [(batch, batch.part(ranks.context_rank, ranks.context_size)) for batch in batches]

    def step(rest: Iterator[tuple[Batch, Batch]], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        whole, part = next(rest)
        out = _forward(model, whole, part, current_batch)
        return out, partial(loss_sum, part, take_z_loss(unwrap(model)))

    # Megatron calls it at the end of the schedule with the number of tokens, because of calculate_per_token_loss.
    get_model_config(model_chunks[0]).finalize_model_grads_func = finalize_model_grads
    # An interleaved schedule runs every micro-batch through every chunk.
    iterators = [iter(parts) for _ in model_chunks]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model_chunks),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
    )
    end_fp8_step(model_chunks)


def build_forward_only(model_chunks: Sequence[Any], ranks: Ranks, current_batch: CurrentBatch) -> ForwardOnly:
    """A function that runs batches through the model as it is now and leaves no trace in training.

    It takes batches [B, S] on any device, of any shape each (S divisible by twice the context-parallel size, and what
    is left of it by the tensor-parallel size under sequence parallelism), and must be called by every process with the
    same batches (data-parallel ranks may differ in theirs). It returns the loss of every token, float32 [B, S] for each
    batch, on the last pipeline stage (on every context-parallel rank of it the whole) and None elsewhere. The model
    runs in evaluation mode without gradients, random states are put back, and ``current_batch`` is set while each batch
    runs: to this process's part of it under context parallelism, once for every model chunk.
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
                    loss_BS = _forward_one(model_chunks, batch.to(ranks.device), current_batch, ranks)
                    losses += [] if loss_BS is None else [loss_BS]
        finally:
            for chunk, mode in zip(model_chunks, modes, strict=True):
                chunk.train(mode)
        return losses if ranks.is_last_stage else None

    return run


def _forward_one(
    model_chunks: Sequence[Any], batch: Batch, current_batch: CurrentBatch, ranks: Ranks
) -> torch.Tensor | None:
    """Pass one batch through all stages, block of layers by block of layers.

    Not by Megatron's schedule, which takes no less than a micro-batch for every stage when it is interleaved.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.utils import get_model_config

    config = get_model_config(model_chunks[0])
    pipeline = P2PCommunicator(ranks.group_of("pipeline"), config)
    part = batch.part(ranks.context_rank, ranks.context_size)
    rows, length = part.tokens.shape
    if config.sequence_parallel:
        length //= ranks.tensor_size
    out = None
    for virtual, chunk in enumerate(model_chunks):
        is_last = ranks.holds_output(virtual)
        unwrap(chunk).set_input_tensor(
            pipeline.recv_forward((length, rows, config.hidden_size), ranks.holds_embedding(virtual))
        )
        out = _forward(chunk, batch, part, current_batch)
        pipeline.send_forward(out, is_last)
    if not ranks.is_last_stage:
        return None
    assert out is not None
    return _whole_rows(out.float(), ranks)


def _whole_rows(loss_BS: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Parts of the context-parallel ranks, put together in the order of the sequence."""
    if ranks.context_size == 1:
        return loss_BS
    parts = ranks.gather_over(loss_BS, "context")
    whole = torch.empty(loss_BS.shape[0], loss_BS.shape[1] * ranks.context_size, device=loss_BS.device)
    for rank, part in enumerate(parts):
        for piece, half in zip(
            context_chunks(whole.shape[1], rank, ranks.context_size), part.chunk(2, dim=1), strict=True
        ):
            whole[:, piece] = half
    return whole


def _forward(model: Any, whole: Batch, part: Batch, current_batch: CurrentBatch) -> torch.Tensor:
    """Loss per token [B, S] on the last stage, the residual stream on the others."""
    current_batch.batch, current_batch.whole = part, whole
    try:
        loss_or_hidden: torch.Tensor = call_model(model, unwrap(model), whole, part)
    finally:
        current_batch.batch = current_batch.whole = None
    return loss_or_hidden

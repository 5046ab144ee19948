"""Runs of 20 steps on layouts beyond tensor and pipeline, saved and continued; called through ``run_processes``."""

# K languages, L layers, F ffn width

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training_job import LANGUAGES, LENGTH, SOURCES, VOCAB, sample

from megatron_xalign import topology
from megatron_xalign.batch import Batch, CurrentBatch, collate
from megatron_xalign.batch_sizes import batch_sizes
from megatron_xalign.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_xalign.config.tree import from_tree

STEPS, SAVED_AT, LAYERS, GLOBAL_BATCH = 20, 10, 4, 4
MODEL: dict[str, Any] = {
    "num_layers": LAYERS, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "rotary_base": 500,
}
# A large epsilon: Adam would else blow up the last digits, in which layouts differ.
OPTIMIZER = OptimizerConfig(lr=2e-3, min_lr=5e-4, lr_warmup_steps=2, adam_eps=1e-4)
PADDED = 272
"""Rows of the embedding: 16 more than there are ids."""
HELD_OUT = (LENGTH, LENGTH // 2)
"""Lengths of the batches that are read without training."""


def with_documents(number: int) -> dict[str, np.ndarray]:
    """Sample k with several documents, positions that start again at each, and padding at the end of some."""
    arrays = sample(number)
    rng = np.random.default_rng([6, number])
    starts = rng.random(LENGTH) < 0.15
    starts[0] = True
    document_ids = np.cumsum(starts) - 1
    arrays["position_ids"] = np.arange(LENGTH) - np.flatnonzero(starts)[document_ids]
    padding = LENGTH - number % 3
    document_ids[padding:] = -1
    arrays["loss_mask"][padding:] = 0.0
    arrays["document_ids"] = document_ids.astype(np.int32)
    return arrays


class HeldOut:
    """An observer that reads batches of two lengths without training, before the first step and after the last."""

    def __init__(self, forward_only: Any) -> None:
        self.forward_only = forward_only
        self.losses: list[list[list[float]]] = []

    def before_step(self, step: int) -> None:
        if step == 0:
            self._read()

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step == STEPS:
            self._read()

    def _read(self) -> None:
        whole = collate([with_documents(number) for number in (1000, 1001)])
        batches = [Batch(**{k: v[:, :length] for k, v in vars(whole).items()}) for length in HELD_OUT]
        losses = self.forward_only(batches)
        if losses is not None:
            self.losses.append([loss.flatten().tolist() for loss in losses])

    def after_save(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


def run(folder: str, scenarios: list[dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario; what its processes saw, by its name."""
    return {scenario["name"]: _train(Path(folder), **scenario) for scenario in scenarios}


def sums_of_observer(ranks: topology.Ranks) -> topology.LocalPart:
    """This process's part of an array [K, L, F] that an observer keeps: at (k, l, f) stands 10,000 k + 100 l + f."""
    every = torch.arange(2)[:, None, None] * 10_000 + torch.arange(LAYERS)[None, :, None] * 100 + torch.arange(6)
    blocks = every.chunk(ranks.virtual_size * ranks.pipeline_size, 1)[ranks.pipeline_rank :: ranks.pipeline_size]
    own = torch.cat(blocks, 1).chunk(ranks.tensor_size, 2)[ranks.tensor_rank]
    return topology.LocalPart(tensor=own.contiguous(), tensor_axis=2, pipeline_axis=1)


def _train(
    folder: Path,
    name: str,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    load: str | None = None,
) -> dict[str, Any]:
    from megatron_xalign.training.checkpoint import load_checkpoint, load_observer_state, save_checkpoint
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.loop import fit
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    layout = from_tree(ParallelConfig, {"distributed_timeout_seconds": 60, **(parallel or {})})
    network = from_tree(ModelConfig, MODEL | (model or {}))
    read = from_tree(DataConfig, {"seq_length": LENGTH, **(data or {})})
    config = from_tree(
        TrainingConfig,
        {
            "train_steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "log_interval_steps": 1,
            "save_interval_steps": SAVED_AT, **(training or {}),
        },
    )
    with topology.start(layout, seed=1) as ranks:
        chunks = build_model(
            network, padded_vocab_size=PADDED, seq_length=LENGTH, parallel=layout, params_dtype="fp32",
            recompute=config.recompute, ranks=ranks, seed=7 if load is None else 8, vocab_size=VOCAB,
            reset_position_ids=read.reset_position_ids, reset_attention_mask=read.reset_attention_mask, training=config,
        )
        optimizer = build_optimizer(
            chunks, OPTIMIZER, parallel=layout, params_dtype="fp32", train_steps=STEPS,
            schedule_unit=batch_sizes(config).schedule_unit,
        )
        current_batch, start_step, loss_state, observed = CurrentBatch(), 0, None, None
        if load is not None:
            checkpoint = folder / load / f"step-{SAVED_AT:06d}"
            loaded = load_checkpoint(checkpoint, chunks, optimizer.megatron, optimizer.scheduler, ranks)
            start_step, loss_state = loaded["step"], loaded["extra"]["loss_sums"]
            wanted = sums_of_observer(ranks)
            empty = dataclasses.replace(wanted, tensor=torch.zeros_like(wanted.tensor))
            state = load_observer_state(checkpoint, "counter", lambda values: {"sums": empty}, ranks)
            assert state is not None
            observed = bool(torch.equal(state[1]["sums"].tensor, wanted.tensor))

        def save(step: int, loss_sums: Any, states: Any) -> Path:
            extra = {
                "config": {}, "vocab_size": VOCAB, "tokenizer_sha256": "", "consumed_samples": 0,
                "loss_sums": loss_sums,
            }
            return save_checkpoint(
                folder / name, step, chunks, optimizer.megatron, optimizer.scheduler, ranks, extra,
                {"counter": ({}, {"sums": sums_of_observer(ranks)})},
            )

        held_out = HeldOut(build_forward_only(chunks, ranks, current_batch))
        metrics_path = folder / f"{name}.jsonl"
        fit(
            chunks, optimizer, lambda numbers: collate([with_documents(number) for number in numbers]), config, ranks,
            metrics_path=metrics_path, save=save, languages=LANGUAGES, source_names=SOURCES,
            current_batch=current_batch, observers=[held_out], start_step=start_step, loss_state=loss_state,
        )
        ranks.barrier()
        return {
            "metrics": [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()],
            "held_out": held_out.losses, "observed": observed, "is_last_stage": ranks.is_last_stage,
            "chunks": len(chunks), "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        }

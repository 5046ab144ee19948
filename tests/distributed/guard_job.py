"""Runs with a step that must not count; called by the tests through ``run_processes``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign import topology
from megatron_xalign.batch import Batch, collate
from megatron_xalign.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import XAlignError

MODEL = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2)
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_steps=2)
STEPS, GLOBAL_BATCH, LENGTH = 8, 4, 8


def sample(number: int, poisoned: int, poison: str) -> dict[str, Any]:
    tokens = np.arange(LENGTH + 1) % 3
    weight = 1.0
    if poison == "nan" and number == poisoned:
        weight = float("nan")
    if poison == "loss" and number // GLOBAL_BATCH == poisoned // GLOBAL_BATCH:
        tokens = np.random.default_rng(number).integers(50, 100, LENGTH + 1)
    zeros = np.zeros(LENGTH, np.int8)
    return {
        "tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": np.full(LENGTH, weight, np.float32),
        "position_ids": np.arange(LENGTH), "language_ids": zeros, "label_language_ids": zeros,
        "source_ids": np.zeros(LENGTH, np.int16), "document_ids": np.zeros(LENGTH, np.int32),
    }


class Weights:
    """An observer that notes a hash of the weights after every step."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks
        self.after: dict[int, str] = {}
        self.passed_over: list[int] = []

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        digest = hashlib.sha256()
        for parameter in self.chunks[0].parameters():
            digest.update(parameter.detach().numpy().tobytes())
        self.after[step] = digest.hexdigest()
        if metrics.get("passed_over"):
            self.passed_over.append(step)

    def after_save(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


def run(folder: str, scenarios: list[dict[str, Any]]) -> dict[str, Any]:
    """Every scenario; what happened in it, by its name."""
    return {scenario["name"]: _run(Path(folder), **scenario) for scenario in scenarios}


def _run(
    folder: Path, name: str, training: dict[str, Any], poisoned: int = -1, poison: str = "nan",
    load: str | None = None, move_on: int = 0, parallel: dict[str, Any] | None = None, num_layers: int = 1,
) -> dict[str, Any]:
    """One run; ``load`` a checkpoint of another and, without training, ``move_on`` so many steps from there."""
    from megatron_xalign.training.checkpoint import (
        latest_checkpoint,
        load_checkpoint,
        load_observer_state,
        save_checkpoint,
    )
    from megatron_xalign.training.guard import build_guard
    from megatron_xalign.training.loop import fit
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    layout = from_tree(ParallelConfig, {"distributed_timeout_seconds": 60, **(parallel or {})})
    config = from_tree(
        TrainingConfig,
        {
            "train_steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "log_interval_steps": 1,
            "save_interval_steps": 2, "loss_spike_window": 3, **training,
        },
    )
    place = folder / name
    place.mkdir(exist_ok=True)
    with topology.start(layout, seed=1) as ranks:
        chunks = build_model(
            dataclasses.replace(MODEL, num_layers=num_layers), padded_vocab_size=128,
            seq_length=LENGTH, parallel=layout, params_dtype="fp32", recompute="none",
            ranks=ranks, seed=1 if load is None else 2,
        )
        optimizer = build_optimizer(chunks, OPTIMIZER, parallel=layout, params_dtype="fp32", train_steps=STEPS)
        guard, start_step, loss_state = build_guard(config, ranks), 0, None

        def load_from(checkpoint: Path) -> tuple[int, Any]:
            loaded = load_checkpoint(checkpoint, chunks, optimizer.megatron, optimizer.scheduler, ranks)
            return loaded["step"], loaded["extra"]["loss_sums"]

        if load is not None:
            start_step, loss_state = load_from(folder / load)
            optimizer.scheduler.step(increment=move_on)
            start_step += move_on
            if guard is not None:
                kept = load_observer_state(folder / load, guard.name, lambda values: {}, ranks)
                assert kept is not None
                guard.restore(kept)

        def rewind() -> tuple[int, Any]:
            newest = latest_checkpoint(place, ranks)
            if newest is None:
                raise XAlignError("there is no checkpoint to go back to yet.")
            return load_from(newest)

        def save(step: int, loss_sums: Any, states: Any) -> Path:
            extra = {
                "config": {}, "vocab_size": 128, "tokenizer_sha256": "", "consumed_samples": 0, "loss_sums": loss_sums
            }
            return save_checkpoint(
                place, step, chunks, optimizer.megatron, optimizer.scheduler, ranks, extra, states
            )

        def get_batch(numbers: list[int]) -> Batch:
            return collate([sample(number, poisoned, poison) for number in numbers])

        weights, error = Weights(chunks), ""
        try:
            fit(
                chunks, optimizer, get_batch, config, ranks, metrics_path=place / "metrics.jsonl", save=save,
                languages=["eng_Latn"], source_names=["mono"], observers=[weights], start_step=start_step,
                loss_state=loss_state, guard=guard, rewind=rewind,
            )
        except XAlignError as stopped:
            error = str(stopped)
        ranks.barrier()
        path = place / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {
            "error": error, "weights": weights.after, "passed_over": weights.passed_over,
            "lines": [json.loads(line) for line in lines],
            "saved": sorted(path.name for path in place.glob("step-*")),
            "state": None if guard is None else guard.state()[0],
        }

"""Tiny training runs, one after another in one set of processes; called by the tests through ``run_processes``."""

# B micro-batch, S sequence

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xalign import topology
from megatron_xalign.batch import Batch, CurrentBatch, collate
from megatron_xalign.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_xalign.config.tree import from_tree

VOCAB, LENGTH, STEPS, GLOBAL_BATCH = 256, 32, 10, 8
LANGUAGES, SOURCES = ("eng_Latn", "fin_Latn"), ("monolingual", "parallel")
MODEL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "rotary_base": 500,
}
OPTIMIZER = OptimizerConfig(lr=3e-3, min_lr=3e-4, lr_warmup_steps=2)


def sample(number: int) -> dict[str, np.ndarray]:
    """Sample k of the run, whatever the layout is: tokens that can be learned a little, three kinds of language id."""
    rng = np.random.default_rng([5, number])
    tokens = np.minimum(rng.geometric(0.03, LENGTH + 1), VOCAB - 1)
    language_ids = (tokens % 3 - 1).astype(np.int8)
    return {
        "tokens": tokens[:-1], "labels": tokens[1:], "position_ids": np.arange(LENGTH),
        # Rows of different weight, so that a mean of means would differ from the mean over tokens.
        "loss_mask": (rng.random(LENGTH) < rng.random()).astype(np.float32),
        "language_ids": language_ids[:-1], "label_language_ids": language_ids[1:],
        "source_ids": np.full(LENGTH, number % 2, np.int16), "document_ids": np.zeros(LENGTH, np.int32),
    }


def get_batch(numbers: list[int]) -> Batch:
    return collate([sample(number) for number in numbers])


class Prober:
    """An observer that runs batches of odd shapes through the model before every step."""

    def __init__(self, forward_only: Any, lengths: list[int]) -> None:
        self.forward_only = forward_only
        self.lengths = lengths
        self.first: list[list[float]] | None = None

    def before_step(self, step: int) -> None:
        torch.rand(3)  # a probe may use random numbers; training must not notice
        batches = []
        for rows, length in enumerate(self.lengths, start=1):
            batch = get_batch(list(range(100, 100 + rows)))
            batches.append(Batch(**{name: value[:, :length] for name, value in vars(batch).items()}))
        losses = self.forward_only(batches)
        if losses is not None and self.first is None:
            assert [tuple(loss.shape) for loss in losses] == [(n, s) for n, s in enumerate(self.lengths, start=1)]
            self.first = [loss.flatten().tolist() for loss in losses]

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def after_save(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


def run(folder: str, scenarios: list[dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario; return its metrics, probe losses and a hash of its final weights, by name."""
    return {scenario["name"]: _train(Path(folder), **scenario) for scenario in scenarios}


def _train(
    folder: Path,
    name: str,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    micro_batch_size: int = 2,
    params_dtype: str = "fp32",
    recompute: str = "none",
    probe_lengths: list[int] | None = None,
    save_weights: bool = False,
    padded_vocab_size: int = VOCAB,
) -> dict[str, Any]:
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.loop import fit
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    layout = from_tree(ParallelConfig, {"distributed_timeout_seconds": 60, **(parallel or {})})
    training = from_tree(
        TrainingConfig,
        {
            "train_steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": micro_batch_size,
            "recompute": recompute, "log_interval_steps": 1,
        },
    )
    with topology.start(layout, seed=1) as ranks:
        chunks = build_model(
            from_tree(ModelConfig, MODEL | (model or {})), padded_vocab_size=padded_vocab_size, seq_length=LENGTH,
            parallel=layout, params_dtype=params_dtype, recompute=training.recompute, ranks=ranks, seed=7,
            vocab_size=VOCAB,
        )
        if save_weights:
            weights = {n: p.detach().float().numpy().copy() for n, p in chunks[0].module.named_parameters()}
            np.savez(folder / f"{name}.npz", **weights)
        optimizer = build_optimizer(
            chunks, OPTIMIZER, parallel=layout, params_dtype=params_dtype, train_steps=STEPS
        )
        current_batch = CurrentBatch()
        prober = Prober(build_forward_only(chunks, ranks, current_batch), probe_lengths or [])
        metrics_path = folder / f"{name}.jsonl"
        fit(
            chunks, optimizer, get_batch, training, ranks, metrics_path=metrics_path, save=lambda *state: folder,
            languages=LANGUAGES, source_names=SOURCES, current_batch=current_batch,
            observers=[prober] if probe_lengths else [],
        )
        ranks.barrier()
        digest = hashlib.sha256()
        for parameter in chunks[0].parameters():
            digest.update(parameter.detach().float().numpy().tobytes())
        return {
            "metrics": [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()],
            "num_parameters": sum(parameter.numel() for parameter in chunks[0].parameters()),
            "pipeline_rank": ranks.pipeline_rank,
            "weights": digest.hexdigest(), "probe": prober.first, "is_last_stage": ranks.is_last_stage,
        }

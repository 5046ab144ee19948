"""Runs of the loop that are watched, interrupted or wrong; called by the tests through ``run_processes``."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign import topology
from megatron_xalign.batch import Batch, collate
from megatron_xalign.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_xalign.errors import StoppedEarly, XAlignError

PARALLEL = ParallelConfig()
MODEL = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2)
OPTIMIZER = OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=2)
TRAINING = TrainingConfig(
    train_steps=5, global_batch_size=4, micro_batch_size=2, log_interval_steps=3, save_interval_steps=2
)
ODD = dataclasses.replace(TRAINING, global_batch_size=6, micro_batch_size=3)
OPTIMIZER_UNCLIPPED = dataclasses.replace(OPTIMIZER, clip_grad=0.0)


class Watcher:
    """Writes down what it is told, and fails where it is asked to."""

    def __init__(self, name: str, events: list[Any], fail_at: tuple[str, int] | None = None) -> None:
        self.name, self.events, self.fail_at = name, events, fail_at

    def _note(self, moment: str, step: int, *more: Any) -> None:
        self.events.append([self.name, moment, step, *more])
        if self.fail_at == (moment, step):
            raise OSError("no space left")

    def before_step(self, step: int) -> None:
        self._note("before_step", step)

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._note("after_step", step, sorted(metrics))

    def after_save(self, step: int, path: Path) -> None:
        self._note("after_save", step, path.name)

    def close(self) -> None:
        self.events.append([self.name, "close"])


def examine(folder: str) -> dict[str, Any]:
    """Every run of this file, in one process."""
    place = Path(folder)
    with topology.start(PARALLEL, seed=1) as ranks:
        return {
            "whole": _run(place / "whole", ranks),
            "rest": _run(place / "rest", ranks, start_step=3),
            "nothing left": _run(place / "nothing", ranks, start_step=5),
            "observer fails": _run(place / "observer", ranks, fail_at=("after_step", 2)),
            "not a number": _run(place / "nan", ranks, poisoned=9),
            "not a number, unclipped": _run(place / "unclipped", ranks, OPTIMIZER_UNCLIPPED, poisoned=9),
            "unclipped": _run(place / "clip0", ranks, OPTIMIZER_UNCLIPPED),
            "told to stop": _run(place / "told", ranks, signalled_at=2),
            "out of time": _run(place / "time", ranks, training=_changed(TRAINING, exit_duration_minutes=1e-6)),
            "told at the end": _run(place / "end", ranks, signalled_at=4),
            "odd batch": _run(place / "odd", ranks, training=ODD, data_size=4),
            "warm-up too long": _run(place / "warm", ranks, OptimizerConfig(lr_warmup_steps=5)),
            "lr": {
                style: _learning_rates(
                    _changed(OPTIMIZER, lr=1.0, min_lr=0.1, lr_warmup_steps=4, lr_decay_style=style), ranks
                )
                for style in ("cosine", "linear", "constant", "inverse-square-root")
            }
            | {
                f"WSD {shape}": _learning_rates(
                    _changed(
                        OPTIMIZER, lr=1.0, min_lr=0.1, lr_warmup_steps=4, lr_decay_style="WSD", lr_wsd_decay_steps=4,
                        lr_wsd_decay_style=shape,
                    ),
                    ranks,
                )
                for shape in ("linear", "cosine", "exponential", "minus_sqrt")
            },
            "decay": _weight_decay(ranks),
        }


def _changed(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, **changes)


def _build(ranks: topology.Ranks, optimizer: OptimizerConfig, train_steps: int) -> tuple[list[Any], Any]:
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    chunks = build_model(
        MODEL, padded_vocab_size=128, seq_length=8, parallel=PARALLEL, params_dtype="fp32", recompute="none",
        ranks=ranks, seed=1,
    )
    return chunks, build_optimizer(
        chunks, optimizer, parallel=PARALLEL, params_dtype="fp32", train_steps=train_steps
    )


def _run(
    folder: Path,
    ranks: topology.Ranks,
    optimizer: OptimizerConfig = OPTIMIZER,
    training: TrainingConfig = TRAINING,
    start_step: int = 0,
    fail_at: tuple[str, int] | None = None,
    poisoned: int = -1,
    signalled_at: int = -1,
    data_size: int = 1,
) -> dict[str, Any]:
    """One run, whose sample ``poisoned`` has a loss that is not a number; what happened in it."""
    from megatron_xalign.training.loop import fit

    folder.mkdir()
    events: list[Any] = []
    read: list[list[int]] = []

    def get_batch(numbers: list[int]) -> Batch:
        read.append(numbers)
        if numbers[0] == signalled_at * training.global_batch_size:
            os.kill(os.getpid(), signal.SIGUSR1)
        return collate([_sample(number, float("nan") if number == poisoned else 1.0) for number in numbers])

    def save(step: int, loss_sums: Any, states: Any) -> Path:
        events.append(["save", step])
        return folder / f"step-{step}"

    seen: dict[str, Any] = {"events": events, "read": read, "error": "", "notes": [], "returned": None}
    metrics_path = folder / "metrics.jsonl"
    try:
        chunks, built = _build(ranks, optimizer, training.train_steps)
        seen["returned"] = fit(
            chunks, built, get_batch, training, _changed(ranks, data_size=data_size), metrics_path=metrics_path,
            save=save, languages=["eng_Latn"], source_names=["mono"], start_step=start_step,
            observers=[Watcher("a", events, fail_at), Watcher("b", events)],
        )
    except (XAlignError, StoppedEarly, OSError) as error:
        seen |= {"error": f"{type(error).__name__}: {error}", "notes": getattr(error, "__notes__", [])}
    if metrics_path.exists():
        seen["lines"] = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
    return seen


def _sample(number: int, weight: float) -> dict[str, Any]:
    tokens = np.random.default_rng(number).integers(0, 100, 9)
    zeros = np.zeros(8, np.int8)
    return {
        "tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": np.full(8, weight, np.float32),
        "position_ids": np.arange(8), "language_ids": zeros, "label_language_ids": zeros,
        "source_ids": np.zeros(8, np.int16), "document_ids": np.zeros(8, np.int32),
    }


def _learning_rates(config: OptimizerConfig, ranks: topology.Ranks) -> list[float]:
    _, optimizer = _build(ranks, config, train_steps=12)
    rates = []
    for _ in range(13):
        rates.append(optimizer.lr)
        optimizer.scheduler.step(increment=1)
    return rates


def _weight_decay(ranks: topology.Ranks) -> dict[str, float]:
    """Weight decay of every parameter, by name."""
    chunks, optimizer = _build(ranks, _changed(OPTIMIZER, weight_decay=0.25), train_steps=12)
    names = {id(parameter): name for name, parameter in chunks[0].module.named_parameters()}
    groups = optimizer.megatron.param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}

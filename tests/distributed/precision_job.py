"""Runs in fp16 and FP8, trained, resumed and looked into; called by the tests through ``run_processes``."""

# S sequence, B micro-batch, F ffn width

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_job import LANGUAGES

from megatron_xalign import topology
from megatron_xalign.batch import Batch, CurrentBatch, collate
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree, to_tree

VOCAB, LENGTH, BATCH = 256, 32, 8
MODEL = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "rotary_base": 500, "make_vocab_size_divisible_by": 1,
}


def configure(steps: int, save_every: int | None = None, **settings: Any) -> RunConfig:
    return from_tree(RunConfig, {
        "model": MODEL | settings.pop("model", {}),
        "parallel": {"distributed_timeout_seconds": 120} | settings.pop("parallel", {}),
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_steps": 2},
        "data": {"seq_length": LENGTH},
        "training": {
            "train_steps": steps, "global_batch_size": BATCH, "micro_batch_size": 2, "log_interval_steps": 1,
            "save_interval_steps": save_every or steps,
        } | settings.pop("training", {}),
        "backend": {"layers": "local"} | settings.pop("backend", {}),
        **settings,
    })


def get_batch(numbers: list[int]) -> Batch:
    """Text that can be learned: a token is the one before it and a small step."""
    samples = []
    for number in numbers:
        rng = np.random.default_rng([11, number])
        tokens = (rng.integers(0, VOCAB) + np.cumsum(rng.integers(0, 4, LENGTH + 1))) % VOCAB
        zeros = np.zeros(LENGTH, np.int8)
        samples.append({
            "tokens": tokens[:-1], "labels": tokens[1:], "position_ids": np.arange(LENGTH),
            "loss_mask": np.ones(LENGTH, np.float32), "language_ids": zeros, "label_language_ids": zeros,
            "source_ids": np.zeros(LENGTH, np.int16), "document_ids": np.zeros(LENGTH, np.int32),
        })
    return collate(samples)


class Run:
    """One run on the layout of its config."""

    def __init__(self, folder: Path, ranks: topology.Ranks, config: RunConfig, found: Any = None) -> None:
        from megatron_xalign.training import backends
        from megatron_xalign.training.model import build_model
        from megatron_xalign.training.optimizer import build_optimizer

        self.folder, self.ranks, self.config = folder, ranks, config
        folder.mkdir(parents=True, exist_ok=True)
        choice = backends.choose(config, found or backends.look())
        self.described = choice.describe()
        self.chunks = build_model(
            config.model, padded_vocab_size=VOCAB, seq_length=LENGTH, parallel=config.parallel,
            params_dtype=config.params_dtype, recompute=config.training.recompute, ranks=ranks, seed=config.seed,
            choice=choice,
        )
        self.optimizer = build_optimizer(
            self.chunks, config.optimizer, parallel=config.parallel, params_dtype=config.params_dtype,
            train_steps=config.training.train_steps, fp16=config.fp16, choice=choice,
        )

    def save(self, step: int, losses: object = None, states: object = None) -> Path:
        from megatron_xalign.training.checkpoint import save_checkpoint

        extra = {
            "config": to_tree(self.config), "vocab_size": VOCAB, "tokenizer_sha256": "",
            "consumed_samples": step * BATCH,
        }
        return save_checkpoint(
            self.folder, step, self.chunks, self.optimizer.megatron, self.optimizer.scheduler, self.ranks, extra
        )

    def load(self, checkpoint: Path) -> None:
        from megatron_xalign.training.checkpoint import load_checkpoint

        load_checkpoint(checkpoint, self.chunks, self.optimizer.megatron, self.optimizer.scheduler, self.ranks)

    def fit(self, start_step: int, observers: Any = (), current_batch: CurrentBatch | None = None) -> list[Any]:
        import json

        from megatron_xalign.training.loop import fit

        path = self.folder / f"metrics-{start_step}.jsonl"
        fit(
            self.chunks, self.optimizer, get_batch, self.config.training, self.ranks, metrics_path=path, save=self.save,
            languages=LANGUAGES, source_names=["mono"], start_step=start_step, observers=observers,
            current_batch=current_batch,
        )
        self.ranks.barrier()
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def weights(self) -> list[float]:
        return [float(parameter.detach().double().abs().sum()) for parameter in self.chunks[0].parameters()]

    def scales(self) -> list[Any]:
        """Scales and histories of every FP8 layer here."""
        from megatron_xalign.training.fp8_linear import products

        return [[item.fp8_scale.tolist(), item.fp8_amax_history.tolist()] for item in products(self.chunks)]


class Probing:
    """Runs an odd batch forward before every step, which must leave no trace."""

    def __init__(self, forward_only: Any) -> None:
        self.forward_only = forward_only

    def before_step(self, step: int) -> None:
        batch = get_batch([500 + step])
        self.forward_only([Batch(**{name: value[:, :21] * 1 for name, value in vars(batch).items()})])

    def after_step(self, step: int, metrics: Any) -> None: ...

    def after_save(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


def train(folder: str, scenarios: list[dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario; go on from its middle in a fresh model where asked."""
    return {scenario["name"]: _train(Path(folder), **scenario) for scenario in scenarios}


def _train(
    folder: Path, name: str, steps: int, resume_from: int | None = None, probed: bool = False, **settings: Any
) -> dict[str, Any]:
    from megatron_xalign.training.forward import build_forward_only

    config = configure(steps, resume_from, **settings)
    with topology.start(config.parallel, seed=1) as ranks:
        run = Run(folder / name, ranks, config)
        current = CurrentBatch()
        observers = [Probing(build_forward_only(run.chunks, ranks, current))] if probed else []
        found: dict[str, Any] = {
            "described": run.described, "metrics": run.fit(0, observers, current), "weights": run.weights(),
            "scales": run.scales(),
        }
        if resume_from is not None:
            # From other weights, so that everything it has must come from the checkpoint.
            again = Run(folder / f"{name}-again", ranks, dataclasses.replace(config, seed=99))
            again.load(folder / name / f"step-{resume_from:06d}")
            found["again"] = {
                "metrics": again.fit(resume_from), "weights": again.weights(), "scales": again.scales()
            }
    return found


def accepted(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Megatron's own configs hold after being built from FP8 settings of ours."""
    from megatron_xalign import platform
    from megatron_xalign.config import Fp8Config
    from megatron_xalign.training import precision

    platform.install()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    found = []
    for tree in settings:
        fp8 = from_tree(Fp8Config, tree)
        given = precision.megatron_settings(fp8)
        built = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **given)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **precision.data_parallel_settings(fp8))
        optimizer = OptimizerConfig(optimizer="adam", **precision.optimizer_settings(fp8))
        kept = {name: getattr(built, name) for name in given}
        found.append({
            "same": kept == given, "param_gather": ddp.fp8_param_gather, "recipe": str(optimizer.fp8_recipe)
        })
    return found


class Listener:
    """Keeps the neurons of every layer."""

    wants_residual = False

    def __init__(self) -> None:
        self.neurons: list[torch.Tensor] = []

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: object) -> None:
        self.neurons.append(act_SBF.clone())

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: object) -> None: ...

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: object) -> None: ...


def captured(folder: str) -> dict[str, Any]:
    """What the recorder is shown before and after quantisation, beside what each product was given."""
    from megatron_xalign.capture.recorder import Recorder
    from megatron_xalign.training.forward import build_forward_only

    fp8 = {"recipe": "delayed", "amax_history_len": 4, "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0}
    config = configure(3, precision={"fp8": fp8})
    with topology.start(config.parallel, seed=1) as ranks:
        run = Run(Path(folder), ranks, config)
        run.fit(0)
        current = CurrentBatch()
        forward, batch = build_forward_only(run.chunks, ranks, current), get_batch([700, 701])
        shown = {}
        before = run.scales()
        for quantized in (False, True):
            recorder, listener = Recorder(run.chunks, ranks, current, quantized=quantized), Listener()
            recorder.start(listener)
            forward([batch])
            recorder.stop(1)
            shown[quantized] = listener.neurons
        layers = run.chunks[0].module.module.decoder.layers
        steps = [  # how far apart neighbouring numbers of the grid are at the largest value
            float((high - low).abs().max() / high.abs().max())
            for high, low in zip(shown[False], shown[True], strict=True)
        ]
        on_grid = [
            torch.equal(layer.mlp.linear_fc2.quantised_copy(seen), seen)
            for layer, seen in zip(layers, shown[True], strict=True)
        ]
        return {
            "steps": steps, "on grid": on_grid, "same state": run.scales() == before,
            "types": sorted({str(seen.dtype) for kind in shown.values() for seen in kind}),
        }

"""One short training run of a proof, in processes of its own: ``python -m megatron_xalign.prove.job SETTINGS RESULT``.

Tokens are bytes of the sources of Python's standard library: real text that every machine has, the same for one version
of Python. Sample k is a function of k alone.
"""

# S sequence, B micro-batch, F ffn width

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xalign import topology
from megatron_xalign.batch import Batch, CurrentBatch, collate
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree, to_tree
from megatron_xalign.training import backends, checkpoint, loop
from megatron_xalign.training.forward import build_forward_only
from megatron_xalign.training.model import build_model, padded_vocab_size
from megatron_xalign.training.optimizer import build_optimizer
from megatron_xalign.training.sizes import flops_per_token
from megatron_xalign.training.speed import speed_of

_TEXT_BYTES = 4 << 20


@functools.cache
def text() -> np.ndarray:
    """uint8 [N]: sources of the standard library, one behind the other."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= _TEXT_BYTES:
            break
    return np.frombuffer(bytes(found[:_TEXT_BYTES]), np.uint8)


def batch_of(numbers: list[int], seq_length: int) -> Batch:
    """Samples of the text, by number."""
    samples: list[dict[str, Any]] = []
    for number in numbers:
        start = int(np.random.default_rng([17, number]).integers(0, len(text()) - seq_length - 1))
        tokens = text()[start : start + seq_length + 1].astype(np.int64)
        zeros = np.zeros(seq_length, np.int8)
        samples.append({
            "tokens": tokens[:-1], "labels": tokens[1:], "position_ids": np.arange(seq_length),
            "loss_mask": np.ones(seq_length, np.float32), "language_ids": zeros, "label_language_ids": zeros,
            "source_ids": np.zeros(seq_length, np.int16), "document_ids": np.zeros(seq_length, np.int32),
        })
    return collate(samples)


class _Neurons:
    """Counts and sums the neurons of every layer, from what the recorder hands over."""

    wants_residual = False

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: object) -> None:
        self.sums[row] = self.sums.get(row, 0) + act_SBF.double().sum(dim=(0, 1))

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: object) -> None:
        """Not needed."""

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: object) -> None:
        """Not needed."""


class _Direct:
    """The same sums by a hook on the layer itself, in its first pass only: what the recorder is compared with."""

    def __init__(self, model_chunks: Any) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        layers = checkpoint.unwrap(model_chunks[0]).decoder.layers
        self.handles = [
            layer.mlp.linear_fc2.register_forward_pre_hook(functools.partial(self._see, row))
            for row, layer in enumerate(layers)
        ]

    def _see(self, row: int, module: object, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.sums[row] = self.sums.get(row, 0) + args[0].detach().double().sum(dim=(0, 1))


class _Watch:
    """Listens at every step, and keeps how long steps took."""

    def __init__(self, model_chunks: Any, ranks: topology.Ranks, current: CurrentBatch, capture: bool, batches: int):
        self.seconds: list[float] = []
        self.batches, self.device = batches, ranks.device
        self.recorder = Recorder(model_chunks, ranks, current) if capture else None
        self.listener = _Neurons()

    def before_step(self, step: int) -> None:
        """Start the clock and the recorder."""
        if self.recorder is not None:
            self.recorder.start(self.listener)
        self._wait()
        self.began = time.monotonic()

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stop both."""
        self._wait()
        self.seconds.append(time.monotonic() - self.began)
        if self.recorder is not None:
            self.recorder.stop(self.batches)

    def after_save(self, step: int, path: Path) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as ``settings["config"]`` says and return what can be compared; see ``prove.steps`` for the other keys."""
    config = from_tree(RunConfig, settings["config"])
    vocab_size = settings.get("vocab_size", 256)
    choice = backends.choose(config, backends.look())
    with topology.start(config.parallel, config.seed) as ranks:
        rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, ranks.tensor_size)
        chunks = build_model(
            config.model, padded_vocab_size=rows, seq_length=config.data.seq_length, parallel=config.parallel,
            params_dtype=config.params_dtype, recompute=config.training.recompute, ranks=ranks, seed=config.seed,
            vocab_size=vocab_size, choice=choice,
        )
        optimizer = build_optimizer(
            chunks, config.optimizer, parallel=config.parallel, params_dtype=config.params_dtype,
            train_steps=config.training.train_steps, fp16=config.fp16, choice=choice,
        )
        folder, start_step = Path(settings["folder"]), 0
        if settings.get("resume"):
            start_step = int(settings["resume"].rpartition("-")[2])
            checkpoint.load_checkpoint(
                settings["resume"], chunks, optimizer.megatron, optimizer.scheduler, ranks
            )
        current = CurrentBatch()
        batches = config.training.global_batch_size // config.training.micro_batch_size // ranks.data_size
        watch = _Watch(chunks, ranks, current, bool(settings.get("capture")), batches)
        direct = _Direct(chunks) if settings.get("capture") else None

        def save(step: int, losses: object, states: object) -> Path:
            if not settings.get("save"):
                return folder
            extra = {
                "config": to_tree(config), "vocab_size": vocab_size, "tokenizer_sha256": "", "consumed_samples": step
            }
            return checkpoint.save_checkpoint(
                folder / "checkpoints", step, chunks, optimizer.megatron, optimizer.scheduler, ranks, extra
            )

        metrics_path = folder / "metrics.jsonl"
        loop.fit(
            chunks, optimizer, functools.partial(batch_of, seq_length=config.data.seq_length), config.training, ranks,
            metrics_path=metrics_path, save=save, languages=["eng_Latn"], source_names=["text"], observers=[watch],
            current_batch=current, start_step=start_step,
        )
        for handle in [] if direct is None else direct.handles:
            # The recorder has stopped listening too.
            handle.remove()
        losses = build_forward_only(chunks, ranks, current)([batch_of([10**6, 10**6 + 1], config.data.seq_length)])
        ranks.barrier()
        lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
        digest = hashlib.sha256()
        for chunk in chunks:
            for parameter in chunk.parameters():
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        # The first steps compile and warm up.
        seconds = statistics.median(watch.seconds[2:] or watch.seconds)
        speed = speed_of(
            config.training.global_batch_size * config.data.seq_length / seconds,
            flops_per_token(config.model, rows, config.data.seq_length), ranks.world_size, ranks.device,
        )
        return {
            "described": choice.describe(), "losses": [line["loss"] for line in lines],
            "grad_norms": [line["grad_norm"] for line in lines], "weights": digest.hexdigest(),
            "evaluated": None if losses is None else float(losses[0].mean()), "seconds_per_step": seconds,
            "capture_exact": None if direct is None else _same(direct.sums, watch.listener.sums), **speed,
            "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
            "layout": dataclasses.asdict(config.parallel), "is_last_stage": ranks.is_last_stage,
        }


def _same(direct: dict[int, torch.Tensor], recorded: dict[int, torch.Tensor]) -> bool:
    return direct.keys() == recorded.keys() and all(torch.equal(direct[row], recorded[row]) for row in direct)


def logits_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Export a checkpoint and compare Megatron's logits with those of transformers on the same tokens."""
    from megatron_xalign.convert.check import check
    from megatron_xalign.convert.to_hf import to_hf
    from megatron_xalign.training.inference import load_for_inference

    folder, tokens = Path(settings["checkpoint"]), batch_of([1, 2], 64).tokens
    out = to_hf(folder, Path(settings["folder"]) / "hf", dtype="float32")
    with load_for_inference(folder) as ask:
        report = check(folder, out, tokens, ask)
    return {
        "logit_difference": report.max_logit_difference, "holds": report.holds, "architecture": report.architecture
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = logits_of(given) if "checkpoint" in given else run(given)
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")

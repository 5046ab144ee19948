"""Trains a tiny model with Megatron, capture on or off; started by the tests, alone or under torchrun.

    job.py FOLDER SCENARIO_JSON...

A scenario is ``{"name", "tensor", "pipeline", "virtual", "context", "sequence_parallel", "recompute", "micro_batch",
"capture", "naive", "resume_at", "stop_at", "checkpoint", "layers", "on_error", "fail", "intervene", "durable", "kill",
"dropout", "skip"}``; each leaves
``FOLDER/NAME/`` with the run's ``neurons/`` and, of the first process, ``outcome.npz``. ``stop_at`` ends a run in the
middle of a window with a checkpoint in ``FOLDER/CHECKPOINT``, and a run with ``checkpoint`` and no ``stop_at`` goes
on from there, on any layout. ``durable`` saves after every step and goes on from the newest checkpoint; ``kill`` ends
it with SIGKILL in step 2: ``shard`` (half of the statistics written), ``statistics`` (all, no checkpoint yet) or
``checkpoint`` (both). ``fail`` makes capture fail in one process, in a hook or in writing. ``intervene`` leaves
losses of the trained model with neurons and residual stream changed, in ``intervened.npz`` of the process that has
the losses. ``naive`` collects raw activations with hooks of its own, the oracle of the others. In a run that is to
``skip`` a step, the loss of that step is no number and its update is left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xalign import topology
from megatron_xalign.batch import CurrentBatch, collate
from megatron_xalign.capture.observer import NeuronObserver
from megatron_xalign.capture.probe import ProbeSentence
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.workflows.training import _score_functions

LANGUAGES = ("eng_Latn", "fin_Latn")
LAYERS, HIDDEN, FFN, VOCAB, LENGTH, GLOBAL_BATCH, STEPS, EOD = 4, 32, 48, 64, 16, 8, 3, 0


def stream() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and languages of one document after another, some of two languages with tokens of none in between."""
    rng = np.random.default_rng(17)
    pieces: list[tuple[np.ndarray, list[int]]] = []
    while sum(len(tokens) for tokens, _ in pieces) <= STEPS * GLOBAL_BATCH * LENGTH:
        language, lengths = int(rng.integers(2)), rng.integers(1, 25, 2)
        languages = [language] * lengths[0]
        if rng.random() < 0.5:
            languages += [-1, -1] + [1 - language] * lengths[1]
        pieces.append((np.append(rng.integers(1, VOCAB, len(languages)), EOD), [*languages, -1]))
    tokens, ids = zip(*pieces, strict=True)
    return np.concatenate(tokens), np.concatenate(ids).astype(np.int8)


def sample(number: int, skipped: int | None = None) -> dict[str, np.ndarray]:
    """Sample k of the run, whatever the layout: the next tokens of the stream; every fifth one ends in padding."""
    tokens, language_ids = (part[number * LENGTH : (number + 1) * LENGTH + 1].copy() for part in stream())
    loss_mask, document_ids = np.ones(LENGTH, np.float32), np.cumsum(tokens[:-1] == EOD).astype(np.int32)
    source_ids = np.zeros(LENGTH, np.int16)
    if number % 5 == 4:
        tokens[-6:], language_ids[-6:], loss_mask[-6:], document_ids[-6:], source_ids[-6:] = EOD, -1, 0, -1, -1
    if skipped is not None and number // GLOBAL_BATCH == skipped - 1:
        loss_mask *= np.nan
    return {
        "tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": loss_mask,
        "position_ids": np.arange(LENGTH), "language_ids": language_ids[:-1], "label_language_ids": language_ids[1:],
        "source_ids": source_ids, "document_ids": document_ids,
    }


def probe() -> list[ProbeSentence]:
    rng = np.random.default_rng(23)
    return [
        ProbeSentence(f"pair{pair}", language, rng.integers(1, VOCAB, rng.integers(1, LENGTH)), 10 + pair)
        for pair in range(5)
        for language in LANGUAGES
    ]


def configure(folder: Path, scenario: dict[str, Any]) -> RunConfig:
    return from_tree(
        RunConfig,
        {
            "name": scenario["name"], "output_dir": str(folder),
            "model": {
                "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 4,
                "make_vocab_size_divisible_by": 1,
            },
            "parallel": {
                "tensor_model_parallel_size": scenario.get("tensor", 1),
                "pipeline_model_parallel_size": scenario.get("pipeline", 1),
                "virtual_pipeline_model_parallel_size": scenario.get("virtual"),
                "context_parallel_size": scenario.get("context", 1),
                "sequence_parallel": scenario.get("sequence_parallel", False), "distributed_timeout_seconds": 60,
            },
            # A large epsilon: Adam would else blow up the last digits, in which layouts differ.
            "optimizer": {"lr": 1e-2, "min_lr": 1e-2, "lr_warmup_steps": 0, "adam_eps": 1e-2},
            "data": {"seq_length": LENGTH},
            "training": {
                "train_steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": scenario["micro_batch"],
                "recompute": scenario.get("recompute", "none"),
                "recompute_modules": ["core_attn", "mlp"],
                "nonfinite_policy": "skip" if "skip" in scenario else "stop",
                "save_interval_steps": 1 if scenario.get("durable") else 2,
            },
            # Files at steps 0, 2 and 3: the interval and the last step.
            "capture": {
                "probe_interval_steps": 2, "probe_batch_tokens": 48, "stream_residual": True, "stream_attention": True,
                "sample": {
                    "neurons": {"0": [1, 47], "2": [30, 2]} if "layers" not in scenario else {"1": [30, 2]},
                    "tokens_per_language": 6, "top": 4, "context_tokens": 3,
                },
                "layers": scenario.get("layers"), "on_error": scenario.get("on_error", "stop"),
            },
        },
    )


class Naive:
    """An observer that keeps every activation whole and reads the probe one sentence at a time, unpadded."""

    def __init__(self, model: Any, outcome: dict[str, np.ndarray]) -> None:
        self.model, self.outcome = model, outcome
        self.raw: dict[str, list[torch.Tensor]] = {}
        inner = model.module
        self.watch(inner.embedding, "residual0")
        for layer in inner.decoder.layers:
            number = layer.layer_number - 1
            self.watch(layer.mlp.linear_fc1, f"fc1_{number}")
            self.watch(layer.self_attention, f"attention{number}")
            layer.mlp.linear_fc2.register_forward_pre_hook(
                lambda module, args, name=f"act{number}": self.keep(name, args[0])
            )
            self.watch(layer, f"residual{number + 1}")

    def watch(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(
            lambda module, args, output: self.keep(name, output[0] if isinstance(output, tuple) else output)
        )

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        self.raw.setdefault(name, []).append(tensor.detach().clone())

    def before_step(self, step: int) -> None:
        if step == 0:
            self.probe(step)
        self.raw.clear()

    def after_step(self, step: int, metrics: Any) -> None:
        for name, (tensor,) in self.raw.items():
            self.outcome[f"step{step}_{name}"] = tensor.numpy()
        numbers = range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)
        self.outcome[f"step{step}_language_ids"] = np.stack([sample(number)["language_ids"] for number in numbers])
        if step in (2, 3):
            self.probe(step)

    def after_save(self, step: int, path: Path) -> None:
        pass

    def close(self) -> None:
        pass

    def probe(self, step: int) -> None:
        self.raw.clear()
        nll = []
        with torch.no_grad():
            for sentence in probe():
                tokens = torch.tensor([[EOD, *sentence.tokens]])
                labels = torch.roll(tokens, -1, 1)
                losses_BS = self.model(tokens, torch.arange(tokens.shape[1])[None], None, labels=labels)
                nll.append(losses_BS[0, :-1].double().sum().item())
        self.outcome[f"probe{step}_nll"] = np.array(nll)
        for name, tensors in self.raw.items():
            without_eod = [tensor[1:, 0].double().numpy() for tensor in tensors]
            self.outcome[f"probe{step}_{name}_mean"] = np.stack([tensor.mean(0) for tensor in without_eod])
            self.outcome[f"probe{step}_{name}"] = np.concatenate(without_eod)


def break_capture(observer: NeuronObserver, ranks: topology.Ranks, where: str | None) -> None:
    """Let one process fail after the first step: in the hook of its last layer, or when it writes its shard."""
    if ranks.rank != ranks.world_size - 1 or where is None:
        return
    if where == "hook":
        take = observer._sums.take_neurons

        def fail(row: int, *arguments: Any) -> None:
            take(row, *arguments)
            raise ArithmeticError("made to fail in a hook")

        observer._sums.take_neurons = fail
    else:
        from megatron_xalign.capture import writing

        def fail_to_write(*arguments: Any) -> None:
            raise OSError("made to fail in writing")

        if observer._ranks.data_rank == 0:
            writing.write_shard = fail_to_write


def die_in_writing(step: int) -> None:
    from megatron_xalign.capture import writing

    finish = writing.finish_neuron_stats

    def finish_or_die(folder: Path, index: Any, entries: Any) -> Path:
        if index.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(folder, index, entries)

    writing.finish_neuron_stats = finish_or_die


def intervene(chunks: Any, ranks: topology.Ranks, forward_only: Any, folder: Path) -> None:
    from contextlib import ExitStack

    from megatron_xalign.capture import interventions
    from megatron_xalign.capture.hook_points import megatron_points

    points, batch = megatron_points(chunks, ranks), collate([sample(number) for number in range(4)])
    vector = np.random.default_rng(9).normal(size=HIDDEN).astype(np.float32)
    # Neurons on both tensor-parallel ranks, layers on both stages.
    neurons = {0: [1, FFN - 1, 30], 3: list(range(0, FFN, 5))}
    cases = {
        "plain": [],
        "zero": [interventions.zero_neurons(points, neurons)],
        "scale": [interventions.scale_neurons(points, neurons, -3.0)],
        "clamp": [interventions.clamp_neurons(points, neurons, 0.5, 0.5)],
        "add": [interventions.add_to_residual(points, {-1: vector, 0: -2 * vector, 3: vector}, 0.5)],
        "add and keep": [interventions.add_to_residual(points, {0: vector}, 2.0, keep_norm=True)],
        "both": [
            interventions.zero_neurons(points, neurons), interventions.add_to_residual(points, {0: vector}),
        ],
        "plain again": [],
    }
    found = {}
    for name, blocks in cases.items():
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            losses = forward_only([batch])
        if losses is not None:
            found[name] = losses[0].numpy()
    if found and ranks.tensor_rank == 0 and ranks.data_rank == 0:
        np.savez(folder / "intervened.npz", **found)


def run(config: RunConfig, ranks: topology.Ranks, scenario: dict[str, Any]) -> None:
    from megatron_xalign.training import checkpoint
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.guard import build_guard
    from megatron_xalign.training.loop import fit
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    chunks = build_model(
        config.model, padded_vocab_size=VOCAB, seq_length=LENGTH, parallel=config.parallel, params_dtype="fp32",
        recompute=config.training.recompute, ranks=ranks, seed=config.seed, training=config.training,
    )
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "hidden_dropout"):  # no setting of this project asks for it; its random state is watched
                module.hidden_dropout = scenario.get("dropout", 0.0)
    optimizer = build_optimizer(
        chunks, config.optimizer, parallel=config.parallel, params_dtype="fp32", train_steps=STEPS
    )
    folder, current, outcome = Path(config.output_dir), CurrentBatch(), {}
    folder.mkdir(parents=True, exist_ok=True)

    states: dict[str, topology.ObserverState] = {}
    checkpoints = Path(config.output_dir).parent / scenario.get("checkpoint", "checkpoints")

    def save(step: int, sums: Any, observed: dict[str, topology.ObserverState]) -> Path:
        states.update(observed)
        if "stop_at" not in scenario and not scenario.get("durable"):
            return folder
        if step == 2 and scenario.get("kill") == "statistics":
            os.kill(os.getpid(), signal.SIGKILL)
        extra = {"config": {}, "vocab_size": VOCAB, "tokenizer_sha256": "", "consumed_samples": 0}
        path = checkpoint.save_checkpoint(
            checkpoints, step, chunks, optimizer.megatron, optimizer.scheduler, ranks, extra, observed
        )
        if step == 2 and scenario.get("kill") == "checkpoint":
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    def fit_until(start_step: int, stop_step: int) -> None:
        observers: list[Any] = []
        if scenario.get("capture", True):
            forward_only = build_forward_only(chunks, ranks, current)
            observers.append(
                NeuronObserver(
                    config, model_chunks=chunks, ranks=ranks, current_batch=current, forward_only=forward_only,
                    probe=probe(), languages=LANGUAGES, eod_id=EOD, score=_score_functions(),
                )
            )
            if start_step and ("checkpoint" in scenario or scenario.get("durable")):
                watcher = observers[0]
                newest = checkpoint.latest_checkpoint(checkpoints, ranks)
                watcher.restore(checkpoint.load_observer_state(newest, watcher.name, watcher.parts_of, ranks))
            elif start_step:
                observers[0].restore(states["neurons"])
            break_capture(observers[0], ranks, scenario.get("fail"))
        if scenario.get("naive"):
            observers.append(Naive(chunks[0], outcome))
        line = fit(
            chunks, optimizer, lambda numbers: collate([sample(number, scenario.get("skip")) for number in numbers]),
            dataclasses.replace(config.training, train_steps=stop_step), ranks, metrics_path=folder / "metrics.jsonl",
            save=save, languages=LANGUAGES, source_names=["source"], observers=observers,
            current_batch=current, start_step=start_step, guard=build_guard(config.training, ranks),
        )
        outcome["loss"], outcome["grad_norm"] = np.array(line["loss"]), np.array(line["grad_norm"])

    resume_at = scenario.get("resume_at", 0)
    if "stop_at" in scenario:
        fit_until(0, scenario["stop_at"])
    elif scenario.get("durable"):
        if scenario.get("kill") == "shard":
            die_in_writing(step=2)
        newest, start = checkpoint.latest_checkpoint(checkpoints, ranks), 0
        if newest is not None:
            start = checkpoint.load_checkpoint(newest, chunks, optimizer.megatron, optimizer.scheduler, ranks)["step"]
        fit_until(start, STEPS)
    elif "checkpoint" in scenario:
        newest = checkpoint.latest_checkpoint(checkpoints, ranks)
        found = checkpoint.load_checkpoint(newest, chunks, optimizer.megatron, optimizer.scheduler, ranks)
        fit_until(found["step"], STEPS)
    else:
        if resume_at:
            fit_until(0, resume_at)
        fit_until(resume_at, STEPS)
    if scenario.get("intervene"):
        intervene(chunks, ranks, build_forward_only(chunks, ranks, current), folder)
    outcome["hooks"] = np.array(
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for chunk in chunks for m in chunk.modules())
    )
    outcome["weights"] = np.concatenate([p.detach().numpy().ravel() for p in chunks[0].parameters()])
    if ranks.rank == 0:
        np.savez(folder / "outcome.npz", **outcome)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        settings = json.loads(text)
        run_config = configure(Path(sys.argv[1]) / settings["name"], settings)
        with topology.start(run_config.parallel, run_config.seed) as place:
            run(run_config, place, settings)

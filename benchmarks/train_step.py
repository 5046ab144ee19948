"""Tokens a second of our training loop, against a bare Megatron-Core loop and against transformers with plain PyTorch.

The same model, initial weights, batches and AdamW, one thread. What does our loop (mixture statistics, losses by
language and source, heartbeat, logging) cost on top of Megatron-Core's schedule, DDP and optimizer; and is the whole
slower than what one would write by hand? They take turns, a few steps a turn; CPU seconds are counted, medians of turns
compared, and their losses must agree.

Two processes of one and the same program differ by several percent for as long as they live: by where their memory came
to lie. So the first two share a process and two copies of the model, and change copies every turn: copy A gets its
batches from ours, then from bare Megatron-Core, copy B the other way round, and both must have the same loss. The one
in plain PyTorch has a process of its own, so that it does not carry what makes Megatron-Core run on a CPU. Both are
started anew ``--starts`` times.

    python benchmarks/train_step.py [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measure import answer, print_result

from megatron_xalign import topology
from megatron_xalign.batch import Batch, CurrentBatch, collate
from megatron_xalign.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig

VOCAB, LENGTH, GLOBAL_BATCH, MICRO_BATCH, SEED = 4096, 128, 16, 4, 11
LANGUAGES, SOURCES = ("eng_Latn", "fin_Latn"), ("mono", "pairs")
MODEL = ModelConfig(num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6)
SMALL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4)
OPTIMIZER = OptimizerConfig(lr=1e-3, min_lr=1e-3, lr_decay_style="constant", lr_warmup_steps=0, clip_grad=1.0)
OURS, BARE, PLAIN = "ours", "bare Megatron-Core", "transformers + PyTorch"
MEGATRON = "Megatron-Core"
"""The process of both that run on it."""
Run = Callable[[int, int], float]
"""Trains from a step on for so many steps; the mean loss of those."""
_ALIKE_STEPS = 16
STEPS_OF_ALL = 1_000_000
"""Length of the schedule; constant, so that it makes no difference."""


def sample(number: int) -> dict[str, np.ndarray]:
    """Sample k, the same for all contestants."""
    rng = np.random.default_rng([3, number])
    tokens = np.minimum(rng.geometric(0.003, LENGTH + 1), VOCAB - 1)
    language = (tokens % 2).astype(np.int8)
    return {
        "tokens": tokens[:-1], "labels": tokens[1:], "position_ids": np.arange(LENGTH),
        "loss_mask": np.ones(LENGTH, np.float32), "language_ids": language[:-1], "label_language_ids": language[1:],
        "source_ids": np.full(LENGTH, number % 2, np.int16), "document_ids": np.zeros(LENGTH, np.int32),
    }


class Samples:
    """Micro-batches by sample number, made once: reading is no part of the question."""

    def __init__(self, steps: int) -> None:
        self._made = {}
        for first in range(0, steps * GLOBAL_BATCH, MICRO_BATCH):
            self._made[first] = collate([sample(number) for number in range(first, first + MICRO_BATCH)])
        self._length = steps * GLOBAL_BATCH

    def __call__(self, numbers: list[int]) -> Batch:
        return self._made[numbers[0] % self._length]


def build(model: ModelConfig, ranks: topology.Ranks) -> tuple[list[Any], Any]:
    """Megatron's model and optimizer."""
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    parallel = ParallelConfig()
    chunks = build_model(
        model, padded_vocab_size=VOCAB, seq_length=LENGTH, parallel=parallel, params_dtype="fp32", recompute="none",
        ranks=ranks, seed=SEED,
    )
    optimizer = build_optimizer(chunks, OPTIMIZER, parallel=parallel, params_dtype="fp32", train_steps=STEPS_OF_ALL)
    return chunks, optimizer


def our_loop(chunks: list[Any], optimizer: Any, samples: Samples, ranks: topology.Ranks, folder: Path) -> Run:
    """``fit`` as ``xalign train`` calls it: losses by language and source, logging, heartbeat."""
    from megatron_xalign.training.heartbeat import Heartbeat
    from megatron_xalign.training.loop import fit

    def run(done: int, steps: int) -> float:
        training = TrainingConfig(
            train_steps=done + steps, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH,
            log_interval_steps=steps, save_interval_steps=STEPS_OF_ALL,
        )
        line = fit(
            chunks, optimizer, samples, training, ranks, metrics_path=folder / "metrics.jsonl",
            save=lambda *state: folder, languages=LANGUAGES, source_names=SOURCES, parallel_sources=SOURCES[1:],
            flops_per_token=1.0, start_step=done, current_batch=CurrentBatch(),
            heartbeat=Heartbeat(ranks, 1e9, 5.0, print),
        )
        loss: float = line["loss"]
        return loss

    return run


def bare_core(chunks: list[Any], optimizer: Any, samples: Samples) -> Run:
    """Megatron-Core's schedule, gradient finalization, optimizer and scheduler, as its own examples call them."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    schedule = get_forward_backward_func()

    def run(done: int, steps: int) -> float:
        get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
        chunks[0].train()
        total = count = 0.0
        for step in range(done, done + steps):
            numbers = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH, MICRO_BATCH)
            batches = [samples([first]) for first in numbers]
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.megatron.zero_grad()

            def forward_step(rest: Any, model: Any) -> Any:
                batch = next(rest)
                loss = model(batch.tokens, batch.position_ids, None, labels=batch.labels)

                def loss_of(losses_BS: Any, batch: Batch = batch) -> Any:
                    weighted = (losses_BS * batch.loss_mask).sum()
                    tokens = batch.loss_mask.sum().to(dtype=batch.tokens.dtype)
                    return weighted, tokens.int(), {"sum": weighted.detach(), "tokens": tokens}

                return loss, loss_of

            found = schedule(
                forward_step_func=forward_step, data_iterator=iter(batches), model=chunks,
                num_microbatches=len(batches), seq_length=LENGTH, micro_batch_size=MICRO_BATCH,
            )
            optimizer.megatron.step()
            optimizer.scheduler.step(increment=1)
            total += sum(float(item["sum"]) for item in found)
            count += sum(float(item["tokens"]) for item in found)
        return total / count

    return run


def plain_torch(model: ModelConfig, weights: dict[str, Any], samples: Samples) -> Run:
    """transformers' Llama with the same weights, AdamW and clipping, accumulation by hand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups, max_position_embeddings=LENGTH, rms_norm_eps=model.layernorm_epsilon,
        rope_theta=float(model.rotary_base), tie_word_embeddings=False, attention_dropout=0.0,
    )
    network = LlamaForCausalLM(config)
    network.load_state_dict(weights, strict=True)
    network.train()
    decayed = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), eps=OPTIMIZER.adam_eps,
    )
    def run(done: int, steps: int) -> float:
        total = 0.0
        for step in range(done, done + steps):
            adam.zero_grad()
            for first in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH, MICRO_BATCH):
                batch = samples([first])
                logits = network(input_ids=batch.tokens).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
                (loss / (GLOBAL_BATCH * LENGTH)).backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_grad)
            adam.step()
        return total / (steps * GLOBAL_BATCH * LENGTH)

    return run


def hugging_face_weights(model: ModelConfig, chunk: Any) -> dict[str, Any]:
    """Megatron's weights under transformers' names, cut and joined as the converter does it."""
    from megatron_xalign.training.checkpoint import unwrap

    state = {name: value for name, value in unwrap(chunk).state_dict().items() if hasattr(value, "shape")}
    head, groups = model.head_size, model.query_groups
    queries = model.num_attention_heads // groups
    found = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"], "lm_head.weight": state["output_layer.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = state[f"{ours}self_attention.linear_qkv.weight"].view(groups, (queries + 2) * head, -1)
        parts = {"q": qkv[:, : queries * head], "k": qkv[:, queries * head : -head], "v": qkv[:, -head:]}
        found |= {f"{theirs}self_attn.{name}_proj.weight": part.flatten(0, 1) for name, part in parts.items()}
        gate, up = state[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        found |= {
            f"{theirs}self_attn.o_proj.weight": state[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": state[f"{ours}mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": state[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": state[f"{ours}pre_mlp_layernorm.weight"],
        }
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def play(process: str, model: ModelConfig, folder: Path) -> None:
    """Be one of the processes: train as many steps as each line of standard input says; print what each loop took."""
    import torch

    torch.set_num_threads(1)
    samples = Samples(4)
    with ExitStack() as stack:
        if process == PLAIN:
            from safetensors.torch import load_file

            copies = [{PLAIN: plain_torch(model, load_file(folder / "weights.safetensors"), samples)}]
        else:
            from safetensors.torch import save_file

            ranks = stack.enter_context(topology.start(ParallelConfig(), SEED))
            copies = []
            for _ in range(2):
                chunks, optimizer = build(model, ranks)
                copies.append({
                    OURS: our_loop(chunks, optimizer, samples, ranks, folder),
                    BARE: bare_core(chunks, optimizer, samples),
                })
            save_file(hugging_face_weights(model, chunks[0]), folder / "weights.safetensors")
        names = list(copies[0])
        done = turn = 0
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            steps = int(line)
            costs = {}
            # Who has which copy changes every turn, who begins every other turn.
            for place, name in list(enumerate(names))[:: -1 if turn // 2 % 2 else 1]:
                cpu, wall = time.process_time(), time.perf_counter()
                loss = copies[(place + turn) % len(copies)][name](done, steps)
                costs[name] = {
                    "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "loss": loss,
                }
            done, turn = done + steps, turn + 1
            print(json.dumps(costs), flush=True)


class Player:
    """A process with one or two contestants."""

    def __init__(self, name: str, small: bool, folder: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--play", name, "--folder", str(folder), *(["--small"] if small else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._answer()

    def run(self, steps: int) -> dict[str, dict[str, float]]:
        """Let its contestants train so many steps each; what they took, and their mean loss."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}.")

    def end(self) -> None:
        """No more turns."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the small model of --quick, as many turns as asked")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: shows that it runs")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contestant after each start")
    parser.add_argument("--starts", type=int, default=3, help="how often all processes are started anew")
    parser.add_argument("--steps", type=int, help="steps of a turn; left out, 2, and 8 of the small model")
    parser.add_argument("--play", choices=(MEGATRON, PLAIN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    small = options.small or options.quick
    if options.play:
        play(options.play, SMALL if small else MODEL, options.folder)
        return
    # A turn of ours is a whole run, whose beginning and end should not count as much as its steps.
    rounds, steps = (2, 1) if options.quick else (options.rounds, options.steps or (8 if small else 2))
    names, processes = [OURS, BARE], [MEGATRON]
    if importlib.util.find_spec("transformers") is not None:
        names.append(PLAIN)
        processes.append(PLAIN)
    else:
        print("transformers is not installed; left out: pip install 'megatron-xalign[convert]'")

    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if options.quick else options.starts):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            players = []
            for name in processes:
                players.append(Player(name, small, Path(folder)))
                stack.callback(players[-1].end)
            for turn in range(rounds + 1):
                for player in players[:: -1 if turn % 2 else 1]:
                    for name, found in player.run(steps).items():
                        losses[name].append(found["loss"])
                        if turn > 0:  # the first turn warms up
                            cpu[name].append(found["cpu"])
                            wall[name].append(found["wall"])
    tokens = steps * GLOBAL_BATCH * LENGTH
    speed = {name: tokens / median(seconds) for name, seconds in cpu.items()}
    for name in names:
        print(
            f"{name:24s} {speed[name]:10,.0f} tokens a CPU second ({tokens / min(cpu[name]):,.0f} in the best turn), "
            f"{tokens / median(wall[name]):10,.0f} a second; losses {losses[name][0]:.6f} ... {losses[name][-1]:.6f}"
        )
        # The same job: the same losses, as long as rounding has not grown to where runs part.
        alike = slice(max(_ALIKE_STEPS // steps, 1))
        difference = max(abs(a - b) for a, b in zip(losses[OURS][alike], losses[name][alike], strict=True))
        if difference > 1e-3:
            raise SystemExit(f"{name} trained something else: its losses differ by {difference:g}")
    goals = {BARE: 0.98, PLAIN: 1.0}
    print_result([
        answer(
            f"train step against {peer}", ours=speed[OURS], peer=speed[peer], goal=goal, unit="tokens / CPU second",
            better="higher",
        )
        for peer, goal in goals.items()
        if peer in speed
    ])


if __name__ == "__main__":
    main()

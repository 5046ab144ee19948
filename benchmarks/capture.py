"""What does watching neurons cost a training step, and what does a probe cost beyond its forward passes?

    python benchmarks/capture.py [--quick] [--rounds N] [--model tiny|100m] [--languages K]

Two models: the quickstart's size (4 layers, 192 wide) and one of about 100 million parameters (12 layers, 768 wide).
One process, the same training steps with the stream of training batches captured and without, in turns: forward
passes, backward passes and optimizer step of 2,048 tokens. Then a probe of held-out pairs (2,000 of the tiny model, 60
of the large one: the ratio is what is asked for), against the same batches through the same model with nothing
listening. On a CPU the numbers are CPU seconds of the process, on a GPU seconds between synchronisations; medians. The
time spent in the hooks themselves is given beside the ratio, since it moves less with what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import answer, print_result

from megatron_xalign import topology
from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.capture.moments import StreamSums
from megatron_xalign.capture.probe import ProbeSentence, build_probe_batches, run_probe
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.config import ModelConfig, OptimizerConfig, ParallelConfig

_MODELS: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 4, "hidden_size": 192, "ffn_hidden_size": 512, "num_attention_heads": 6},
    "100m": {"num_layers": 12, "hidden_size": 768, "ffn_hidden_size": 2048, "num_attention_heads": 12},
}
_PAIRS = {"tiny": 2000, "100m": 60}
_VOCABULARY, _LENGTH, _SAMPLES, _MICRO_BATCHES = 8192, 256, 4, 2


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model, 2 rounds, 50 pairs")
    parser.add_argument("--rounds", type=int, help="steps with and without capture; 11, or 2 with --quick")
    parser.add_argument("--model", choices=tuple(_MODELS), action="append", help="default: both")
    parser.add_argument("--languages", type=int, default=2, help="languages of the training batches (2)")
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 11)
    answers: list[dict[str, Any]] = []
    for name in options.model or (["tiny"] if options.quick else list(_MODELS)):
        answers += _measure(name, rounds, 50 if options.quick else _PAIRS[name], options.languages)
    print_result(answers)
    return 0


def _measure(name: str, rounds: int, num_pairs: int, num_languages: int) -> list[dict[str, Any]]:
    with topology.start(ParallelConfig(), 1) as ranks:
        from megatron_xalign.training.forward import build_forward_only, forward_backward
        from megatron_xalign.training.model import build_model
        from megatron_xalign.training.optimizer import build_optimizer

        chunks = build_model(
            ModelConfig(**_MODELS[name]), padded_vocab_size=_VOCABULARY, seq_length=_LENGTH, parallel=ParallelConfig(),
            params_dtype="fp32", recompute="none", ranks=ranks, seed=1,
        )
        optimizer = build_optimizer(
            chunks, OptimizerConfig(), parallel=ParallelConfig(), params_dtype="fp32", train_steps=1000
        )
        current = CurrentBatch()
        recorder = Recorder(chunks, ranks, current)
        sums = StreamSums(num_languages, len(recorder.layers), recorder.neurons[1], ranks.device)
        batches = [_batch(number, num_languages).to(ranks.device) for number in range(_MICRO_BATCHES)]
        clock = _Clock(ranks.device)
        in_hooks = _InHooks(recorder, clock)

        def step() -> None:
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            forward_backward(chunks, batches, current, lambda batch, loss_BS, z_loss_BS: None, ranks)
            optimizer.step()

        def watched_step() -> None:
            recorder.start(sums)
            step()
            recorder.stop(_MICRO_BATCHES)

        parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        print(f"\n{name}: {parameters / 1e6:.1f} M parameters, {num_languages} languages, {rounds} rounds")
        plain, watched = _in_turns(clock, rounds, step, watched_step)
        hooks = in_hooks.seconds / (rounds + 1)
        share = watched / plain - 1
        print(f"a step {plain:.4f} s, watched {watched:.4f} s: {share:+.2%}; in hooks {hooks / plain:.2%} of a step")
        memory = sums.num_bytes
        numbers = num_languages * len(recorder.layers) * recorder.neurons[1] * 6
        print(f"sums take {memory:,} bytes, {memory / numbers:.2f} for each of languages x neurons x 6 numbers")

        # The probe.
        forward_only = build_forward_only(chunks, ranks, current)
        sentences = _sentences(num_pairs)
        probe = build_probe_batches(sentences, ["eng_Latn", "fin_Latn"], 0, 4096, _LENGTH)

        def bare() -> None:
            forward_only([item.batch for item in probe])

        def whole() -> None:
            run_probe(recorder, forward_only, probe, len(sentences), 2, ranks)

        forward, probed = _in_turns(clock, max(1, min(rounds, 3)), bare, whole)
        print(f"{num_pairs} pairs in {len(probe)} batches: forward {forward:.3f} s, probe {probed:.3f} s")
    common: dict[str, Any] = {"peer": None, "better": "lower"}
    return [
        answer(
            f"{name}: stream at every step, share of a step", ours=share, goal=0.05, unit="of a step",
            in_hooks=round(hooks / plain, 4), step_seconds=round(plain, 4), parameters=parameters, **common,
        ),
        answer(
            f"{name}: stream at 1 step in 20", ours=share / 20, goal=0.005, unit="of a step",
            in_hooks=round(hooks / plain / 20, 5), **common,
        ),
        answer(
            f"{name}: probe of {num_pairs} pairs against its forward passes", ours=probed / forward, goal=1.1,
            unit="times", forward_seconds=round(forward, 3), batches=len(probe), **common,
        ),
        answer(
            f"{name}: memory of the stream's sums", ours=memory / numbers, goal=8, unit="bytes a number",
            bytes=memory, **common,
        ),
    ]


class _Clock:
    """CPU seconds of this process, or on a GPU seconds with its work done."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


class _InHooks:
    """Adds up the time a recorder spends in its hooks."""

    def __init__(self, recorder: Any, clock: _Clock) -> None:
        self.seconds = 0.0
        hand_over = recorder._hand_over

        def timed(*arguments: Any) -> None:
            begin = time.thread_time()
            hand_over(*arguments)
            self.seconds += time.thread_time() - begin

        recorder._hand_over = timed


def _in_turns(clock: _Clock, rounds: int, one: Callable[[], None], other: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, after one warm-up of both."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for number in range(rounds + 1):
        for which in ((0, 1) if number % 2 else (1, 0)):
            begin = clock.now()
            (one, other)[which]()
            if number:
                seconds[which].append(clock.now() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _batch(seed: int, num_languages: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(1, _VOCABULARY, (_SAMPLES, _LENGTH)))
    # Pieces of 40 tokens of one language or of none, as sentences and what is between them.
    pieces = rng.integers(-1, num_languages, (_SAMPLES, _LENGTH // 40 + 1))
    languages = torch.from_numpy(np.repeat(pieces, 40, axis=1)[:, :_LENGTH].astype(np.int8))
    return Batch(
        tokens=tokens, labels=torch.roll(tokens, -1, 1), loss_mask=torch.ones(tokens.shape),
        position_ids=torch.arange(_LENGTH).expand(tokens.shape).contiguous(), language_ids=languages,
        label_language_ids=languages, source_ids=torch.zeros(tokens.shape, dtype=torch.int16),
        document_ids=torch.zeros(tokens.shape, dtype=torch.int32),
    )


def _sentences(num_pairs: int) -> list[ProbeSentence]:
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(3.3, 0.5, (num_pairs, 2)), 3, 200).astype(int)
    return [
        ProbeSentence(str(pair), language, rng.integers(1, _VOCABULARY, lengths[pair, side]), 100)
        for pair in range(num_pairs)
        for side, language in enumerate(("eng_Latn", "fin_Latn"))
    ]


if __name__ == "__main__":
    raise SystemExit(main())

"""Model FLOPs utilisation of the study's 1.4-billion-parameter model on one GPU, in bf16 and in each FP8 recipe it has.

Needs an NVIDIA GPU with 80 GB and, for FP8, Transformer Engine. It has not been run yet.

    python benchmarks/gpu/train_step.py [--quick] [--micro-batch-size 4] [--steps 20] [--config YAML]

Each precision is a process of its own, so that one leaves no memory to the next. Tokens a second are those of `fit`,
the loop that `xalign train` runs; FLOPs are `training.sizes.flops_per_token`; the peak is the vendor's dense bf16 rate
also for FP8, so that an FP8 number above the bf16 number is what FP8 gains. Goals: 0.45 in bf16, FP8 1.2 times bf16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import answer, print_result

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 50_304
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def one_precision(config_path: Path, overrides: list[str], micro_batch_size: int, steps: int) -> dict[str, Any]:
    """Train on made-up tokens; return tokens a second, MFU and memory of the second half of the steps."""
    import torch

    from megatron_xalign import topology
    from megatron_xalign.batch import Batch, CurrentBatch
    from megatron_xalign.config import RunConfig, TrainingConfig, read_config
    from megatron_xalign.training.loop import fit
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer
    from megatron_xalign.training.sizes import flops_per_token

    config = read_config(config_path, overrides, RunConfig)
    length = config.data.seq_length
    training = TrainingConfig(
        train_steps=steps, global_batch_size=4 * micro_batch_size, micro_batch_size=micro_batch_size,
        log_interval_steps=max(steps // 2, 1), save_interval_steps=10 * steps,
    )
    rng = np.random.default_rng(5)

    def get_batch(numbers: list[int]) -> Batch:
        tokens = rng.integers(0, VOCAB, (len(numbers), length + 1))
        zeros = np.zeros((len(numbers), length), np.int8)
        return Batch.from_arrays({
            "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": np.ones((len(numbers), length), np.float32),
            "position_ids": np.tile(np.arange(length), (len(numbers), 1)), "language_ids": zeros,
            "label_language_ids": zeros, "source_ids": zeros.astype(np.int16), "document_ids": zeros.astype(np.int32),
        })

    with tempfile.TemporaryDirectory() as name, topology.start(config.parallel, config.seed) as ranks:
        options = kernels(config)
        chunks = build_model(
            config.model, padded_vocab_size=VOCAB, seq_length=length, parallel=config.parallel, ranks=ranks,
            seed=config.seed, recompute=config.training.recompute, **options,
        )
        optimizer = build_optimizer(chunks, config.optimizer, parallel=config.parallel, train_steps=steps, **options)
        torch.cuda.reset_peak_memory_stats()
        line = fit(
            chunks, optimizer, get_batch, training, ranks, metrics_path=Path(name) / "metrics.jsonl",
            save=lambda *state: Path(name), languages=["eng_Latn"], source_names=["made up"],
            flops_per_token=flops_per_token(config.model, VOCAB, length), current_batch=CurrentBatch(),
        )
    return line | {"device": torch.cuda.get_device_name()}


def kernels(config: Any) -> dict[str, Any]:
    """Precision and kernels as ``workflows.train`` hands them on."""
    from megatron_xalign.training import backends

    choice = backends.choose(config, backends.look(0))
    print(f"{config.precision_name}: {choice.describe()}", file=sys.stderr)
    return {"params_dtype": config.params_dtype, "choice": choice}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "study_1.4b.yaml")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="four steps in bf16 only")
    parser.add_argument("--one", nargs="*", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; benchmarks/train_step.py compares loops on a CPU.")
    steps = 4 if options.quick else options.steps
    if options.one is not None:
        print(json.dumps(one_precision(options.config, options.one, options.micro_batch_size, steps)))
        return
    wanted = {"bf16": ["precision=bf16"]}
    if not options.quick:
        from megatron_xalign.doctor import recipes_for

        here = recipes_for(torch.cuda.get_device_capability(), torch.version.hip is not None)
        wanted |= {f"fp8 {name}": [f"precision={{fp8: {{recipe: {name}}}}}"] for name in RECIPES if name in here}
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in wanted.items():
        command = [
            sys.executable, __file__, "--config", str(options.config), "--steps", str(steps), "--micro-batch-size",
            str(options.micro_batch_size), "--one", *overrides,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: did not run: {done.stderr.strip().splitlines()[-1:]}")
            continue
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        line = found[name]
        print(
            f"{name:16s} {line['tokens_per_second']:12,.0f} tokens/s  {line['tflops_per_device']:8.1f} TFLOP/s  "
            f"MFU {line.get('mfu', float('nan')):.3f}  {line['memory_gib']:.1f} GiB  on {line['device']}"
        )
    answers = []
    if "bf16" in found and "mfu" in found["bf16"]:
        answers.append(
            answer("MFU of the study's model, bf16", ours=found["bf16"]["mfu"], peer=None, goal=0.45, unit="MFU",
                   better="higher")
        )
    for name, line in found.items():
        if name != "bf16" and "bf16" in found:
            answers.append(
                answer(f"{name} against bf16", ours=line["tokens_per_second"], goal=1.2, unit="tokens/s",
                       peer=found["bf16"]["tokens_per_second"], better="higher")
            )
    print_result(answers)


if __name__ == "__main__":
    main()

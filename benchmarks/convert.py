"""What does converting a checkpoint cost, against copying the same bytes, and how much memory does it take?

    python benchmarks/convert.py [--quick] [--work FOLDER] [--rounds N]

Speed: the study's 1.4B model in bf16 with random numbers, as two tensor-parallel processes leave it, to Hugging Face
and back, beside a plain copy of as many bytes (8 MiB at a time, then fsync; conversions sync their files too).
Contestants take turns; each is a process of its own, start included. Memory: the high-water mark (VmHWM, mapped files
included) of those processes, and of a 7B model (Llama 2's shape) whose checkpoint is hollow: zeros that take no disk.
The bound is three times the largest tensor and 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from made_checkpoints import write_hollow, write_random
from measure import Command, answer, print_result, run_once, statistics

from megatron_xalign.config import DataConfig, ModelConfig, RunConfig

_MODELS = {
    # (settings, ids, rows)
    "tiny": (ModelConfig(num_layers=2, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8), 32000, 32000),
    "1.4B": (
        ModelConfig(
            num_layers=24, hidden_size=2048, ffn_hidden_size=5504, num_attention_heads=16, normalization="LayerNorm"
        ), 50280, 50304,
    ),
    "7B": (ModelConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32), 32000, 32000),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 40 M parameters, one round")
    parser.add_argument("--work", type=Path, help="where files are made and left (a temporary folder if left out)")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--only", choices=("speed", "hollow"), help="the 1.4B model, or the memory of the hollow one")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(_job(*options.job)))
        return 0
    work = options.work or Path(tempfile.mkdtemp(prefix="xalign-benchmark-"))
    try:
        print_result(_compare(options, work))
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 0


def _compare(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    speed, memory = ("tiny", "tiny") if options.quick else ("1.4B", "7B")
    answers = []
    if options.only != "hollow":
        answers += _speed(speed, work, options.rounds or (1 if options.quick else 3))
    if options.only != "speed":
        answers += _hollow(memory, work)
    return answers


def _speed(speed: str, work: Path, rounds: int) -> list[dict[str, Any]]:
    random = work / f"random-{speed}"
    if not (random / "xalign.json").is_file():
        write_random(random, *_described(speed), torch.bfloat16)
    jobs = {
        "to-hf": ("to-hf", random, work / "hf"), "copy": ("copy", random, work / "copied"),
        "from-hf": ("from-hf", work / "hf", work / "back"),
    }
    costs: dict[str, list[Any]] = {name: [] for name in jobs}
    results: dict[str, Any] = {}
    for number in range(rounds):
        order = list(jobs) if number % 2 == 0 else ["copy", "to-hf", "from-hf"]
        for name in order:
            action, source, target = jobs[name]
            shutil.rmtree(target, ignore_errors=True)
            cost, results[name] = _run(action, source, target)
            costs[name].append(cost)
            print(f"{name}: {cost.wall_seconds:.1f} s, CPU {cost.cpu_seconds:.1f} s", flush=True)
    shutil.rmtree(work / "copied", ignore_errors=True)
    shutil.rmtree(work / "back", ignore_errors=True)
    shutil.rmtree(work / "hf", ignore_errors=True)
    wall = {name: statistics.median(cost.wall_seconds for cost in found) for name, found in costs.items()}
    cpu = {name: statistics.median(cost.cpu_seconds for cost in found) for name, found in costs.items()}
    answers = [
        answer(
            f"{name} of the {speed} model, against copying its bytes", ours=num_bytes / 1e6 / wall[name],
            peer=num_bytes / 1e6 / wall["copy"], goal=0.5, unit="MB/s", better="higher",
            cpu_seconds={"ours": cpu[name], "peer": cpu["copy"]},
        )
        for name in ("to-hf", "from-hf")
        for num_bytes in [results["copy"]["num_bytes"]]
    ]
    return answers + [_memory(f"{name} of the {speed} model", results[name], speed) for name in ("to-hf", "from-hf")]


def _hollow(memory: str, work: Path) -> list[dict[str, Any]]:
    hollow = work / f"hollow-{memory}"
    if not (hollow / "xalign.json").is_file():
        write_hollow(hollow, *_described(memory), torch.bfloat16)
    answers = []
    for action, source, target in (
        ("to-hf", hollow, work / "hf-hollow"), ("from-hf", work / "hf-hollow", work / "back-hollow"),
    ):
        shutil.rmtree(target, ignore_errors=True)
        cost, result = _run(action, source, target)
        seconds = f"{cost.wall_seconds:.0f} s, CPU {cost.cpu_seconds:.0f} s"
        print(f"{action} of the hollow {memory} model: {seconds}", flush=True)
        answers.append(_memory(f"{action} of the hollow {memory} model", result, memory))
    for name in ("hf-hollow", "back-hollow"):
        shutil.rmtree(work / name, ignore_errors=True)
    return answers


def _described(model: str) -> tuple[RunConfig, int, int]:
    settings, ids, rows = _MODELS[model]
    return RunConfig(model=settings, data=DataConfig(seq_length=2048)), ids, rows


def _memory(name: str, result: dict[str, Any], model: str) -> dict[str, Any]:
    settings, _, rows = _MODELS[model]
    largest = 2 * settings.hidden_size * max(rows, 2 * settings.ffn_hidden_size, 3 * settings.hidden_size)
    return answer(
        f"peak memory, {name}", ours=result["peak_bytes"] / 1e6, peer=None, goal=(3 * largest + 300e6) / 1e6, unit="MB",
        better="lower", largest_tensor_mb=largest / 1e6,
    )


def _run(action: str, source: Path, target: Path) -> tuple[Any, dict[str, Any]]:
    argv = [sys.executable, __file__, "--job", action, str(source), str(target)]
    cost = run_once(Command(argv, env={"OMP_NUM_THREADS": "1", "XALIGN_PROGRESS": "0"}))
    return cost, json.loads(cost.result.strip().splitlines()[-1])


def _job(action: str, source: str, target: str) -> dict[str, Any]:
    num_bytes = 0
    if action == "copy":
        Path(target).mkdir()
        for file in sorted(Path(source).glob("*.distcp")):
            with file.open("rb") as read, (Path(target) / file.name).open("wb") as write:
                shutil.copyfileobj(read, write, 8 << 20)
                write.flush()
                os.fsync(write.fileno())
            num_bytes += file.stat().st_size
    elif action == "to-hf":
        from megatron_xalign.convert.to_hf import to_hf

        to_hf(source, target)
    else:
        from megatron_xalign.convert.from_hf import from_hf

        from_hf(source, target)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"num_bytes": num_bytes, "peak_bytes": peak * 1024}


if __name__ == "__main__":
    raise SystemExit(main())

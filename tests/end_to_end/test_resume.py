"""Training killed at random moments, also while it writes a checkpoint, ends with the bytes of an undisturbed run.

Every other pair of starts saves behind the run's back, which must change no byte either.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign, environment

# Twenty take many minutes; CI does with fewer.
KILLS = int(os.environ.get("XALIGN_TEST_KILLS", "4"))
# A start gets some 12 steps further before it is killed. A multiple of the probe's 32.
STEPS = max(160, 16 * KILLS // 32 * 32)
TIMED = ("seconds", "seconds_left", "tokens_per_second", "tflops_per_device", "memory_gib")


def overrides(text: Path, run: Path) -> list[str]:
    settings = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
        "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1", "data.seq_length=32",
        f"training.train_steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=2",
        "training.log_interval_steps=3", "training.save_interval_steps=2", "training.keep_checkpoints=2",
        "optimizer.lr_warmup_steps=4", "capture.probe_interval_steps=32", "capture.probe_batch_tokens=512",
        f"data.tokenizer={text}/tokenizer", f"data.probe={text}/corpus/probe.jsonl", f"output_dir={run}",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
        *(f"data.sources.{i}.max_repeats=99" for i in range(3)),
    ]
    return [part for setting in settings for part in ("--set", setting)]


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


def steps_so_far(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_in_the_middle(command: list[str], run: Path, chance: random.Random, in_a_save: bool) -> bool:
    """Start the job and kill it once it trains; ``in_a_save``: while a checkpoint is being written.

    Returns:
        Whether it was killed; if not, this process was away for so long that the job came to its end.
    """
    said = run.with_name("said")
    with said.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=file)
    before = steps_so_far(run)
    more = chance.randint(1, 4)
    deadline = time.monotonic() + 600
    while process.poll() is None:
        assert time.monotonic() < deadline
        trains = steps_so_far(run) >= before + more
        if trains and (not in_a_save or list((run / "checkpoints").glob(".step-*.partial"))):
            break
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01 if in_a_save else 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=600)
    assert process.returncode in (0, -signal.SIGKILL), said.read_text(encoding="utf-8")
    return process.returncode != 0


@pytest.mark.end_to_end
def test_kills_at_random_moments_leave_no_trace(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    example = ROOT / "examples" / "laptop_tp2_pp2.yaml"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    xalign("train", example, *overrides(text, whole))
    command = [sys.executable, "-m", "megatron_xalign", "train", str(example), *overrides(text, killed)]
    chance = random.Random(5)
    for number in range(KILLS):
        behind = ["--set", f"training.async_save={str(number % 4 >= 2).lower()}"]
        for _ in range(5):
            if was_killed := kill_in_the_middle([*command, *behind], killed, chance, in_a_save=number % 2 == 0):
                break
            assert_same(killed, whole)
            shutil.rmtree(killed)
        assert was_killed
    xalign("train", example, *overrides(text, killed))
    assert lines(whole)[-1]["step"] == STEPS
    assert_same(killed, whole)


def assert_same(killed: Path, whole: Path) -> None:
    assert lines(killed) == lines(whole)
    for folder in ("checkpoints", "neurons"):
        assert sorted(path.name for path in (killed / folder).iterdir()) == sorted(
            path.name for path in (whole / folder).iterdir()
        )
    for kind in ("checkpoints", "neurons"):
        last = f"{kind}/step-{STEPS:06d}"
        names = [path.name for path in sorted((whole / last).iterdir()) if path.suffix in (".distcp", ".safetensors")]
        assert names
        for name in names:
            assert (killed / last / name).read_bytes() == (whole / last / name).read_bytes(), f"{last}/{name} differs"

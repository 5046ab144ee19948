"""The rendered scripts run: under a stand-in for Slurm with two nodes of two processes, and here.

In one job, all that may come: the signal before the time limit, the requeue, a killed process and the restart from the
last checkpoint; it ends with the numbers of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, environment

FAKES = Path(__file__).with_name("fake_slurm")
STEPS = 24
TIMED = ("seconds", "seconds_left", "tokens_per_second", "tflops_per_device", "memory_gib")
EXAMPLE = ROOT / "examples" / "laptop_tp2_pp2.yaml"


def settings(text: Path, run: Path) -> list[str]:
    found = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
        "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1", "data.seq_length=32",
        f"training.train_steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=2",
        "training.log_interval_steps=1", "training.save_interval_steps=4", "training.keep_checkpoints=2",
        "optimizer.lr_warmup_steps=4", "capture=null", f"data.tokenizer={text}/tokenizer", "data.probe=null",
        f"output_dir={run}",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
        *(f"data.sources.{i}.max_repeats=99" for i in range(3)),
    ]
    return [part for setting in found for part in ("--set", setting)]


def launch(*words: object, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_xalign", "launch", *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


def wait_for(what: Callable[[], Any], job: subprocess.Popen[str], logs: Path) -> Any:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and job.poll() is None:
        if found := what():
            return found
        time.sleep(0.01)
    said = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(logs.glob("log-*")))
    raise AssertionError(f"the job ended or nothing came of it: {said}")


@pytest.mark.end_to_end
def test_a_slurm_job_of_two_nodes_requeues_restarts_and_ends_as_if_nothing_had_been(
    text: Path, tmp_path: Path
) -> None:
    fake, run, whole = tmp_path / "slurm", tmp_path / "run", tmp_path / "whole"
    fake.mkdir()
    env = environment() | {"PATH": f"{FAKES}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(fake)}
    job = launch(
        "slurm", EXAMPLE, *settings(text, run), "--nodes", 2, "--nproc-per-node", 2, "--gpus-per-node", 0,
        "--time", "01:00:00", "--account", "study", "--sbatch", "constraint=cpu", "--max-restarts", 2, env=env,
    )
    try:
        wait_for(lambda: len(lines(run)) >= 3, job, fake)
        for pid in (fake / "tasks-0").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)
        launchers = wait_for(lambda: (fake / "tasks-1").exists() and (fake / "tasks-1").read_text().split(), job, fake)
        before = len(lines(run))
        wait_for(lambda: len(lines(run)) >= before + 6, job, fake)
        victim = psutil.Process(int(launchers[1])).children()[-1]
        victim.kill()
        said, errors = job.communicate(timeout=900)
    finally:
        job.kill()
        job.wait()
    seen = json.loads((fake / "seen.json").read_text())
    assert seen["codes"] == [75, 0]
    assert seen["asked"] == {
        "job-name": "laptop", "nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "14", "time": "01:00:00",
        "account": "study", "output": "%x-%j.log", "open-mode": "append", "signal": "USR1@300", "requeue": "",
        "constraint": "cpu",
    }
    assert job.returncode == 0 and said.strip().isdigit(), errors
    assert "received SIGUSR1" in (fake / "log-0").read_text()
    assert "restart 1 of 2, from the last whole checkpoint" in (fake / "log-1").read_text()

    words = ["local", EXAMPLE, *settings(text, whole), "--nproc-per-node", 4]
    planned = launch(*words, "--dry-run", env=env)
    assert "--nproc-per-node 4" in planned.communicate(timeout=100)[0] and not whole.exists()
    undisturbed = launch(*words, env=env)
    assert undisturbed.communicate(timeout=900)[1] is not None and undisturbed.returncode == 0
    assert len(lines(whole)) == STEPS
    assert lines(run) == lines(whole)

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
from contextlib import suppress
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


def wait_for(what: Callable[[], Any], job: subprocess.Popen[str]) -> Any:
    """Wait until something is there; None if the job ended before."""
    deadline = time.monotonic() + 900
    while job.poll() is None:
        if found := what():
            return found
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return None


def signal_and_kill(job: subprocess.Popen[str], fake: Path, run: Path) -> None:
    """Send Slurm's signal to the nodes once the job trains, and kill a process of the second node after the requeue."""
    if not wait_for(lambda: len(lines(run)) >= 3, job):
        return
    for pid in (fake / "tasks-0").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGUSR1)
    launchers = wait_for(lambda: (fake / "tasks-1").exists() and (fake / "tasks-1").read_text().split(), job)
    before = len(lines(run))
    if launchers and wait_for(lambda: len(lines(run)) >= before + 6, job):
        with suppress(psutil.NoSuchProcess, IndexError):
            psutil.Process(int(launchers[1])).children()[-1].kill()


def disturbed_job(text: Path, fake: Path, run: Path, env: dict[str, str]) -> bool:
    """Submit, disturb and check such a job.

    Returns:
        False if this process was away for so long that the job came to its end undisturbed.
    """
    fake.mkdir()
    job = launch(
        "slurm", EXAMPLE, *settings(text, run), "--nodes", 2, "--nproc-per-node", 2, "--gpus-per-node", 0,
        "--time", "01:00:00", "--account", "study", "--sbatch", "constraint=cpu", "--max-restarts", 2,
        env=env | {"FAKE_SLURM": str(fake)},
    )
    try:
        signal_and_kill(job, fake, run)
        said, errors = job.communicate(timeout=900)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 0 and said.strip().isdigit(), errors
    seen = json.loads((fake / "seen.json").read_text())
    logs = [path.read_text(errors="replace") for path in sorted(fake.glob("log-*"))]
    assert seen["asked"] == {
        "job-name": "laptop", "nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "14", "time": "01:00:00",
        "account": "study", "output": "%x-%j.log", "open-mode": "append", "signal": "USR1@300", "requeue": "",
        "constraint": "cpu",
    }
    assert seen["codes"] in ([75, 0], [0]), "\n".join(log[-3000:] for log in logs)
    if len(logs) == 1 or "restart 1 of 2" not in logs[1]:
        return False
    assert "received SIGUSR1" in logs[0]
    assert "restart 1 of 2, from the last whole checkpoint" in logs[1]
    return True


@pytest.mark.end_to_end
def test_a_slurm_job_of_two_nodes_requeues_restarts_and_ends_as_if_nothing_had_been(
    text: Path, tmp_path: Path
) -> None:
    env = environment() | {"PATH": f"{FAKES}{os.pathsep}{os.environ['PATH']}"}
    whole = tmp_path / "whole"
    run = next(
        run
        for run in (tmp_path / str(attempt) for attempt in range(4))
        if disturbed_job(text, tmp_path / f"slurm-{run.name}", run, env)
    )

    words = ["local", EXAMPLE, *settings(text, whole), "--nproc-per-node", 4]
    planned = launch(*words, "--dry-run", env=env)
    assert "--nproc-per-node 4" in planned.communicate(timeout=100)[0] and not whole.exists()
    undisturbed = launch(*words, env=env)
    assert undisturbed.communicate(timeout=900)[1] is not None and undisturbed.returncode == 0
    assert len(lines(whole)) == STEPS
    assert lines(run) == lines(whole)

"""What may happen to a run between two starts (a damaged checkpoint, other data), and to processes of torchrun."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign, environment

from megatron_xalign.formats.run_lock import LOCK, RunLock

TIMED = ("seconds", "seconds_left", "tokens_per_second", "tflops_per_device", "memory_gib")
EXAMPLE = ROOT / "examples" / "laptop_tp2_pp2.yaml"


def settings(text: Path, tokens: Path, run: Path, steps: int) -> list[str]:
    found = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
        "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1", "data.seq_length=32",
        f"training.train_steps={steps}", "training.global_batch_size=4", "training.micro_batch_size=2",
        "training.log_interval_steps=1", "training.save_interval_steps=2", "training.keep_checkpoints=2",
        "training.keep_every_steps=4", "training.async_save=true", "optimizer.lr_warmup_steps=2", "capture=null",
        f"data.tokenizer={text}/tokenizer", "data.probe=null", f"output_dir={run}",
        *(f"data.sources.{i}.prefix={tokens}/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
        *(f"data.sources.{i}.max_repeats=99" for i in range(3)),
    ]
    return [part for setting in found for part in ("--set", setting)]


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


@pytest.mark.end_to_end
def test_a_damaged_checkpoint_is_passed_over_and_changed_data_is_refused(
    text: Path, tmp_path: Path, xalign: Xalign
) -> None:
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    shutil.copytree(text / "tokens", tokens)
    train = ["train", EXAMPLE, *settings(text, tokens, run, steps=8)]
    xalign(*train)
    whole = lines(run)
    saved = run / "checkpoints"
    # The newest two, and every fourth.
    assert sorted(path.name for path in saved.iterdir()) == ["step-000004", "step-000006", "step-000008"]
    assert (run / "tensorboard").is_dir()

    damaged = saved / "step-000008" / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = xalign(*train).stderr
    assert "passing over a checkpoint" in said and "step-000008" in said and "step-000006" in said
    assert lines(run) == whole

    # With none left it does not start over, and touches nothing.
    others = shutil.copytree(run, tmp_path / "others")
    for path in (others / "checkpoints").iterdir():
        (path / "xalign.json").write_bytes(b"")
    refused = xalign(*train, "--set", f"output_dir={others}", check=False)
    assert refused.returncode == 1
    assert "holds 3 checkpoint(s), and none can be used" in refused.stderr
    assert lines(others) == whole
    assert len(list((others / "checkpoints").iterdir())) == 3
    shutil.rmtree(others / "checkpoints")
    for more in ((), ("--dry-run",)):
        refused = xalign(*train, "--set", f"output_dir={others}", *more, check=False)
        assert refused.returncode == 1
        assert "goes to step 8, and" in refused.stderr and "or delete metrics.jsonl" in refused.stderr
    assert lines(others) == whole

    shutil.rmtree(saved / "step-000008")
    manifest = tokens / "fin_Latn.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"note": "made again"}))
    # What a killed save leaves goes before anything is written: it may have filled the disk.
    (saved / ".step-000008.partial").mkdir()
    refused = xalign(*train, check=False)
    assert not (saved / ".step-000008.partial").exists()
    assert refused.returncode == 1
    assert "fin_Latn (has another content)" in refused.stderr and "allow_changed_data=true" in refused.stderr
    assert not (saved / "step-000008").exists()
    (run / "metrics.jsonl").unlink()
    allowed = xalign(*train, "--set", "training.allow_changed_data=true")
    assert "metrics.jsonl has no line of the 6 steps done before; curves begin there." in allowed.stderr
    assert "going on as training.allow_changed_data says" in allowed.stderr
    assert (saved / "step-000008").is_dir()


@pytest.mark.end_to_end
def test_runs_on_one_process_and_on_two_go_back_at_the_same_steps(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        more = [
            # Weights that hardly move, so that losses are the noise of small batches, some of it a spike.
            "optimizer.lr=1e-6", "optimizer.min_lr=1e-7", "model.init_method_std=0.2",
            "training.loss_spike_policy=rewind", "training.loss_spike_deviations=0.8",
            "training.loss_spike_window=4", "training.max_bad_steps=30",
            f"parallel.pipeline_model_parallel_size={processes}",
        ]
        arguments = [part for setting in more for part in ("--set", setting)]
        said = xalign(
            "train", EXAMPLE, *settings(text, text / "tokens", run, steps=12), *arguments, "--nproc-per-node",
            str(processes),
        ).stderr
        assert "back to the weights of step" in said, said[-2000:]
        found.append(lines(run))
    alone, both = found
    assert [line["step"] for line in both] == [line["step"] for line in alone]
    assert len(alone) < 12 and alone[-1]["steps_passed_over"] == both[-1]["steps_passed_over"] > 0
    assert [line["loss"] for line in both] == pytest.approx([line["loss"] for line in alone], abs=1e-5)


@pytest.mark.end_to_end
def test_steps_without_a_number_are_skipped_and_counted_also_after_a_restart(text: Path, tmp_path: Path) -> None:
    """Of two data-parallel ranks only one sees them."""
    run = tmp_path / "run"

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                str(Path(__file__).with_name("poisoned_train.py")), str(EXAMPLE),
                *settings(text, text / "tokens", run, steps=12), *more,
            ],
            env={**environment(), "XALIGN_TEST_POISONED": "5,9"}, capture_output=True, text=True, timeout=600,
        )

    def files(step: int) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (run / f"checkpoints/step-{step:06d}").glob("*.distcp")}

    stopped = train()
    assert stopped.returncode == 1 and lines(run)[-1]["step"] == 4
    assert "step 5: the gradient norm is nan" in stopped.stderr, stopped.stderr[-3000:]

    # Going on from where it stopped, with another policy.
    skip = ("--set", "training.nonfinite_policy=skip")
    done = train(*skip)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (5, 9):
        assert f"step {step}: the loss is nan; its update is left out" in done.stderr
    whole, last = lines(run), files(12)
    # Of those two steps there is no loss to write down, and all others are there once.
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert whole[-1]["steps_passed_over"] == 2 and whole[-1]["loss"] < whole[0]["loss"]
    assert sum(whole[-1]["tokens_by_source"].values()) == 10 * 4 * 32
    assert last

    for step in (10, 12):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    again = train(*skip)
    assert again.returncode == 0 and "step-000008" in again.stderr, again.stderr[-3000:]
    assert "step 9: the loss is nan" in again.stderr and "step 5: the loss is nan" not in again.stderr
    assert lines(run) == whole
    assert files(12) == last


@pytest.mark.end_to_end
def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on_from_its_last_checkpoint(
    text: Path, tmp_path: Path
) -> None:
    steps = 40
    run, said = next(
        (run, said)
        for run in (tmp_path / str(attempt) for attempt in range(5))
        if (said := torchrun_that_loses_a_rank(text, run, steps)) is not None
    )
    assert "continuing from" in said
    assert [line["step"] for line in lines(run)] == list(range(1, steps + 1))
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2


def torchrun_that_loses_a_rank(text: Path, run: Path, steps: int) -> str | None:
    """What such a job says; None if it came to its end before this process could kill a rank."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        str(ROOT / "tools" / "train.py"), str(EXAMPLE), *settings(text, text / "tokens", run, steps),
    ]
    job = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while job.poll() is None and not list((run / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for worker in psutil.Process(job.pid).children():
                if worker.environ().get("RANK") == "1":
                    worker.kill()
        said = job.communicate(timeout=600)[1]
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 0, said[-3000:]
    return said if len(json.loads((run / "run.json").read_text())["starts"]) > 1 else None


@pytest.mark.end_to_end
@pytest.mark.parametrize("processes", [(), ("--nproc-per-node", "2")])
def test_a_stop_signal_is_heard_from_the_first_moment_on(
    text: Path, tmp_path: Path, xalign: Xalign, processes: tuple[str, ...]
) -> None:
    parallel = ["--set", f"parallel.pipeline_model_parallel_size={2 if processes else 1}"]
    for attempt in range(5):
        run = tmp_path / str(attempt)
        train = ["train", EXAMPLE, *settings(text, text / "tokens", run, steps=4), *parallel, *processes]
        command = [sys.executable, "-m", "megatron_xalign", *map(str, train)]
        job = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        # Looked at first: what hears before torch is there hears from the beginning.
        while not (late := "libtorch" in maps(job.pid)) and not hears(job.pid, signal.SIGUSR1):
            assert job.poll() is None
            time.sleep(0.001)
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=600)[1]
        # Else it listens too late, or this process was away meanwhile.
        if not late and job.returncode != 0:
            break
    assert not late, "torch is loaded before a signal is heard"
    assert job.returncode == 75 and "received SIGUSR1" in said and "exit code 75" in said, said[-3000:]
    xalign(*train)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def maps(pid: int) -> str:
    """The files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.end_to_end
def test_a_second_job_in_the_same_folder_is_refused_and_touches_nothing(
    text: Path, tmp_path: Path, xalign: Xalign
) -> None:
    run = tmp_path / "run"
    lock = RunLock(run)
    lock.take()
    (run / "checkpoints" / ".step-000002.partial").mkdir(parents=True)  # being saved by the first
    train = ["train", EXAMPLE, *settings(text, text / "tokens", run, steps=4), "--nproc-per-node", "2"]
    pipeline = ["--set", "parallel.pipeline_model_parallel_size=2"]
    refused = xalign(*train, *pipeline, check=False)
    assert refused.returncode == 1
    assert f"output_dir={run} is being trained by another job (host" in refused.stderr
    assert sorted(path.name for path in run.rglob("*")) == [".step-000002.partial", LOCK, "checkpoints"]
    lock.release()
    xalign(*train, *pipeline)
    assert lines(run)[-1]["step"] == 4


@pytest.mark.end_to_end
def test_a_dry_run_sees_what_the_start_would_see(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    tokens = shutil.copytree(text / "tokens", tmp_path / "tokens")
    run = tmp_path / "run"
    train = ["train", EXAMPLE, "--dry-run", *settings(text, tokens, run, steps=4)]
    more = ("--set", "data.mixture.budget_rule=add", "--set", "data.mixture.parallel_fraction=0.5")
    for words in ((), more):
        said = xalign(*train, *words).stdout
        samples, steps = map(int, re.findall(r"^(\d+) samples of 32 tokens in (\d+) steps:", said, re.MULTILINE)[0])
        assert (steps > 4) == bool(words)
        assert f"{samples * 32:,} tokens in {steps} steps; TP1" in said, said
    probe = ("--set", "capture={probe_interval_steps: 2}", "--set", f"data.probe={tmp_path}/nowhere.jsonl")
    missing = xalign(*train, *probe, check=False)
    assert missing.returncode == 1 and "nowhere.jsonl" in missing.stderr
    manifest = tokens / "fin_Latn.manifest.json"
    content = json.loads(manifest.read_text())
    content["tokenizer"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    other = xalign(*train, check=False)
    assert other.returncode == 1 and "tokenizer" in other.stderr and "fin_Latn" in other.stderr, other.stderr
    assert not run.exists()

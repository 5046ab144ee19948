"""Every YAML of examples/ trains, its text and its sizes replaced by small ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign, environment

from megatron_xalign.cli import main
from megatron_xalign.config import RunConfig, read_config
from megatron_xalign.names import architecture

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
    "model.num_query_groups=2", "data.seq_length=64", "data.sources.0.max_repeats=9", "data.sources.1.max_repeats=9",
    "training.train_steps=2", "training.global_batch_size=8", "training.micro_batch_size=2",
    "optimizer.lr_warmup_steps=1", "training.save_interval_steps=2", "capture.probe_interval_steps=2",
    "capture.stream_interval_steps=1", "capture.probe_batch_tokens=512", "data.split=90,10,0",
    "training.eval_interval_steps=2", "training.eval_samples_per_source=3", "data.num_workers=1",
)


@pytest.mark.end_to_end
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_in_small(example: Path, text: Path, tmp_path: Path, xalign: Xalign) -> None:
    places = [
        f"data.tokenizer={text}/tokenizer", f"data.probe={text}/corpus/probe.jsonl", f"output_dir={tmp_path}/run",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
    ]
    overrides = [part for setting in (*SMALL, *places) for part in ("--set", setting)]
    config = read_config(example, [*SMALL, *places], RunConfig)
    processes = 2 * config.parallel.model_parallel_size if config.parallel.model_parallel_size == 1 else 4
    planned = xalign("train", example, "--nproc-per-node", processes, *overrides, "--dry-run").stdout
    assert "memory of one process in GiB" in planned and "GFLOP for each token" in planned
    assert not (tmp_path / "run").exists()
    xalign("train", example, "--nproc-per-node", processes, *overrides)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["step"] == 2
    assert set(last["loss_by_language"]) == set(LANGUAGES)
    assert 0 <= last["parallel_fraction"] < 0.2
    measured = [
        json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in measured] == [0, 2]
    assert set(measured[0]["loss_by_source"]) == {*LANGUAGES, "-".join(LANGUAGES)}
    assert measured[1]["loss"] != measured[0]["loss"]


def test_the_study_s_model_has_1_4_billion_parameters() -> None:
    config = read_config(ROOT / "examples" / "study_1.4b.yaml", (), RunConfig)
    model, vocab_size = config.model, 50_304
    attention = 4 * model.hidden_size**2
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    total = model.num_layers * (attention + mlp) + 2 * vocab_size * model.hidden_size
    assert total == pytest.approx(1.42e9, rel=0.01)
    assert architecture(model) == "OlmoForCausalLM"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("place", ["slurm", "local"])
def test_an_example_becomes_a_script_that_bash_understands(
    example: Path, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--nodes", "2", "--account", "a"] if place == "slurm" else []
    assert main(argv=["launch", place, str(example), *words, "--nproc-per-node", "4", "--dry-run"]) == 0
    script = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=300)
    assert checked.returncode == 0, checked.stderr
    assert f"train {example}" in script and ("#SBATCH --nodes=2" in script) == (place == "slurm")


def test_the_study_is_four_runs_that_differ_in_their_fraction(tmp_path: Path) -> None:
    """The series' script with `xalign` on PATH as a user has it."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "xalign").write_text(f'#!/bin/bash\nexec "{sys.executable}" -m megatron_xalign "$@"\n')
    (binaries / "xalign").chmod(0o755)
    subprocess.run(
        ["bash", "examples/study_series.sh", "--nodes", "4", "--account", "a", "--out", str(tmp_path / "jobs"),
         "--dry-run"],
        cwd=ROOT, check=True, timeout=300, env=environment() | {"PATH": f"{binaries}:{os.environ['PATH']}"},
    )
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "jobs").iterdir()}
    assert sorted(scripts) == ["p0", "p0.01", "p0.02", "p0.05"]
    for name, script in scripts.items():
        assert f"--set data.mixture.parallel_fraction={name.removeprefix('p')} " in script
        assert f"--set output_dir=runs/{name} " in script
    # Apart from the names and the fraction they are one script.
    same = {
        re.sub(r"p0(\.\d+)?\b", "p", re.sub(r"fraction=[\d.]+", "fraction=", script)) for script in scripts.values()
    }
    assert len(same) == 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_with_what_it_is_needs_runs_and_varies(example: Path) -> None:
    opening = example.read_text(encoding="utf-8").split("\nname:")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert all(word in opening for word in ("Needs:", "Run:", "Vary:"))

"""A user's own observers in real runs: resumed on another layout, sent back with the run, beside capture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_of_nonsense import LANGUAGES
from safetensors import safe_open
from xalign_process import ROOT, Xalign, environment

EXAMPLE = ROOT / "examples" / "laptop_tp2_pp2.yaml"
OWN = ROOT / "tests" / "end_to_end" / "own_observers.py"
STEPS = 12

pytestmark = pytest.mark.end_to_end


def train(text: Path, run: Path, layout: str, *more: str, observers: list[dict[str, Any]]) -> list[Any]:
    """Arguments of a small run on two processes, TP2 or PP2."""
    found = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
        f"parallel.tensor_model_parallel_size={2 if layout == 'tensor' else 1}",
        f"parallel.pipeline_model_parallel_size={2 if layout == 'pipeline' else 1}", "data.seq_length=32",
        f"training.train_steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=2",
        "training.log_interval_steps=1", "training.save_interval_steps=3", "optimizer.lr_warmup_steps=2",
        f"data.tokenizer={text}/tokenizer", f"data.probe={text}/corpus/probe.jsonl", f"output_dir={run}",
        "capture.probe_interval_steps=6", "capture.probe_batch_tokens=256", "capture.stream_interval_steps=1",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
        *(f"data.sources.{i}.max_repeats=99" for i in range(3)), *more, f"observers={json.dumps(observers)}",
    ]
    return ["train", EXAMPLE, *(part for setting in found for part in ("--set", setting)), "--nproc-per-node", 2]


def growth(run: Path) -> dict[int, list[float]]:
    lines = [json.loads(line) for line in (run / "mlp_norms.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["growth_by_layer"] for line in lines}


def mine(name: str, **options: Any) -> dict[str, Any]:
    return {"factory": f"{OWN}:{name}", "options": options}


def test_the_examples_observers_go_on_from_a_checkpoint_on_another_layout(
    text: Path, tmp_path: Path, xalign: Xalign
) -> None:
    examples = [
        {"factory": f"{ROOT}/examples/observers.py:LanguageGap",
         "options": {"first": LANGUAGES[0], "second": LANGUAGES[1], "half_life_steps": 3}},
        {"factory": f"{ROOT}/examples/observers.py:MlpNorms", "options": {"interval_steps": 3}},
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    xalign(*train(text, whole, "tensor", observers=examples))
    failed = xalign(*train(text, cut, "tensor", observers=[*examples, mine("Fails", step=8)]), check=False)
    assert failed.returncode == 1
    assert "as it should" in failed.stderr and "raised by Fails.after_step at step 8, which stopped" in failed.stderr
    assert sorted(growth(cut)) == [3, 6]
    # Other observers make no other run; a layer's weights are whole now, and stages have a layer each.
    xalign(*train(text, cut, "pipeline", observers=examples))
    expected, found = growth(whole), growth(cut)
    assert sorted(found) == sorted(expected) == [3, 6, 9, 12]
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-6)
    assert all(abs(value - 1) > 1e-3 for value in expected[12])

    (events,) = (whole / "tensorboard").iterdir()
    assert events.read_bytes().count(b"language_gap") == STEPS
    # The same from Hugging Face's names of the weights.
    norms = {step: norms_of(whole / f"checkpoints/step-{step:06d}", tmp_path / str(step), xalign) for step in (3, 12)}
    assert [expected[12][layer] / expected[3][layer] for layer in (0, 1)] == pytest.approx(
        [norms[12][layer] / norms[3][layer] for layer in (0, 1)], rel=1e-6
    )
    for run in (whole, cut):
        gap = None
        for line in [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]:
            new = line["loss_by_language"][LANGUAGES[1]] - line["loss_by_language"][LANGUAGES[0]]
            gap = new if gap is None else 0.5 ** (1 / 3) * gap + (1 - 0.5 ** (1 / 3)) * new
        kept = json.loads((run / "checkpoints/step-000012/xalign.json").read_text(encoding="utf-8"))["observers"]
        assert kept["language_gap"] == {"gap": pytest.approx(gap, rel=1e-12), "step": STEPS}


def norms_of(checkpoint: Path, folder: Path, xalign: Xalign) -> list[float]:
    xalign("convert", "to-hf", checkpoint, folder, "--no-check")
    with safe_open(folder / "model.safetensors", "np") as file:
        weights = [file.get_tensor(f"model.layers.{layer}.mlp.down_proj.weight") for layer in (0, 1)]
    return [float(np.linalg.norm(weight)) for weight in weights]


def test_an_observer_goes_back_with_the_run_and_on_in_a_branch(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    run = tmp_path / "run"
    done = xalign(*train(
        text, run, "tensor", "training.nonfinite_policy=rewind", "capture=null", observers=[mine("Poison", step=9)]
    ))
    assert "back to the weights of step 6" in done.stderr
    # What it heard of steps 7 and 8 is gone, as what the model learned there.
    assert (run / "heard").read_text() == str([0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12])
    branch, origin = tmp_path / "branch", run / "checkpoints" / "step-000006"
    xalign(*train(
        text, branch, "tensor", f"training.load_state={origin}", "capture=null", observers=[mine("Poison", step=99)]
    ))
    assert (branch / "heard").read_text() == str(list(range(STEPS + 1)))


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_an_observer_that_runs_the_model_changes_nothing_in_the_run(
    text: Path, tmp_path: Path, xalign: Xalign, layout: str
) -> None:
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    xalign(*train(text, alone, layout, observers=[]))
    xalign(*train(text, watched, layout, observers=[mine("Listens"), mine("Evaluates")]))
    assert len((watched / "evaluated").read_text().splitlines()) == 2 * STEPS
    # One that listens hears the two micro-batches of each step, and neither the probes nor the other one's.
    for rank in (0, 1):
        assert (watched / f"heard-{rank}").read_text().split() == ["2"] * STEPS
    kinds = ("checkpoints/*/*.distcp", "neurons/*/*.safetensors")
    files = [path.relative_to(alone) for kind in kinds for path in alone.glob(kind)]
    assert len(files) > 4
    for file in files:
        assert (watched / file).read_bytes() == (alone / file).read_bytes(), file
    # What was evaluated after a step is what is evaluated before the next: nothing is left behind.
    values = [line.rsplit(" ", 1)[1] for line in (watched / "evaluated").read_text().splitlines()]
    assert values[1:-1:2] == values[2::2]


FROM_PYTHON = """
import sys
from megatron_xalign import workflows
from megatron_xalign.config import read_config
sys.path.insert(0, sys.argv[1])
from own_observers import Poison

def factory(run):
    print(run.languages, run.start_step, run.train_steps, run.ranks.world_size, run.config.training.train_steps)
    return Poison(run, step=99)

workflows.train(read_config(sys.argv[2], sys.argv[3:]), observers=[factory])
"""


def test_observers_given_from_python(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, config, *settings = train(text, run, "neither", "capture=null", observers=[])
    overrides = [setting for setting in settings[:-2] if setting != "--set"]
    command = [sys.executable, "-c", FROM_PYTHON, str(OWN.parent), str(config), *overrides]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0] == f"{list(LANGUAGES)} 0 {STEPS} 1 {STEPS}"
    assert (run / "heard").read_text() == str(list(range(STEPS + 1)))


def test_what_cannot_be_built_is_said_before_anything_is_written(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    run = tmp_path / "run"
    arguments = train(text, run, "tensor", observers=[mine("Poison", stop=3)])
    for more in ((), ("--dry-run",)):
        failed = xalign(*arguments, *more, check=False)
        assert failed.returncode == 1 and "options that it takes: step" in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
        assert not run.exists()

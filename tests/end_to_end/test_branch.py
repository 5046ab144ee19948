"""A run that goes on from another run's checkpoint is, to the bit, what one of its settings would be from the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign

from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.names import MAIN_WEIGHT

EXAMPLE = ROOT / "examples" / "laptop_tp2_pp2.yaml"
TIMED = ("seconds", "seconds_left", "tokens_per_second", "tflops_per_device", "memory_gib")
SOURCES = [*LANGUAGES, "-".join(LANGUAGES)]
STEPS, BRANCH, DECAY = 20, 8, 4
TOKENS_AT_BRANCH = BRANCH * 4 * 32


def settings(text: Path, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    found = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
        "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1", "data.seq_length=32",
        f"training.train_steps={steps}", "training.global_batch_size=4", "training.micro_batch_size=2",
        # The branch lies in the middle of an interval of metrics and of neuron statistics.
        "training.log_interval_steps=3", "training.save_interval_steps=4", "capture.probe_interval_steps=5",
        "capture.probe_batch_tokens=512", f"data.tokenizer={text}/tokenizer", f"data.probe={text}/corpus/probe.jsonl",
        f"output_dir={run}", "data.mixture.parallel_fraction=0", "optimizer.lr_warmup_steps=2",
        "optimizer.lr_decay_style=WSD", f"optimizer.lr_wsd_decay_steps={DECAY}",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate(SOURCES)),
        *(f"data.sources.{i}.max_repeats=99" for i in range(3)), *more,
    ]
    return [part for setting in found for part in ("--set", setting)]


def lines(run: Path, after: int = 0) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found if line["step"] > after]


def tensors(run: Path, step: int) -> dict[str, bytes]:
    """Weights, moments, random states and neuron statistics."""
    files = [*(run / f"checkpoints/step-{step:06d}").glob("*.distcp"), *(run / f"neurons/step-{step:06d}").iterdir()]
    found = {path.name: path.read_bytes() for path in files if path.suffix in (".distcp", ".safetensors")}
    assert len(found) > 1
    return found


LATE = (
    f"data.mixture.schedule=[{{until_tokens: {TOKENS_AT_BRANCH}, parallel_fraction: 0}}, "
    "{until_tokens: 100000, parallel_fraction: 0.5}]"
)


@pytest.fixture(scope="module")
def trunk(text: Path, tmp_path_factory: pytest.TempPathFactory, xalign: Xalign) -> Path:
    run = tmp_path_factory.mktemp("trunk") / "run"
    xalign("train", EXAMPLE, *settings(text, run))
    return run


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:06d}"


def state_of(trunk: Path) -> str:
    return f"training.load_state={checkpoint(trunk, BRANCH)}"


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("more", "steps"), [((), 12), ((LATE,), STEPS), ((), 28)],
    ids=["an earlier decay", "parallel text from there on", "a longer run"],
)
def test_a_branch_is_what_the_run_from_the_start_would_be(
    text: Path, tmp_path: Path, trunk: Path, xalign: Xalign, more: tuple[str, ...], steps: int
) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    xalign("train", EXAMPLE, *settings(text, whole, *more, steps=steps))
    train = ["train", EXAMPLE, *settings(text, branch, *more, state_of(trunk), steps=steps)]
    said = xalign(*train).stderr
    assert f"goes on from step {BRANCH} of {trunk}" in said
    assert lines(branch) == lines(whole, after=BRANCH)
    assert lines(whole)[-1]["step"] == steps
    assert tensors(branch, steps) == tensors(whole, steps)
    assert sorted(path.name for path in (branch / "neurons").iterdir()) == sorted(
        path.name for path in (whole / "neurons").iterdir() if int(path.name.removeprefix("step-")) > BRANCH
    )
    facts = json.loads((branch / "run.json").read_text())["branched_from"]
    assert (facts["step"], facts["checkpoint"]) == (BRANCH, f"{trunk}/checkpoints/step-{BRANCH:06d}")
    assert all("training.load_state" not in text for text in facts["differing"])
    xalign("analyze", branch)
    assert (branch / "analysis" / "results.json").is_file()


@pytest.mark.end_to_end
def test_a_branch_that_is_stopped_goes_on_from_its_own_checkpoints(
    text: Path, tmp_path: Path, trunk: Path, xalign: Xalign
) -> None:
    gone, branch = shutil.copytree(trunk, tmp_path / "gone"), tmp_path / "branch"
    train = ["train", EXAMPLE, *settings(text, branch, LATE, state_of(gone))]
    xalign(*train)
    whole, last = lines(branch), tensors(branch, STEPS)
    for step in (16, 20):
        shutil.rmtree(branch / f"checkpoints/step-{step:06d}")
    shutil.rmtree(gone)
    assert "goes on from step" not in xalign(*train, "--dry-run").stdout
    assert "continuing from" in xalign(*train).stderr
    assert lines(branch) == whole
    assert tensors(branch, STEPS) == last
    facts = json.loads((branch / "run.json").read_text())
    assert facts["branched_from"]["step"] == BRANCH and len(facts["starts"]) == 2


@pytest.mark.end_to_end
def test_a_branch_on_another_layout_with_another_source_counts_what_was_before(
    text: Path, tmp_path: Path, trunk: Path, xalign: Xalign
) -> None:
    """The trunk had no parallel source at all."""
    shutil.copytree(text / "tokens", tmp_path / "tokens")
    without = tmp_path / "without"
    two = [f"data.sources=[{', '.join(f'{{prefix: {text}/tokens/{name}, max_repeats: 99}}' for name in LANGUAGES)}]"]
    base = [setting for setting in settings(text, without)[1::2] if not setting.startswith("data.sources.")]
    xalign("train", EXAMPLE, *(part for setting in [*base, *two] for part in ("--set", setting)))
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    xalign("train", EXAMPLE, *settings(text, whole, LATE))
    pipeline = "parallel.pipeline_model_parallel_size=2"
    # The token files have moved since.
    moved = [f"data.sources.{i}.prefix={tmp_path}/tokens/{name}" for i, name in enumerate(SOURCES)]
    said = xalign(
        "train", EXAMPLE, *settings(text, branch, LATE, state_of(without), pipeline, *moved), "--nproc-per-node", "2"
    ).stderr
    assert "counted from here on" not in said
    assert [line["loss"] for line in lines(branch)] == pytest.approx(
        [line["loss"] for line in lines(whole, after=BRANCH)], abs=1e-5
    )
    for name in ("tokens_by_language", "tokens_by_source", "parallel_fraction"):
        assert lines(branch)[-1][name] == lines(whole)[-1][name]


DELAYED = "{fp8: {recipe: delayed, amax_history_len: 4}}"
TENSORWISE = "{fp8: {recipe: tensorwise}}"


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("before", "after"), [(DELAYED, "bf16"), ("bf16", DELAYED), (DELAYED, TENSORWISE), (TENSORWISE, DELAYED)]
)
def test_a_branch_may_go_to_fp8_from_bf16_or_another_recipe_and_back(
    text: Path, tmp_path: Path, xalign: Xalign, before: str, after: str
) -> None:
    """Main weights and moments are float32 in all of them, and are taken over as they are."""
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    ours = "backend.layers=local"
    xalign("train", EXAMPLE, *settings(text, trunk, f"precision={before}", ours, steps=BRANCH + 1))
    still = ("optimizer.lr=1e-30", "optimizer.min_lr=0", "training.save_interval_steps=1")
    after_that = settings(text, branch, f"precision={after}", ours, state_of(trunk), *still, steps=BRANCH + 2)
    said = xalign("train", EXAMPLE, *after_that).stderr
    assert ("FP8 scales are found afresh" in said) == (after != "bf16")
    first, taken = CheckpointReader(checkpoint(trunk, BRANCH)), CheckpointReader(checkpoint(branch, BRANCH + 1))
    weights = [name for name in first.names() if name.startswith(MAIN_WEIGHT)]
    assert weights
    for name in weights:
        # A step with that learning rate is less than the last bit of any weight that is not tiny itself.
        torch.testing.assert_close(taken.tensor(name), first.tensor(name), rtol=0, atol=1e-27, msg=name)
    squares = [name for name in first.names() if name.startswith("optimizer.state.exp_avg_sq.")]
    assert len(squares) == len(weights)
    for name in squares:
        # It decays by 0.95, and something is added that is not negative.
        assert bool((taken.tensor(name) >= 0.949 * first.tensor(name)).all()), name


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("more", "steps", "words"),
    [
        (("model.qk_layernorm=true",), STEPS, "differs: model.qk_layernorm: False -> True"),
        (("training.global_batch_size=8",), STEPS, "training.global_batch_size: 4 -> 8"),
        (("precision=bf16",), STEPS, "precision: fp32 -> bf16"),
        ((), BRANCH, "is of step 8, and this run ends at step 8"),
        (("data.mixture.parallel_fraction=0.3",), STEPS, "had read 32 samples (1,024 tokens), of which this one has"),
        (("data.mixture.seed=99",), STEPS, "its data was another: data.mixture.seed: 1234 -> 99"),
        (("training.load_state=nowhere",), STEPS, "checkpoint nowhere does not exist"),
        (("training.load_weights=there",), STEPS, "a run begins with one of them"),
    ],
)
def test_what_cannot_go_on_from_there_is_refused_before_anything_is_built(
    text: Path, tmp_path: Path, trunk: Path, xalign: Xalign, more: tuple[str, ...], steps: int, words: str
) -> None:
    train = ["train", EXAMPLE, "--dry-run", *settings(text, tmp_path / "run", state_of(trunk), *more, steps=steps)]
    refused = xalign(*train, check=False)
    assert refused.returncode == 1 and words in refused.stderr, refused.stderr[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.end_to_end
def test_a_cut_checkpoint_is_refused_and_leaves_no_folder(
    text: Path, tmp_path: Path, trunk: Path, xalign: Xalign
) -> None:
    cut = shutil.copytree(trunk / f"checkpoints/step-{BRANCH:06d}", tmp_path / "cut")
    tensors = next(cut.glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    train = ["train", EXAMPLE, *settings(text, tmp_path / "run", f"training.load_state={cut}")]
    refused = xalign(*train, check=False)
    assert refused.returncode == 1 and f"checkpoint {cut} is damaged: {tensors.name} has" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.end_to_end
def test_other_samples_are_read_where_that_is_asked_for(
    text: Path, tmp_path: Path, trunk: Path, xalign: Xalign
) -> None:
    other = ("data.mixture.parallel_fraction=0.3", "training.allow_changed_data=true", state_of(trunk))
    planned = xalign("train", EXAMPLE, "--dry-run", *settings(text, tmp_path / "run", *other))
    assert "data.mixture.parallel_fraction: 0.0 -> 0.3" in planned.stdout
    said = xalign("train", EXAMPLE, *settings(text, tmp_path / "run", *other)).stderr
    assert "going on as training.allow_changed_data says" in said
    assert [line["step"] for line in lines(tmp_path / "run")] == [9, 12, 15, 18, 20]

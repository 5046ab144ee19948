"""What a run records of itself is what is recorded of its checkpoint afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign

from megatron_xalign.formats.neuron_stats import list_neuron_stats, read_neuron_stats


def tags_of(folder: Path) -> set[str]:
    """Names of the numbers in TensorBoard's files."""
    data = b"".join(path.read_bytes() for path in folder.iterdir())
    return {tag for tag in (f"scores/{name}" for name in SCORES) if tag.encode() in data}


SCORES = (
    *(f"{kind}/{language}/layer_01" for kind in ("ap_count_0.9", "lape_count", "lape_count_stream")
      for language in LANGUAGES),
    *(f"{kind}/{one}-{other}/mean" for kind in ("cosine_gap", "retrieval")
      for one, other in (LANGUAGES, LANGUAGES[::-1])),
)


@pytest.mark.end_to_end
def test_a_run_and_its_checkpoint_give_the_same_numbers(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    """Of a run with growing batches on sequences that two processes share, whose documents are kept apart."""
    run, example = tmp_path / "run", ROOT / "examples" / "laptop_tp2_pp2.yaml"
    settings = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
        "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1",
        "parallel.sequence_parallel=false", "parallel.context_parallel_size=2", "data.seq_length=64",
        "data.reset_position_ids=true", "data.reset_attention_mask=true", "training.train_steps=6",
        "training.rampup_batch_size=[2, 2, 8]", "training.global_batch_size=4", "training.micro_batch_size=2",
        "training.log_interval_steps=1", "training.save_interval_steps=4", "optimizer.lr_warmup_steps=1",
        "capture.probe_interval_steps=3", "capture.probe_batch_tokens=512", f"data.tokenizer={text}/tokenizer",
        f"data.probe={text}/corpus/probe.jsonl", f"output_dir={run}",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
        *(f"data.sources.{i}.max_repeats=9" for i in range(3)),
    ]
    xalign("train", example, "--nproc-per-node", 2, *(part for one in settings for part in ("--set", one)))
    steps = [step for step, _ in list_neuron_stats(run)]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 3, 6, metrics[-1]["step"]] and metrics[-1]["step"] > 6
    last = read_neuron_stats(run / "neurons" / f"step-{steps[-1]:06d}")
    assert last.consumed_tokens == 6 * 4 * 64
    probe = ("--probe", text / "corpus" / "probe.jsonl")
    xalign("capture", run, *probe, "--out", tmp_path / "after")
    xalign("capture", run, *probe, "--out", tmp_path / "alone", "--prefix", "none")
    after, alone = (read_neuron_stats(tmp_path / name / "neurons" / last.folder.name) for name in ("after", "alone"))
    assert after.consumed_tokens == last.consumed_tokens
    for name in ("probe_neuron_mean_DLF", "probe_residual_mean_DMH", "probe_nll_D"):
        expected = getattr(last, name)
        np.testing.assert_allclose(getattr(after, name), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).mean())
    # Documents are kept apart: a sentence is what it is with nothing in front. Its first token is then not predicted.
    np.testing.assert_allclose(alone.probe_neuron_mean_DLF, after.probe_neuron_mean_DLF, rtol=1e-4, atol=1e-7)
    assert (alone.probe_nll_D < after.probe_nll_D).all()
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    measures = {"ap_count_0.9", "lape_count", "cosine_gap", "retrieval"}
    found = [set(line) - {"step", "consumed_tokens"} for line in lines]
    assert found == [measures, *[measures | {"lape_count_stream"}] * 3]
    assert len(tags_of(run / "tensorboard")) == 3 * len(LANGUAGES) + 2

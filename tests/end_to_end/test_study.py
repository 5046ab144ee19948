"""The example study in small: trained for real, a control that fails, then put right; ends in one page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign

STUDIES = sorted(path for path in (ROOT / "examples" / "studies").glob("*.yaml") if "fractions:" in path.read_text())
SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=2",
    "data.seq_length=64", "training.train_steps=6", "training.global_batch_size=8", "training.micro_batch_size=8",
    "optimizer.lr_warmup_steps=1", "training.save_interval_steps=6", "capture.probe_interval_steps=2",
)


@pytest.mark.parametrize("example", STUDIES, ids=lambda path: path.stem)
def test_an_example_study_says_what_it_would_do(example: Path, xalign: Xalign) -> None:
    opening = example.read_text(encoding="utf-8").split("\nrun:")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert all(word in opening for word in ("Needs:", "Run:", "Vary:"))
    told = xalign("study", example, "--dry-run").stdout
    assert "shuffled" in told and "planned" in told


@pytest.mark.end_to_end
def test_a_study_reports_a_failed_run_and_ends_whole_once_it_is_put_right(
    text: Path, tmp_path: Path, xalign: Xalign
) -> None:
    pairs = text / "tokens" / "-".join(LANGUAGES)
    places = (
        f"data.tokenizer={text}/tokenizer", f"data.probe={text}/corpus/probe.jsonl",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
    )
    shuffled = ("data.mixture.pairing=shuffled", f"data.sources.2.prefix={tmp_path}/shuffled")
    arguments = [
        "study", ROOT / "examples" / "studies" / "laptop.yaml", "--set", f"output_dir={tmp_path}/study",
        "--set", "fractions=[0, 0.3]", "--set", "seeds=[3]", "--set", f"overrides={json.dumps([*SMALL, *places])}",
        "--set", f"controls={json.dumps({'shuffled': {'overrides': shuffled}})}", "--json",
    ]
    done = xalign(*arguments, check=False)
    assert done.returncode == 1
    runs = json.loads(done.stdout)["runs"]
    assert [(name, entry["state"]) for name, entry in runs.items()] == [
        ("p0-s3", "done"), ("p0.3-s3", "done"), ("p0.3-shuffled-s3", "failed")
    ], runs
    assert f"{tmp_path}/shuffled" in runs["p0.3-shuffled-s3"]["error"]
    page = (tmp_path / "study" / "report" / "index.html").read_text(encoding="utf-8")
    assert "1 of 3 runs are not on this page: p0.3-shuffled-s3" in page
    assert "accelerates early sharing" in page
    trained = (tmp_path / "study" / "runs" / "p0-s3" / "run.json").read_bytes()

    xalign("pairing", pairs, tmp_path / "shuffled", "--pairing", "shuffled")
    done = xalign(*arguments)
    assert {entry["state"] for entry in json.loads(done.stdout)["runs"].values()} == {"done"}
    page = (tmp_path / "study" / "report" / "index.html").read_text(encoding="utf-8")
    assert "are not on this page" not in page and "30\u00a0% shuffled" in page
    assert (tmp_path / "study" / "runs" / "p0-s3" / "run.json").read_bytes() == trained  # not started again
    comparison = json.loads((tmp_path / "study" / "report" / "comparison.json").read_text(encoding="utf-8"))
    assert {entry["run"] for entry in comparison["speed"]} == {"p0-s3", "p0.3-s3"}
    shutil.rmtree(tmp_path / "study")

"""Captured models side by side: what the page says is what was measured, and what cannot be compared is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_xalign import cli
from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.results import read_results, write_results
from megatron_xalign.report.models import read_models, summary
from megatron_xalign.report.page import write_model_report

STEP = 300
"""Newest step of every folder, which the page is about."""


@pytest.fixture(scope="module")
def capture_of(make_run: Callable[..., Path]) -> Callable[..., Path]:
    """Makes a folder as ``xalign capture`` and ``xalign analyze`` leave it."""

    def make(folder: Path, name: str, num_layers: int = 4, fraction: float = 0.05, **context: object) -> Path:
        make_run(folder, fraction, name=name, num_layers=num_layers, steps=(0, STEP))
        for file in ("config.yaml", "run.json", "audit.json", "metrics.jsonl"):
            (folder / file).unlink()
        results = read_results(folder / "analysis")
        results.context.update(context)
        write_results(folder / "analysis", results)
        told = {"source": f"/models/{name}", "kind": "LlamaForCausalLM", "command": ["xalign", "capture", f"/m/{name}"]}
        (folder / "capture.json").write_text(json.dumps({"captures": {f"step-{STEP:06d}": told}}), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="module")
def captures(capture_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("captures")
    return [
        capture_of(root / "small", "small <b>", num_layers=4, fraction=0.0),
        capture_of(root / "large", "large", num_layers=7, fraction=0.3),
    ]


@pytest.fixture(scope="module")
def page_path(captures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_report(captures, tmp_path_factory.mktemp("page"))


def rows_of(page_path: Path, name: str) -> list[dict[str, str]]:
    with (page_path.parent / "figures" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_number_drawn_is_one_that_was_measured(captures: list[Path], page_path: Path) -> None:
    drawn = rows_of(page_path, "alignment_by_depth")
    for folder, name in zip(captures, ("small <b>", "large"), strict=True):
        results = read_results(folder / "analysis")
        layers = results.context["num_layers"]
        for measure in ("retrieval_centred", "cka", "cka_permuted", "pwcca", "mexa"):
            own = [row for row in drawn if row["model"] == name and row["measure"] == measure]
            expected = sorted(results.select(measure=measure, step=STEP), key=lambda row: row.layer or 0)
            assert [float(row["value"]) for row in own] == [row.value for row in expected]
            depths = [number / layers for number in range(layers + 1)]
            assert [float(row["depth"]) for row in own] == pytest.approx(depths, abs=1e-6)
        shares = [row for row in rows_of(page_path, "neurons_by_depth")
                  if row["model"] == name and row["measure"] == "ap_count_0.9_share" and row["subject"] == "fin_Latn"]
        counted = results.select(measure="ap_count_0.9", subject="fin_Latn", step=STEP)
        counts = [row for row in counted if row.layer is not None]
        assert [float(row["value"]) * 512 for row in shares] == pytest.approx([row.value for row in counts])
        assert [float(row["depth"]) for row in shares] == pytest.approx(depths[1:], abs=1e-6)
    points = rows_of(page_path, "model_projections")
    assert {row["layer"] for row in points if row["model"] == "large"} >= {"-1", "6"}


def test_the_page_says_who_finds_most_and_fetches_nothing(captures: list[Path], page_path: Path) -> None:
    models = read_models(captures)
    best = {}
    for folder in captures:
        found = read_results(folder / "analysis").select(measure="retrieval_centred", step=STEP)
        best[folder] = max(found, key=lambda row: row.value)
    assert best[captures[1]].value > best[captures[0]].value
    (sentence,) = summary(models)
    assert re.search(rf"large finds {100 * best[captures[1]].value:.1f}.%.*small <b> finds", sentence)
    page = page_path.read_text(encoding="utf-8")
    assert "small &lt;b&gt;" in page and "small <b>" not in page
    assert "/models/large" in page and "LlamaForCausalLM" in page
    assert not re.search(r"(?:src|href)=.(?:https?:)?//", page)
    for name in ("alignment_by_depth", "neurons_by_depth", "model_projections"):
        for ending in ("png", "pdf", "csv"):
            assert (page_path.parent / "figures" / f"{name}.{ending}").stat().st_size > 100


def test_kinds_of_measures_that_differ_are_told(capture_of: Callable[..., Path], tmp_path: Path) -> None:
    folders = [
        capture_of(tmp_path / "a", "a", cka="debiased", counted_tokens="all"),
        capture_of(tmp_path / "b", "b", cka="plain", counted_tokens="all but the first"),
    ]
    page = write_model_report(folders, tmp_path / "page").read_text(encoding="utf-8")
    assert "CKA is not of one kind and cannot be compared: debiased for a and plain for b" in page
    assert "Tokens were not counted alike: a: all and b: all but the first" in page


def test_what_cannot_be_compared_is_refused(
    capture_of: Callable[..., Path], captures: list[Path], tmp_path: Path
) -> None:
    other = capture_of(tmp_path / "other", "other", probe_sha256="1" * 64)
    with pytest.raises(FormatError, match=r"small <b> and other cannot be compared: probe_sha256 .* same probe"):
        read_models([captures[0], other])
    with pytest.raises(FormatError, match=r"two folders are called large"):
        read_models([captures[1], captures[1]])
    with pytest.raises(FormatError, match=r"was not analysed.*xalign analyze"):
        read_models([captures[0], tmp_path])
    with pytest.raises(FormatError, match=r"does not exist; `xalign capture"):
        read_models([tmp_path / "none"])
    with pytest.raises(ConfigError, match="9 captured models"):
        read_models([captures[0]] * 9)
    damaged = capture_of(tmp_path / "damaged", "damaged")
    (damaged / "capture.json").write_text('{"captures": {"step-000300": 3}}', encoding="utf-8")
    with pytest.raises(FormatError, match=r"capture\.json is not what `xalign capture` writes; capture again"):
        write_model_report([damaged], tmp_path / "page")
    assert not (tmp_path / "page").exists()
    lacking = capture_of(tmp_path / "lacking", "lacking")
    results = read_results(lacking / "analysis")
    kept = [row for row in results.rows if row.measure != "cka"]
    write_results(lacking / "analysis", type(results)(results.context, kept, results.arrays))
    with pytest.raises(FormatError, match=r"has no cka; run `xalign analyze"):
        read_models([lacking])


def test_the_command_tells_runs_from_captured_models(
    make_run: Callable[..., Path], captures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder) for folder in captures]
    assert cli.main("report", [*words, "--out", str(tmp_path / "page"), "--title", "Mine"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in page and f"xalign capture /m/large\nxalign analyze {words[1]}\n" in page
    run = make_run(tmp_path / "run", 0.05)
    assert cli.main("report", [*words, str(run), "--out", str(tmp_path / "mixed")]) == 1
    assert re.search(r"holds a captured model and .*/run a trained run", capsys.readouterr().err)
    assert cli.main("report", [*words, "--corpus", str(tmp_path), "--out", str(tmp_path / "mixed")]) == 1
    assert "--corpus is about" in capsys.readouterr().err
    assert cli.main("report", [*words, str(tmp_path / "none"), "--out", str(tmp_path / "mixed")]) == 1
    assert re.search(r"/none does not exist; `xalign capture", capsys.readouterr().err)
    assert not (tmp_path / "mixed").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_errors(page_path: Path, tmp_path: Path) -> None:
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth <= innerWidth,"
        " [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)].join(' ')</script>"
    )
    html = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page_path.read_text(encoding="utf-8"))
    copy = tmp_path / "measured.html"
    copy.write_text(html.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,1000", "--enable-logging=stderr",
            "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>true true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr

"""Numbers and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import write_json
from megatron_xalign.formats.run_folder import RunFolder


def analyze(run: Path) -> Any:
    """Compute every measure from a run's neuron statistics and write them into the run; return them."""
    from megatron_xalign.analysis.series import analyze_run
    from megatron_xalign.workflows.probe_tokens import probe_tokens

    return analyze_run(run, probe_tokens=probe_tokens(run))


def is_analysed(run: Path) -> bool:
    """Whether a run's results are of the statistics that are there now; damaged results are not."""
    from megatron_xalign.formats.neuron_stats import list_neuron_stats
    from megatron_xalign.formats.results import JSON_NAME, read_results

    folders = list_neuron_stats(run)
    path = RunFolder(run).analysis / JSON_NAME
    if not folders or not path.is_file():
        return False
    newest = max((folder / "index.json").stat().st_mtime_ns for _, folder in folders)
    try:
        steps = read_results(path.parent).context.get("steps")
    except FormatError:
        return False
    return bool(steps == [step for step, _ in folders] and path.stat().st_mtime_ns >= newest)


def outcome(run: Path) -> dict[str, float]:
    """Where a run ended: training loss beside the unigram entropy, retrieval at its best layer beside chance.

    Retrieval is the report's: languages centred, on the last step that was analysed.
    """
    from megatron_xalign.formats.results import read_results
    from megatron_xalign.report.series import RETRIEVAL

    results = read_results(RunFolder(run).analysis)
    last = max(row.step for row in results.rows)
    return {
        "loss": list(RunFolder(run).metrics())[-1]["loss"],
        "unigram_entropy": RunFolder(run).facts()["unigram_entropy"],
        "chance": results.context["chance"]["retrieval"],
        "retrieval": max(row.value for row in results.select(measure=RETRIEVAL, step=last)),
    }


def report_models(
    captures: Sequence[Path], out: Path, *, title: str = "Cross-lingual alignment of language models"
) -> Path:
    """Draw captured models side by side on one self-contained page; return the page."""
    from megatron_xalign.report.page import write_model_report

    return write_model_report(list(captures), out, title=title)


COMPARISON = "comparison.json"
"""Beside a report: tests of runs against one another at every layer, trends, speed, shared neurons."""


def _comparison(runs: Sequence[Path]) -> dict[str, Any]:
    """What ``analysis.comparison`` says of runs that were measured at the same steps; else why it says nothing."""
    from megatron_xalign.analysis.comparison import compare_runs
    from megatron_xalign.formats.results import read_results

    if not runs:
        return {"not_compared": "every run belongs to a control."}
    results = [read_results(RunFolder(run).analysis) for run in runs]
    try:
        return compare_runs(results)
    except FormatError as error:
        # The page compares such runs at the last step they share; tests over training need equal steps.
        return {"not_compared": str(error)}


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "Parallel data and cross-lingual alignment",
    corpus: Path | None = None,
    commands: Sequence[str] | None = None,
    hf: Mapping[str, Path] | None = None,
    controls: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> Path:
    """Draw a series of runs on one self-contained page; return the page.

    ``controls`` names the control that a run (by name) belongs to, ``missing`` the runs that should be there and why
    they are not.
    """
    from megatron_xalign.analysis.claims import claims_tree, weigh_claims
    from megatron_xalign.report.page import write_report

    if commands is None:
        commands = [" ".join(start["command"]) for run in runs for start in RunFolder(run).facts()["starts"]]
    claims = claims_tree(weigh_claims(runs, controls)) if len(runs) > 1 else []
    # A trend over fractions must not take shuffled pairs for pairs.
    series = [run for run in runs if RunFolder(run).config().name not in (controls or {})]
    write_json(Path(out) / COMPARISON, _comparison(series))
    return write_report(
        list(runs), out, claims=claims, title=title, commands=list(commands), corpus=corpus, hf=dict(hf or {}),
        controls=dict(controls or {}), missing=dict(missing or {}),
    )

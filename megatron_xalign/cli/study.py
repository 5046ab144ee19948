"""Measures and pages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import add_config, print_json, verb

_STUDY_EXAMPLES = """
examples:
  xalign study STUDY.yaml --dry-run
  xalign study STUDY.yaml                            trains here, one run after the other; the same command continues
  xalign study STUDY.yaml --submit                   every run a job of Slurm, and a last one that measures and draws
  xalign study STUDY.yaml --only p0.05-s1            one run alone
  xalign study STUDY.yaml --no-train                 measures what was trained elsewhere and draws the page

a study's YAML:
  run: run.yaml                  every run is this one with a few settings changed
  output_dir: studies/enfi
  fractions: [0, 0.01, 0.02, 0.05]
  seeds: [1, 2]
  controls:
    shuffled: {overrides: [data.mixture.pairing=shuffled, data.sources.2.prefix=tokens/shuffled], fractions: [0.05]}

A run that fails is reported as failed, and the others go on; the exit code is then 1.
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_analyze(verbs)
    _add_report(verbs)
    _add_study(verbs)


def _add_analyze(verbs: Any) -> None:
    parser = verb(verbs, "analyze", "compute every measure of alignment from a run's neuron statistics", _analyze)
    parser.add_argument("run", type=Path, nargs="+", help="run folders")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON")


def _analyze(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows

    tables = [workflows.analyze(run) for run in options.run]
    if options.json:
        print_json([terminal.results_tree(table) for table in tables])
    else:
        for run, table in zip(options.run, tables, strict=True):
            print(terminal.describe_results(run, table))
    return 0


_REPORT_EXAMPLES = """
examples:
  xalign report runs/p0 runs/p05 --out report          trained runs, one per fraction or seed
  xalign report probed/llama probed/qwen --out page    what `xalign capture` made of models trained elsewhere

Run `xalign analyze` on every folder first.
"""


def _add_report(verbs: Any) -> None:
    parser = verb(
        verbs, "report", "draw a series of runs, or captured models, on one self-contained page", _report,
        _REPORT_EXAMPLES,
    )
    parser.add_argument("run", type=Path, nargs="+", help="analyzed run folders, or folders of `xalign capture`")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    parser.add_argument("--title", default=None, help="heading of the page")
    parser.add_argument("--corpus", type=Path, default=None, help="corpus folder of runs, for its licences and counts")


def _report(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows
    from megatron_xalign.errors import ConfigError
    from megatron_xalign.report.models import is_captured

    captured = [folder for folder in options.run if is_captured(folder)]
    trained = [folder for folder in options.run if folder.is_dir() and folder not in captured]
    if captured and trained:
        raise ConfigError(
            f"{captured[0]} holds a captured model and {trained[0]} a trained run; they go on pages of their own. To "
            f"put a run's checkpoint beside others, capture it: xalign capture {trained[0]} --probe PROBE --out FOLDER"
        )
    if captured and options.corpus is not None:
        raise ConfigError("--corpus is about the text of trained runs; leave it out for captured models.")
    titled = {} if options.title is None else {"title": options.title}
    if captured:
        print(workflows.report_models(options.run, options.out, **titled))
    else:
        print(workflows.report(options.run, options.out, corpus=options.corpus, **titled))
    return 0


def _add_study(verbs: Any) -> None:
    parser = verb(
        verbs, "study", "a whole comparison: fractions x seeds x controls, trained, measured, on one page", _study,
        _STUDY_EXAMPLES,
    )
    add_config(parser, "YAML of a study")
    parser.add_argument(
        "--only", action="append", default=[], metavar="RUN",
        help="do this run alone (a job of a cluster); may be given again",
    )
    parser.add_argument(
        "--submit", action="store_true",
        help="hand every run to Slurm as a job of its own, and a last job that measures and draws (slurm: in the YAML)",
    )
    parser.add_argument("--no-train", action="store_true", help="measure and draw what other jobs have trained")
    parser.add_argument("--json", action="store_true", help="print how far every run is as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and how far each is; touch nothing")


def _study(options: argparse.Namespace) -> int:
    from megatron_xalign import study

    plan = study.plan_study(options.config, options.overrides)
    if options.submit:
        from megatron_xalign import study_jobs

        if options.dry_run:
            print("\n".join(study_jobs.study_scripts(plan).values()))
        else:
            print("\n".join(study_jobs.submit_study(plan)))
        return 0
    if options.dry_run:
        print(plan.describe())
        return 0
    state = study.run_study(plan, options.only, train=not options.no_train)
    if options.json:
        print_json(state)
    else:
        print(study.describe_study(state))
    return 1 if any(entry["state"] == "failed" for entry in state["runs"].values()) else 0

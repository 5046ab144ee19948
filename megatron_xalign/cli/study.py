"""Measures and pages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import print_json, verb


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_analyze(verbs)
    _add_report(verbs)


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


def _add_report(verbs: Any) -> None:
    parser = verb(verbs, "report", "draw a series of runs on one self-contained page", _report)
    parser.add_argument("run", type=Path, nargs="+", help="analyzed run folders, one per fraction")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    parser.add_argument("--title", default="Parallel data and cross-lingual alignment", help="heading of the page")
    parser.add_argument("--corpus", type=Path, default=None, help="corpus folder, for its licences and counts")


def _report(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    print(workflows.report(options.run, options.out, title=options.title, corpus=options.corpus))
    return 0

"""Evaluation of runs and Hugging Face folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import positive, print_json, verb, word_list

_EXAMPLES = """
  xalign evaluate RUN_FOLDER                         every checkpoint, on the run's probe
  xalign evaluate HF_FOLDER --texts probe.jsonl      one model
  xalign evaluate RUN_FOLDER --write-tasks TASKS     task files for lm-eval from the same text, and
  xalign evaluate RUN_FOLDER --lm-eval xalign_text_fin_Latn --include-path TASKS
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    parser = verb(
        verbs, "evaluate", "text each model expects and translations it prefers, for every checkpoint of a run",
        _evaluate, _EXAMPLES,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="run folders or Hugging Face folders")
    parser.add_argument(
        "--texts", type=Path, default=None, metavar="JSONL", help="held-out translations; default: the run's probe"
    )
    parser.add_argument("--most", type=positive, default=200, metavar="N", help="sentences of each language (200)")
    parser.add_argument("--lm-eval", type=word_list, default=(), metavar="TASKS", help="tasks of lm-eval as well")
    parser.add_argument("--include-path", type=Path, default=None, metavar="FOLDER", help="where their YAML files lie")
    parser.add_argument("--limit", type=positive, default=None, metavar="N", help="documents of each of those tasks")
    parser.add_argument(
        "--write-tasks", type=Path, default=None, metavar="FOLDER",
        help="write task files for lm-eval from the text, and evaluate nothing",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal
    from megatron_xalign.workflows import evaluation

    plan = evaluation.EvaluationPlan(
        texts=options.texts, most=options.most, tasks=tuple(options.lm_eval), include=options.include_path,
        limit=options.limit,
    )
    if options.write_tasks is not None:
        texts = evaluation.texts_of(options.folders[0], plan)
        print("\n".join(evaluation.write_lm_eval_tasks(texts, options.write_tasks, plan.most)))
        return 0
    found = evaluation.evaluate_all(options.folders, plan)
    if options.json:
        print_json({str(folder): terminal.results_tree(results) for folder, results in found.items()})
    else:
        print("\n".join(evaluation.describe_evaluation(folder, results) for folder, results in found.items()))
    return 0

"""What a machine has and can do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import print_json, verb


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_doctor(verbs)


def _add_doctor(verbs: Any) -> None:
    parser = verb(verbs, "doctor", "what this machine has and can do, what is missing and how to get it", _doctor)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument("--prove", action="store_true", help="train small models to prove what works (minutes)")
    parser.add_argument("--gpus", type=int, help="with --prove: how many GPUs to use; default: all")
    parser.add_argument("--cpu", action="store_true", help="with --prove: what can be proved without a GPU")
    parser.add_argument("--only", metavar="STEP", help="with --prove: this step alone")
    parser.add_argument(
        "--output", type=Path, default=Path("xalign-proof"),
        help="with --prove: folder of results.json and results.md; one of an earlier call is gone on with",
    )


def _doctor(options: argparse.Namespace) -> int:
    from megatron_xalign import doctor

    found = doctor.examine()
    if options.prove:
        return _prove(options, found)
    if options.json:
        print_json(found)
    else:
        print(doctor.describe(found))
    return 1 if found["problems"] else 0


def _prove(options: argparse.Namespace, found: dict[str, Any]) -> int:
    from megatron_xalign.prove.run import as_table, prove

    if not found["devices"] and not options.cpu:
        print(
            "there is no GPU that torch can use here, so nothing of the GPU path can be proved. What can be proved "
            "without one: xalign doctor --prove --cpu"
        )
        return 1
    summary = prove(options.output, found, cpu=options.cpu, gpus=options.gpus, only=options.only)
    if options.json:
        print_json(summary)
    else:
        print(f"{as_table(summary)}\n\n{options.output / 'results.md'}, {options.output / 'results.json'}")
    return 0 if summary["passed"] else 1

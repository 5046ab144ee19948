"""What a machine has and can do."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_xalign.cli.arguments import print_json, verb


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_doctor(verbs)


def _add_doctor(verbs: Any) -> None:
    parser = verb(verbs, "doctor", "what this machine has and can do, what is missing and how to get it", _doctor)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _doctor(options: argparse.Namespace) -> int:
    from megatron_xalign import doctor

    found = doctor.examine()
    if options.json:
        print_json(found)
    else:
        print(doctor.describe(found))
    return 1 if found["problems"] else 0

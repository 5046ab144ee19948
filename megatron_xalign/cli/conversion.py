"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import print_json, verb


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_convert(verbs)


def _add_convert(verbs: Any) -> None:
    parser = verb(verbs, "convert", "checkpoints to Hugging Face folders and back, checked; CPU only", _convert_to_hf)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    to_hf = actions.add_parser("to-hf", help="write a Hugging Face folder and check its logits against Megatron's")
    to_hf.set_defaults(handler=_convert_to_hf)
    to_hf.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder (its newest checkpoint)")
    to_hf.add_argument("out", type=Path, help="folder to write")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    to_hf.add_argument("--tokenizer", type=Path, default=None, help="default: the one the run was trained with")
    to_hf.add_argument("--no-check", action="store_true", help="do not compare logits afterwards")
    to_hf.add_argument("--json", action="store_true", help="print the comparison as JSON")
    from_hf = actions.add_parser("from-hf", help="write a checkpoint with a Hugging Face folder's weights")
    from_hf.set_defaults(handler=_convert_from_hf)
    from_hf.add_argument("hf", type=Path, help="the Hugging Face folder: config.json and *.safetensors")
    from_hf.add_argument("checkpoint", type=Path, help="checkpoint folder to write; training.load_weights names it")
    from_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: as the tensors are stored"
    )
    from_hf.add_argument("--no-check", action="store_true", help="do not compare logits afterwards")
    from_hf.add_argument("--json", action="store_true", help="print the comparison as JSON")
    check = actions.add_parser("check", help="compare logits of a checkpoint and a Hugging Face folder on real text")
    check.set_defaults(handler=_convert_check)
    check.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder (its newest checkpoint)")
    check.add_argument("hf", type=Path, help="the Hugging Face folder")
    check.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _convert_to_hf(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    workflows.convert_to_hf(options.checkpoint, options.out, dtype=options.dtype, tokenizer=options.tokenizer)
    if options.no_check:
        print(options.out)
        return 0
    options.hf = options.out
    return _convert_check(options)


def _convert_from_hf(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    workflows.convert_from_hf(options.hf, options.checkpoint, dtype=options.dtype)
    if options.no_check:
        print(options.checkpoint)
        return 0
    # The folder is somebody else's; nothing is written into it.
    return _convert_check(options, record=False)


def _convert_check(options: argparse.Namespace, record: bool = True) -> int:
    from megatron_xalign import terminal, workflows

    report = workflows.check_hf(options.checkpoint, options.hf, record=record)
    if options.json:
        print_json(report)
    else:
        print(terminal.describe_check(report))
    return 0

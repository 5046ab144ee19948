"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import positive, print_json, verb

_CHECKPOINT = "a checkpoint folder, or a run folder (its newest checkpoint); ours or Megatron-LM's"


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_convert(verbs)


def _add_convert(verbs: Any) -> None:
    parser = verb(verbs, "convert", "checkpoints to Hugging Face folders and back, checked; CPU only", _convert_to_hf)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    to_hf = actions.add_parser("to-hf", help="write a Hugging Face folder and check it against Megatron's model")
    to_hf.set_defaults(handler=_convert_to_hf)
    to_hf.add_argument("checkpoint", type=Path, help=_CHECKPOINT)
    to_hf.add_argument("out", type=Path, help="folder to write")
    to_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "stored"), default="float32",
        help="(float32); stored: as the checkpoint has them",
    )
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (5GB)")
    to_hf.add_argument(
        "--architecture", default=None, metavar="CLASS", help="another class that computes the same: MistralForCausalLM"
    )
    _add_model(to_hf)
    to_hf.add_argument("--no-check", action="store_true", help="do not compare afterwards")
    _add_check(to_hf)
    from_hf = actions.add_parser("from-hf", help="write a checkpoint with a Hugging Face folder's weights")
    from_hf.set_defaults(handler=_convert_from_hf)
    from_hf.add_argument("hf", type=Path, help="the Hugging Face folder: config.json and *.safetensors")
    from_hf.add_argument("checkpoint", type=Path, help="checkpoint folder to write; training.load_weights names it")
    from_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: as the tensors are stored"
    )
    from_hf.add_argument("--no-check", action="store_true", help="do not compare afterwards")
    _add_check(from_hf)
    check = actions.add_parser("check", help="compare a checkpoint and a Hugging Face folder on real text")
    check.set_defaults(handler=_convert_check)
    check.add_argument("checkpoint", type=Path, help=_CHECKPOINT)
    check.add_argument("hf", type=Path, help="the Hugging Face folder")
    _add_model(check)
    _add_check(check)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, default=None, help="default: the one the run was trained with")
    parser.add_argument(
        "--model-config", type=Path, default=None, metavar="YAML",
        help="of a checkpoint of Megatron-LM's: what it does not record (fields of a run's model, seq_length)",
    )
    parser.add_argument("--vocab-size", type=positive, default=None, help="likewise: ids without padding")
    parser.add_argument("--seq-length", type=positive, default=None, help="likewise: longest sequence")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe", type=Path, default=None, metavar="JSONL", help="text to compare on, by language (the run's probe)"
    )
    parser.add_argument(
        "--layer-by-layer", action="store_true", default=None,
        help="hold one layer of each model in memory (default: where both do not fit)",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _convert_to_hf(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    workflows.convert_to_hf(
        options.checkpoint, options.out, dtype=None if options.dtype == "stored" else options.dtype,
        tokenizer=options.tokenizer, stated=_stated(options), architecture=options.architecture,
        max_shard_size=options.max_shard_size,
    )
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

    report = workflows.check_hf(
        options.checkpoint, options.hf, record=record, tokenizer=getattr(options, "tokenizer", None),
        stated=_stated(options), probe=options.probe, layer_by_layer=options.layer_by_layer,
    )
    if options.json:
        print_json(report)
    else:
        print(terminal.describe_check(report))
    return 0


def _stated(options: argparse.Namespace) -> dict[str, Any]:
    from megatron_xalign import workflows

    if not hasattr(options, "model_config"):
        return {}
    return workflows.stated_model(options.model_config, options.vocab_size, options.seq_length)

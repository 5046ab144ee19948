"""Neuron statistics of models that are not in training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import natural, positive, print_json, verb

_EXAMPLES = """
examples:
  xalign capture runs/p05 --probe probe.jsonl --out probed/p05             the newest checkpoint of a run
  xalign capture runs/p05/checkpoints/step-000100 --probe probe.jsonl --out probed/p05
  xalign capture Llama-3.2-1B --probe probe.jsonl --out probed/llama       a Hugging Face folder
  xalign capture runs/p05 --probe probe.jsonl --out probed/p05 --nproc-per-node 2 --tensor-model-parallel-size 2
  xalign analyze probed/llama

Several checkpoints of one model may go to one OUT, each under its step; all with the same probe.
"""


_NEURON_EXAMPLES = """
examples:
  xalign neurons runs/p05                              every sampled neuron at the newest step
  xalign neurons runs/p05 --neuron 3:17 --most 20 --json
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    parser = verb(
        verbs, "capture", "neuron statistics of a checkpoint or a Hugging Face model, for `xalign analyze`", _capture,
        _EXAMPLES,
    )
    parser.add_argument(
        "source", type=Path, metavar="CHECKPOINT",
        help="a checkpoint folder, a run folder (its newest checkpoint), or a Hugging Face folder",
    )
    parser.add_argument(
        "--probe", type=Path, required=True, metavar="FILE", help='held-out translations: {"id", "texts": {...}} a line'
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="written: DIR/neurons/step-NNNNNN")
    parser.add_argument(
        "--layers", type=_layers, default=None, metavar="N,N,...", help="layers to capture, from 0 (default: all)"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, default=4096, metavar="N", help="padded tokens of one forward pass (4096)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="to compute in (float32)"
    )
    parser.add_argument(
        "--prefix", default="auto", metavar="P",
        help="token in front of every sentence, not counted: bos, eos, none or an id; default: what the tokenizer "
        "puts there, else its end-of-text token. Checkpoints: their end-of-document token, or none",
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=None, metavar="DIR", help="of a checkpoint (default: the one of its run)"
    )
    parser.add_argument("--step", type=natural, default=None, metavar="N", help="default: the checkpoint's, or 0")
    parser.add_argument(
        "--consumed-tokens", type=natural, default=None, metavar="N", help="default: the checkpoint's, or 0"
    )
    parser.add_argument(
        "--nproc-per-node", type=positive, default=None, metavar="N",
        help="start N processes here; leave out under torchrun or for a single process",
    )
    for axis in ("tensor", "pipeline"):
        parser.add_argument(f"--{axis}-model-parallel-size", type=positive, default=1, metavar="N", help="(1)")
    parser.add_argument("--json", action="store_true", help="print what was captured as JSON")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; touch nothing")


    look = verb(
        verbs, "neurons", "show what sampled neurons of a run fire on, as text (capture.sample)", _neurons,
        _NEURON_EXAMPLES,
    )
    look.add_argument("run", type=Path, help="a run folder")
    look.add_argument(
        "--neuron", type=_neuron, action="append", default=[], metavar="LAYER:N", help="may be given again (all)"
    )
    look.add_argument("--step", type=natural, default=None, metavar="N", help="default: the newest")
    look.add_argument("--most", type=positive, default=8, metavar="N", help="examples of each kind (8)")
    look.add_argument("--tokenizer", type=Path, default=None, metavar="DIR", help="default: the run's")
    look.add_argument("--json", action="store_true", help="print them as JSON")


def _neuron(text: str) -> tuple[int, int]:
    layer, separator, neuron = text.partition(":")
    if not (separator and layer.isdecimal() and neuron.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LAYER:NEURON, such as 3:17")
    return int(layer), int(neuron)


def _neurons(options: argparse.Namespace) -> int:
    from megatron_xalign import workflows

    found = workflows.look_at_neurons(
        options.run, options.neuron, options.step, options.most, tokenizer=options.tokenizer
    )
    if options.json:
        print_json(found)
        return 0
    for item in found:
        print(f"neuron {item['layer']}:{item['neuron']}, training steps {item['first_step']} to {item['step']}")
        for kind, title in (("top", "where it is largest"), ("sample", "drawn at random")):
            print(f"  {title}")
            for example in item[kind]:
                text = f"{example['before']}[[{example['token']}]]{example['after']}".replace("\n", " ")
                print(f"    {example['activation']:9.3f}  {example['language']}  {text}")
    return 0


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        layers = (-1,)
    if layers[0] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,6,11")
    return layers


def _capture(options: argparse.Namespace) -> int:
    from megatron_xalign import launch, workflows
    from megatron_xalign.config import ParallelConfig

    if options.dry_run:
        print(workflows.describe_capture(options.source, options.probe, options.out))
        return 0
    if options.nproc_per_node is not None:
        launch.run_workers(["capture", *_arguments(options)], options.nproc_per_node)
        if not options.json:
            print(options.out)
        return 0
    folder = workflows.capture(
        options.source, options.probe, options.out, layers=options.layers, batch_tokens=options.batch_tokens,
        dtype=options.dtype, prefix=options.prefix, step=options.step, consumed_tokens=options.consumed_tokens,
        tokenizer=options.tokenizer, parallel=ParallelConfig(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        ),
    )
    if options.json:
        from megatron_xalign.formats.atomic import read_json
        from megatron_xalign.formats.neuron_stats import INDEX_NAME

        print_json({"folder": str(folder), **read_json(folder / INDEX_NAME)})
    elif not launch.in_worker():
        print(folder)
    return 0


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line of a worker."""
    arguments = [str(options.source), "--probe", str(options.probe), "--out", str(options.out)]
    if options.layers is not None:
        arguments += ["--layers", ",".join(map(str, options.layers))]
    for name in (
        "batch_tokens", "dtype", "prefix", "tokenizer", "step", "consumed_tokens", "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    ):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments

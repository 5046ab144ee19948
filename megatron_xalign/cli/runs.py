"""Mixtures and training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import add_config, fraction_list, natural, positive, print_json, verb
from megatron_xalign.errors import ConfigError

_BLEND_EXAMPLES = """
examples:
  xalign blend RUN.yaml                                        asked against achieved, and the first 50 samples, cut
  xalign blend RUN.yaml --out samples.txt                      the samples in full
  xalign blend RUN.yaml --data-parallel-size 4 --json          also what each of 4 ranks reads
  xalign blend RUN.yaml --series 0,0.01,0.02,0.05              proves that the runs differ in the fraction only

Exits with 1 if something that was asked is not reached, or a proof fails.
"""
_TRAIN_EXAMPLES = """
examples:
  xalign train RUN.yaml --nproc-per-node 2
  xalign train RUN.yaml --set data.mixture.parallel_fraction=0.02 --set output_dir=runs/p0.02 --dry-run
  torchrun --nproc-per-node 8 tools/train.py RUN.yaml     where a scheduler starts the processes

A run that was stopped continues from its newest whole checkpoint by the same command. SIGTERM, SIGUSR1 and
training.exit_duration_minutes make it save and exit with code 75, for schedulers that requeue. A run goes
on from another run's checkpoint, longer or with other data from there on, by training.load_state (docs/training.md).
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_blend(verbs)
    _add_train(verbs)


def _add_blend(verbs: Any) -> None:
    parser = verb(verbs, "blend", "build a run's mixture and show it: asked against achieved", _blend, _BLEND_EXAMPLES)
    add_config(parser)
    parser.add_argument(
        "--samples", type=natural, default=None, metavar="N",
        help="show the first N samples as text, languages marked (default: 50 where data.tokenizer is set)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the samples there in full; printed ones are cut"
    )
    parser.add_argument(
        "--data-parallel-size", type=positive, action="append", default=[], metavar="D", dest="data_parallel_sizes",
        help="also count what each of D data-parallel ranks reads; may be given again",
    )
    parser.add_argument(
        "--series", type=fraction_list, default=None, metavar="P,P,...",
        help="build the mixture at each of these parallel fractions and prove that nothing else differs",
    )
    parser.add_argument("--json", action="store_true", help="print the audit (or the report of the series) as JSON")


def _blend(options: argparse.Namespace) -> int:
    from megatron_xalign import terminal, workflows
    from megatron_xalign.config import RunConfig, read_config

    config = read_config(options.config, options.overrides, RunConfig)
    if options.series is not None:
        report = workflows.compare_series(config, options.series)
        if options.json:
            print_json(report)
        else:
            print(terminal.describe_series(report))
        return 0 if report["holds"] else 1
    shown = options.samples
    if shown is None:
        shown = 50 if config.data.tokenizer and (options.out is not None or not options.json) else 0
    audit, table, samples = workflows.audit_blend(
        config, shown, data_parallel_sizes=options.data_parallel_sizes,
        most_characters=None if options.out is not None else 120,
    )
    if options.out is not None:
        from megatron_xalign.formats.atomic import write_text

        write_text(options.out, "\n".join(samples) + "\n")
    if options.json:
        print_json(audit)
        return 0
    print(table)
    if options.out is not None:
        print(f"\n{len(samples)} samples as text: {options.out}")
        return 0
    for sample in samples:
        print(sample)
    return 0


def _add_train(verbs: Any) -> None:
    parser = verb(
        verbs, "train", "train one model, watched while it trains; continues a stopped run",
        _train, _TRAIN_EXAMPLES,
    )
    add_config(parser)
    parser.add_argument(
        "--nproc-per-node", type=positive, default=None, metavar="N",
        help="start N processes here; leave out under torchrun or for a single process",
    )
    parser.add_argument("--master-port", type=positive, default=None, metavar="PORT", help="default: a free port")
    parser.add_argument(
        "--max-restarts", type=natural, default=0, metavar="N",
        help="start all processes again, from the last checkpoint, up to N times after one of them failed",
    )
    parser.add_argument(
        "--nnodes", type=positive, default=1, metavar="N",
        help="machines of the job; the same command runs on each, with --nproc-per-node and --rdzv-endpoint",
    )
    parser.add_argument("--rdzv-endpoint", default=None, metavar="HOST:PORT", help="where they meet: the first one's")
    parser.add_argument("--rdzv-id", default=None, metavar="ID", help="a name of the job, the same on each")
    parser.add_argument("--dry-run", action="store_true", help="print config, sizes and mixture; touch nothing")
    parser.add_argument(
        "--world-size", type=positive, default=None, metavar="N",
        help="with --dry-run: processes of the job that is planned, here or on a cluster",
    )


def _train(options: argparse.Namespace) -> int:
    from megatron_xalign import signals

    if not options.dry_run:
        # What follows takes seconds, and minutes where indices of the data are built.
        signals.listen()
    from megatron_xalign import launch, workflows
    from megatron_xalign.config import RunConfig, read_config

    config = read_config(options.config, options.overrides, RunConfig)
    if options.dry_run:
        started = None if options.nproc_per_node is None else options.nnodes * options.nproc_per_node
        print(workflows.describe_run(config, options.world_size or started))
        return 0
    if options.world_size is not None:
        raise ConfigError("--world-size goes with --dry-run; a job's size is what starts it.")
    if options.nproc_per_node is None:
        if options.nnodes > 1 or options.max_restarts:
            raise ConfigError("--nnodes and --max-restarts go with --nproc-per-node; torchrun has its own.")
        workflows.train(config)
        return 0
    overrides = [part for override in options.overrides for part in ("--set", override)]
    launch.run_workers(
        ["train", str(options.config), *overrides], options.nproc_per_node, options.master_port,
        max_restarts=options.max_restarts,
        nodes=launch.Nodes(options.nnodes, options.rdzv_endpoint, options.rdzv_id),
    )
    print(config.output_dir)
    return 0

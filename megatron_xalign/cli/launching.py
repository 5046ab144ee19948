"""Jobs for schedulers, and Megatron-LM's launch scripts as our YAML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_xalign.cli.arguments import add_config, fraction_list, natural, positive, print_json, verb
from megatron_xalign.errors import ConfigError

_LAUNCH_EXAMPLES = """
examples:
  xalign launch slurm RUN.yaml --nodes 4 --time 12:00:00 --account A --dry-run    prints the batch script
  xalign launch slurm RUN.yaml --nodes 4 --account A                              writes it into the run; submits it
  xalign launch slurm RUN.yaml --series 0,0.01,0.02,0.05 --out jobs --dry-run     a script for each run of a series
  xalign launch local RUN.yaml --nproc-per-node 8 --series 0,0.05                 one after the other, here
"""


_IMPORT_EXAMPLES = """
examples:
  xalign import-args train_llama.sh --out run.yaml
  xalign import-args train.sh --env CHECKPOINT_PATH=/data/run --env TOKENIZER=/data/tok
  xalign import-args --table                                the flags it knows, as in docs/megatron-lm-flags.md

The script is read and never run. What is not carried over stands at the top of the YAML, with the reason.
"""


def add_verbs(verbs: Any) -> None:
    """Add the verbs of this file to the parser of ``xalign``."""
    _add_launch(verbs)
    _add_import(verbs)


def _add_launch(verbs: Any) -> None:
    parser = verb(verbs, "launch", "run a training job under Slurm or here", _launch, _LAUNCH_EXAMPLES)
    places = parser.add_subparsers(dest="place", metavar="PLACE", required=True)
    slurm = places.add_parser(
        "slurm", help="a batch script: srun, rendezvous, save before the time limit, requeue", description=(
            "Render a batch script and submit it. The run saves before the time limit, requeues itself and goes on; a "
            "failed process makes all start again from the last checkpoint."
        ),
    )
    local = places.add_parser("local", help="a script for this machine", description="Render a script and run it here.")
    for place in (slurm, local):
        add_config(place)
        place.add_argument("--nproc-per-node", type=positive, default=8, metavar="N", help="processes of a node (8)")
        place.add_argument("--max-restarts", type=natural, default=3, metavar="N", help="after failed processes (3)")
        place.add_argument(
            "--series", type=fraction_list, default=None, metavar="P,P,...",
            help="one run for each parallel fraction, called p0, p0.01, ... beside the config's output_dir",
        )
        place.add_argument(
            "--setup", action="append", default=[], metavar="LINE", help="shell line before the job; may be given again"
        )
        place.add_argument(
            "--prefix", default="", metavar="COMMAND", help="what it runs in: 'apptainer exec --nv image.sif'"
        )
        place.add_argument("--python", default=sys.executable, metavar="PATH", help="interpreter (default: this one)")
        place.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="write the scripts there")
        place.add_argument("--dry-run", action="store_true", help="print the scripts; start nothing")
        place.set_defaults(handler=_launch)
    slurm.add_argument("--nodes", type=positive, default=1, metavar="N")
    slurm.add_argument("--gpus-per-node", type=natural, default=None, metavar="N", help="default: --nproc-per-node")
    slurm.add_argument("--cpus-per-task", type=positive, default=None, metavar="N", help="cores (7 a process)")
    slurm.add_argument("--time", default="24:00:00", metavar="LIMIT", help="time limit (24:00:00)")
    slurm.add_argument("--partition", default=None)
    slurm.add_argument("--account", default=None)
    slurm.add_argument(
        "--stop-seconds", type=positive, default=300, metavar="S",
        help="seconds before the limit at which the run saves and leaves (300)",
    )
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE",
        help="further option of sbatch, e.g. constraint=h100; may be given again",
    )


def _launch(options: argparse.Namespace) -> int:
    from megatron_xalign import job_script
    from megatron_xalign.config import RunConfig, read_config

    base = read_config(options.config, options.overrides, RunConfig)
    variants = [()] if options.series is None else job_script.series_of(base, options.series)
    is_slurm = options.place == "slurm"
    jobs = [
        job_script.Job(
            config_path=options.config, config=read_config(options.config, [*options.overrides, *variant], RunConfig),
            overrides=(*options.overrides, *variant), nodes=options.nodes if is_slurm else 1,
            nproc_per_node=options.nproc_per_node, max_restarts=options.max_restarts, setup=tuple(options.setup),
            prefix=options.prefix, python=options.python,
        )
        for variant in variants
    ]
    if not is_slurm:
        script = job_script.local_script(jobs)
        path = (options.out or Path(jobs[0].config.output_dir)) / "job.sh"
        if options.dry_run:
            _show({path: script}, options.out)
            return 0
        return job_script.run_here(script, path)
    gpus = options.nproc_per_node if options.gpus_per_node is None else options.gpus_per_node
    cores = options.cpus_per_task or 7 * options.nproc_per_node
    slurm = job_script.SlurmOptions(
        time_limit=options.time, partition=options.partition, account=options.account, gpus_per_node=gpus,
        cpus_per_task=cores, stop_seconds=options.stop_seconds, more=tuple(options.sbatch),
    )
    scripts = {}
    for job in jobs:
        path = Path(job.config.output_dir) / "job.sbatch" if options.out is None else options.out / f"{job.name}.sbatch"
        scripts[path] = job_script.slurm_script(job, slurm)
    if options.dry_run:
        _show(scripts, options.out)
        return 0
    for path, script in scripts.items():
        print(job_script.submit(script, path))
    return 0


def _show(scripts: dict[Path, str], folder: Path | None) -> None:
    """Print the scripts, or write them if a folder was named."""
    from megatron_xalign.formats.atomic import write_text

    for path, script in scripts.items():
        if folder is None:
            print(script)
        else:
            write_text(path, script)
            print(path)


def _add_import(verbs: Any) -> None:
    parser = verb(
        verbs, "import-args", "turn a Megatron-LM launch script into our YAML, naming what it does not carry",
        _import, _IMPORT_EXAMPLES,
    )
    parser.add_argument("script", type=Path, nargs="?", default=None, help="bash script that starts pretrain_gpt.py")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", type=_variable,
        help="a variable the script takes from outside; may be given again",
    )
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="write it there instead of printing it")
    parser.add_argument("--json", action="store_true", help="print settings and what is not carried as JSON")
    parser.add_argument("--table", action="store_true", help="print the table of flags and settings")


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _import(options: argparse.Namespace) -> int:
    from megatron_xalign import megatron_flags
    from megatron_xalign.formats.atomic import write_text

    if options.table:
        print(megatron_flags.flag_table(), end="")
        return 0
    if options.script is None:
        raise ConfigError("name a launch script, or give --table.")
    translation = megatron_flags.translate(megatron_flags.read_script(options.script), dict(options.env))
    if options.json:
        print_json({"settings": translation.tree, "left": translation.left, "processes": translation.processes})
        return 0
    text = translation.to_yaml(options.script.name)
    if options.out is None:
        print(text, end="")
        return 0
    write_text(options.out, text)
    print(f"{options.out}; not carried over:")
    for line in translation.left:
        print(f"  {line}")
    return 0

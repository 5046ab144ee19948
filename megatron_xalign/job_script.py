"""Scripts that run a training job: under Slurm, on any number of nodes, or on this machine.

A Slurm job starts one launcher a node (``xalign train --nnodes``); the launchers meet at the first node, as those of
``torchrun`` do, and start a process for each device. Before its time limit Slurm sends SIGUSR1; the run saves and
ends with exit code 75, and the script puts itself back into the queue. A worker that fails makes all of them start
again from the last checkpoint, inside the job; a node that fails makes Slurm requeue it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xalign.config import RunConfig
from megatron_xalign.errors import ConfigError, WorkerError
from megatron_xalign.formats.atomic import write_text
from megatron_xalign.launch import STOPPED_EARLY

_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run as a job."""

    config_path: Path
    """YAML of the run."""
    config: RunConfig
    """What it resolves to."""
    overrides: tuple[str, ...] = ()
    """``path.to.key=value`` settings on top of it."""
    nodes: int = 1
    """Machines."""
    nproc_per_node: int = 8
    """Processes, and devices, of each."""
    max_restarts: int = 3
    """How often all processes start again after one of them failed."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job: modules, variables."""
    prefix: str = ""
    """What the command runs in, such as ``apptainer exec --nv image.sif``."""
    python: str = sys.executable
    """The interpreter."""
    folder: Path = Path()
    """Working directory; relative paths of the config count from it."""

    def __post_init__(self) -> None:
        check_processes(self.config, self.nodes * self.nproc_per_node)

    @property
    def name(self) -> str:
        """The run's name, as a job and a file may be called."""
        return re.sub(r"[^\w.+-]", "-", self.config.name)

    def command(self, *more: str) -> str:
        """``xalign train`` of this run, an option with its value a line; ``more`` goes in as it is, for the shell."""
        words = [*shlex.split(self.prefix), self.python, "-m", "megatron_xalign", "train", str(self.config_path)]
        parts = [shlex.join(words), *(f"--set {shlex.quote(override)}" for override in self.overrides), *more]
        parts += [f"--nproc-per-node {self.nproc_per_node}", f"--max-restarts {self.max_restarts}"]
        return " \\\n    ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What Slurm is asked for."""

    time_limit: str = "24:00:00"
    """As ``sbatch --time`` takes it."""
    partition: str | None = None
    """Where to queue."""
    account: str | None = None
    """Whose hours."""
    gpus_per_node: int = 8
    """Devices of each node; 0 asks for none."""
    cpus_per_task: int | None = None
    """Cores of each node for its one task, the launcher and all its processes; Slurm gives one if left out."""
    stop_seconds: int = 300
    """How long before the time limit the run is told to save and leave: longer than a step and a save."""
    max_requeues: int = 100
    """After so many the job stays out of the queue: something else is wrong."""
    more: tuple[str, ...] = ()
    """Further options as ``NAME=VALUE`` or ``NAME``, without dashes."""

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time_limit):
            raise ConfigError(f"--time {self.time_limit!r} is not a time such as 24:00:00, 2-12:00:00 or 90 (minutes).")
        for option in self.more:
            if not re.fullmatch(r"[a-z][a-z-]*(=[^\n]+)?", option):
                raise ConfigError(f"--sbatch {option!r} is not of the form NAME=VALUE, such as constraint=h100.")


def check_processes(config: RunConfig, processes: int) -> None:
    """Raise ConfigError if a run cannot be laid over so many processes; better here than on a cluster, hours later."""
    model_size, training = config.parallel.model_parallel_size, config.training
    if processes % model_size:
        raise ConfigError(
            f"{processes} processes cannot be divided by the {model_size} that one copy of the model needs; use a "
            f"multiple of {model_size}, or change the parallel settings."
        )
    at_once = training.micro_batch_size * (processes // model_size)
    if training.global_batch_size % at_once:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} cannot be divided by micro_batch_size="
            f"{training.micro_batch_size} times {processes // model_size} data-parallel ranks on {processes} "
            f"processes; use a multiple of {at_once}, or a smaller micro-batch."
        )


def slurm_script(job: Job, slurm: SlurmOptions) -> str:
    """A whole batch script for ``sbatch``."""
    asked: dict[str, object] = {
        "job-name": job.name, "nodes": job.nodes, "ntasks-per-node": 1, "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_task, "time": slurm.time_limit, "partition": slurm.partition,
        "account": slurm.account, "output": "%x-%j.log", "open-mode": "append",
        # To the job steps, not to this script.
        "signal": f"USR1@{slurm.stop_seconds}",
    }
    header = [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    header += ["#SBATCH --requeue", *(f"#SBATCH --{option}" for option in slurm.more)]
    command = job.command(
        '--nnodes "$SLURM_JOB_NUM_NODES"', '--rdzv-endpoint "$head_node:$port"',
        '--rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
    )
    return "\n".join([
        "#!/bin/bash",
        *header,
        "#",
        f"# {job.name}: one launcher on each of {job.nodes} node(s), {job.nproc_per_node} processes under it.",
        "set -uo pipefail",
        f"cd {shlex.quote(str(job.folder.resolve()))}",
        *job.setup,
        "",
        "# The launchers meet at the first node.",
        'head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "",
        "# Bash waits for srun before it looks at these. SIGTERM comes when the job is cancelled or pre-empted:",
        "# whether it runs again is then for Slurm to say.",
        "terminated=no",
        "trap 'terminated=yes' TERM",
        "trap : USR1",
        "",
        "# One launcher that ends must not end the others: each has its own processes to wait for.",
        'srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \\',
        f"    {command}",
        "code=$?",
        "",
        f"# {STOPPED_EARLY}: saved and stopped because the time was up; the same command continues.",
        f'if [ "$code" -eq {STOPPED_EARLY} ] && [ "$terminated" = no ]; then',
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {slurm.max_requeues} ]; then',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    else",
        f'        echo "requeued {slurm.max_requeues} times; not again" >&2',
        "    fi",
        "fi",
        'exit "$code"',
        "",
    ])


def local_script(jobs: Sequence[Job]) -> str:
    """A script that does the runs one after the other on this machine; it stops at the first that does not end well."""
    lines = ["#!/bin/bash", f"# {', '.join(job.name for job in jobs)}: {jobs[0].nproc_per_node} processes here."]
    lines += ["set -uo pipefail", f"cd {shlex.quote(str(jobs[0].folder.resolve()))}", *jobs[0].setup, ""]
    for job in jobs:
        lines += [f"{job.command()} || exit $?", ""]
    return "\n".join(lines)


def series_of(config: RunConfig, fractions: Sequence[float]) -> list[tuple[str, ...]]:
    """The overrides that make one config into runs that differ in their parallel fraction, and are called after it."""
    beside = Path(config.output_dir).parent
    return [
        (f"data.mixture.parallel_fraction={p:g}", f"name=p{p:g}", f"output_dir={beside / f'p{p:g}'}") for p in fractions
    ]


def submit(script: str, path: Path) -> str:
    """Write a batch script and hand it to ``sbatch``; return the job's number.

    Raises:
        WorkerError: there is no ``sbatch``, or it refused.
    """
    write_text(path, script)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise WorkerError(
            f"there is no sbatch on this machine; {path} is written: submit it where there is one, or use --dry-run."
        ) from None
    if done.returncode:
        raise WorkerError(f"sbatch refused {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]


def run_here(script: str, path: Path) -> int:
    """Write a script and run it with bash; return its exit code."""
    write_text(path, script)
    return subprocess.run(["bash", str(path)], check=False).returncode

"""A study as jobs of a cluster: one for each run, and a last one that measures and draws when they have ended."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatron_xalign import job_script, workflows
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import write_text
from megatron_xalign.study import SlurmConfig, StudyPlan, StudyRun


def study_scripts(plan: StudyPlan) -> dict[Path, str]:
    """Batch scripts of the runs that are not trained yet, by where they go; the last is the one that measures.

    Raises:
        ConfigError: the study has no ``slurm`` section, or a run cannot be laid over the processes asked for.
    """
    slurm = _slurm_of(plan)
    scripts = {}
    for run in plan.runs:
        if workflows.is_trained(run.config):
            continue
        try:
            job = job_script.Job(
                config_path=run.config_path, config=run.config, nodes=slurm.nodes,
                nproc_per_node=plan.config.nproc_per_node, max_restarts=slurm.max_restarts, setup=slurm.setup,
                prefix=slurm.prefix,
            )
        except ConfigError as error:
            raise ConfigError(f"run {run.name} of {plan.config_path}: {error}") from None
        scripts[_script_path(plan, run)] = job_script.slurm_script(job, slurm.options(plan.config.nproc_per_node))
    scripts[plan.out / "jobs" / "measure.sbatch"] = _measuring(plan, slurm)
    return scripts


def submit_study(plan: StudyPlan) -> list[str]:
    """Hand every run that is not trained yet to Slurm; return the jobs' numbers, that of the measuring one last.

    Raises:
        ConfigError: see ``study_scripts``.
        WorkerError: there is no ``sbatch``, or it refused; jobs that were taken by then stay in the queue.
    """
    scripts = study_scripts(plan)
    for run in plan.runs:
        write_text(run.config_path, to_yaml(run.config))
    jobs: list[str] = []
    *runs, last = scripts
    for path in runs:
        jobs.append(job_script.submit(scripts[path], path))
    # After them however they ended: a failed run is told on the page.
    after = [f"#SBATCH --dependency=afterany:{':'.join(jobs)}"] if jobs else []
    first, *rest = scripts[last].split("\n")
    jobs.append(job_script.submit("\n".join([first, *after, *rest]), last))
    return jobs


def _slurm_of(plan: StudyPlan) -> SlurmConfig:
    if plan.config.slurm is None:
        raise ConfigError(
            f"{plan.config_path} has no slurm section; give it one (slurm: {{account: A, time_limit: '24:00:00'}}), or "
            "leave out --submit to train here."
        )
    return plan.config.slurm


def _script_path(plan: StudyPlan, run: StudyRun) -> Path:
    return plan.out / "jobs" / f"{run.name}.sbatch"


def _measuring(plan: StudyPlan, slurm: SlurmConfig) -> str:
    words = [*shlex.split(slurm.prefix), sys.executable, "-m", "megatron_xalign", "study", str(plan.config_path)]
    asked = {
        "job-name": "measure", "nodes": 1, "time": slurm.measure_time_limit, "partition": slurm.partition,
        "account": slurm.account, "output": "%x-%j.log", "open-mode": "append",
    }
    return "\n".join([
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None),
        "# Measures the runs that ended well and draws the page; the same command does it by hand.",
        "set -uo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *slurm.setup,
        shlex.join([*words, *(part for item in plan.overrides for part in ("--set", item)), "--no-train"]),
        "",
    ])  # fmt: skip

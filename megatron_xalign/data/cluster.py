"""One preprocessing job as many tasks: array jobs of Slurm and the like, or datatrove's executors.

Task ``i`` of ``n`` does the parts ``i, i + n, i + 2n, ...`` of the plan, which lies in the work folder on a file system
that all tasks see. Parts are done whole or not at all and kept when they are done, so a task may be killed, run again,
or run with another ``n``; afterwards one task joins them. The result is that of one machine, bit for bit. Only the
functions named after datatrove need it (extra ``datatrove``).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.data.inputs import find_inputs
from megatron_xalign.data.job import Job, Survey
from megatron_xalign.data.job_settings import JobSettings
from megatron_xalign.data.preprocess import Outcome, do_parts, finish_job, kept_files
from megatron_xalign.data.work_folder import JOB_FILE, WorkFolder
from megatron_xalign.errors import ConfigError, FormatError, WorkerError

_LOG = logging.getLogger(__name__)

ExecutorKind = Literal["local", "slurm", "ray"]
LONGEST_PLAN_SECONDS = 1800.0
"""A plan reads a sample of the corpus, proves the engine on it and may train models of sentences: minutes at most."""
_ASK_AGAIN_SECONDS = 1.0
# A scheduler may start the join when the last task is about to end, and locks may take a moment to get about.
_LAST_TASK_SECONDS = 60.0
# The folder is had alone for a moment by every task that asks for the plan as it is made, and for long by the join.
_BESIDE_OTHERS_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """One of several tasks of a job."""

    index: int
    """From 0."""
    num_tasks: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_tasks:
            raise ConfigError(f"there is no task {self.index} of {self.num_tasks}; they are numbered from 0.")

    @classmethod
    def parse(cls, text: str) -> Task:
        """``3/16``: the fourth of sixteen.

        Raises:
            ConfigError: it is not of that form, or there is no such task.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
        if match is None:
            raise ConfigError(f"task {text!r} is not of the form I/N with I from 0 to N-1, such as 0/16 or 15/16.")
        return cls(int(match[1]), int(match[2]))

    def parts(self, num_parts: int) -> list[int]:
        """The parts that this task does."""
        return list(range(self.index, num_parts, self.num_tasks))


def plan_tasks(settings: JobSettings, longest_wait_seconds: float = LONGEST_PLAN_SECONDS) -> Job:
    """The plan of a job: made by the first task that asks, read by the others.

    Args:
        settings: of the job; the same in every task, but for ``workers``.
        longest_wait_seconds: for another task that is making the plan.

    Raises:
        ConfigError: another job writes there, or a task of other settings.
        ConfigError, CorpusError, FormatError: see ``Job.plan``.
    """
    deadline = time.monotonic() + longest_wait_seconds
    while True:
        job = _planned(settings)
        if job is not None:
            return job
        # Held by a task that plans, and soon will have; or by another job, which will not go away.
        with ExitStack() as held:
            if not _held(held, settings, deadline):
                continue
            job = _planned(settings)
            if job is None:
                job = Job.plan(settings)
                job.prepare()
            return job


def run_task(settings: JobSettings, task: Task) -> dict[str, Any]:
    """Do the parts of one task; those that are done are kept.

    Returns:
        ``task, num_tasks, parts`` (of this task), and the figures of ``preprocess.do_parts``.

    Raises:
        As ``preprocess.run_job``, but for what the join finds.
    """
    while _already_joined(settings) is None:
        job = plan_tasks(settings)
        deadline = time.monotonic() + _BESIDE_OTHERS_SECONDS
        with ExitStack() as held:
            is_held = False
            while not is_held and (settings.work_folder / JOB_FILE).exists():
                is_held = _held(held, settings, deadline, shared=True)
            if not is_held or _planned(settings) is None:
                continue  # Who had the folder alone meanwhile joined the parts, or planned another job.
            wanted = task.parts(job.num_parts)
            figures = do_parts(job, wanted)
        return {**figures, "task": task.index, "num_tasks": task.num_tasks, "parts": len(wanted)}
    return {"task": task.index, "num_tasks": task.num_tasks, "parts": 0}


def join_tasks(settings: JobSettings) -> Outcome:
    """Join the parts when all tasks are done. Done once more (a scheduler may run it again), it keeps what is there.

    Raises:
        ConfigError: a task still runs.
        CorpusError: parts are missing, or no document is left.
        FormatError: there is no plan, a part is damaged, or a file cannot be written.
    """
    kept = _already_joined(settings)
    if kept is not None:
        return kept
    job = _planned(settings)
    if job is None:
        raise FormatError(
            f"{settings.work_folder} holds no plan of this job; its tasks have not run, or had other settings."
        )
    deadline = time.monotonic() + _LAST_TASK_SECONDS
    with ExitStack() as held:
        while not _held(held, settings, deadline):
            pass
        # By another join, meanwhile?
        kept = _already_joined(settings)
        if kept is None:
            return finish_job(job, {})
        job.folder.remove_all()
        return kept


def _held(stack: ExitStack, settings: JobSettings, deadline: float, *, shared: bool = False) -> bool:
    """Whether the work folder is had until the stack ends; if not, waits a little, or raises past the deadline."""
    try:
        stack.enter_context(WorkFolder(settings.work_folder).hold(shared=shared))
    except ConfigError:
        if time.monotonic() > deadline:
            raise
        time.sleep(_ASK_AGAIN_SECONDS)
        return False
    return True


def _planned(settings: JobSettings) -> Job | None:
    """The plan in the work folder if it is of this job and its input is still the same."""
    folder = settings.work_folder
    if not (folder / JOB_FILE).exists():
        return None
    try:
        job = Job.load(folder)
    except FormatError:
        # Of another version of this package, or removed this moment; planned anew under the lock.
        return None
    if _deciding(job.settings) != _deciding(settings):
        return None
    found = set(find_inputs(settings.inputs, format=settings.input_format, fields=settings.fields))
    planned = {file for part in job.parts for file in part.files}
    if not planned <= found or any(file.num_bytes for file in found - planned):
        return None
    # All tasks must use the tokenizer that the plan was made with.
    return job if settings.load_tokenizer().sha256 == job.recipe["tokenizer"]["sha256"] else None


def _deciding(settings: JobSettings) -> dict[str, Any]:
    # As it comes back from a file.
    tree: dict[str, Any] = json.loads(json.dumps({**settings.to_tree(), "workers": None}))
    return tree


def _already_joined(settings: JobSettings) -> Outcome | None:
    """The finished files of a job whose work folder is gone."""
    if (settings.work_folder / JOB_FILE).exists():
        return None
    manifests = kept_files(Survey.make(settings))
    return Outcome(manifests, None) if manifests is not None else None


# --- datatrove --------------------------------------------------------------------------------------------------------


class PartsStep:
    """Step of a datatrove pipeline: each rank does the parts of the task of its number."""

    name = "parts"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """``settings``: ``JobSettings.to_tree()``; plain data, since the executor carries the step elsewhere."""
        self.settings = dict(settings)

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """What an executor calls in a rank; ``data`` of a step before is not used."""
        run_task(JobSettings.from_tree(self.settings), Task(rank, world_size))


class JoinStep:
    """Step of a datatrove pipeline of one rank: joins the parts."""

    name = "join"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """As :class:`PartsStep`."""
        self.settings = dict(settings)

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """What an executor calls; only the first rank has something to do."""
        if rank == 0:
            join_tasks(JobSettings.from_tree(self.settings))


def datatrove_executor(
    settings: JobSettings,
    kind: ExecutorKind,
    num_tasks: int,
    logging_folder: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """An executor of datatrove for a job that is planned (:func:`plan_tasks`).

    Local and Ray: its ``run()`` does the parts; :func:`join_tasks` then joins them. Slurm: its ``run()`` submits an
    array of ``num_tasks`` jobs that do the parts and one more that joins them when all have succeeded, and returns.

    Args:
        settings: of the job; ``workers`` are the processes within a task, 1 if left out.
        kind: ``local``, ``slurm`` or ``ray``.
        num_tasks: ranks that do parts.
        logging_folder: for datatrove's logs; ``PREFIX.datatrove`` if left out. All tasks must see it.
        options: arguments of datatrove's executor (``partition``, ``time``, ``cpus_per_task``, ``workers``, ...).

    Raises:
        ConfigError: datatrove is not installed, or does not know an option.
    """
    executor = _executor_class(kind)
    if num_tasks < 1:
        raise ConfigError(f"{num_tasks} tasks cannot do a job; at least one is needed.")
    arguments = dict(options or {})
    folder = Path(logging_folder) if logging_folder is not None else Path(f"{settings.output_prefix}.datatrove")
    if settings.workers is None:
        settings = JobSettings.from_tree({**settings.to_tree(), "workers": int(arguments.get("cpus_per_task", 1))})
    tree = settings.to_tree()
    if kind == "slurm":
        # The tasks run in the environment that this process runs in, unless told otherwise.
        if sys.prefix != sys.base_prefix and not {"venv_path", "condaenv", "env_command"} & arguments.keys():
            arguments["venv_path"] = str(Path(sys.prefix) / "bin" / "activate")
        arguments.setdefault("job_name", f"xalign-{Path(settings.output_prefix).name}")
    alone = {key: value for key, value in arguments.items() if key not in ("workers", "tasks_per_job")}
    try:
        # What is done is decided by the parts themselves: a marker of datatrove's outlives a changed input.
        parts = executor(
            pipeline=[PartsStep(tree)], tasks=num_tasks, logging_dir=str(folder / "parts"), skip_completed=False,
            **arguments,
        )
        if kind != "slurm":
            # Not with depends: there datatrove waits for ever for a task that failed.
            return parts
        return executor(
            pipeline=[JoinStep(tree)], tasks=1, logging_dir=str(folder / "join"), skip_completed=False, depends=parts,
            **alone,
        )
    except TypeError as error:
        raise ConfigError(f"datatrove's executor for {kind} was given a wrong or too few options: {error}.") from None


def run_datatrove(
    settings: JobSettings,
    kind: ExecutorKind,
    num_tasks: int,
    logging_folder: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Outcome | None:
    """Do a job with an executor of datatrove; see :func:`datatrove_executor`.

    Returns:
        What was made; None for Slurm, where it is made later.

    Raises:
        WorkerError: tasks failed; with the local executor what they raised.
    """
    executor = datatrove_executor(settings, kind, num_tasks, logging_folder, options)
    kept = _already_joined(settings)
    if kept is not None:
        return kept
    # Planned here, so that what is wrong with the job is said now and not in the log of a task.
    job = plan_tasks(settings)
    executor.run()
    if kind == "slurm":
        return None
    missing = job.missing()
    if missing:
        raise WorkerError(
            f"{len(missing)} of {job.num_parts} parts are not done: a task failed; {executor.logging_dir.path}/logs "
            "says why. What is done is kept; the same command continues."
        )
    return join_tasks(settings)


def _executor_class(kind: ExecutorKind) -> Any:
    try:
        from datatrove import executor
    except ImportError:
        raise ConfigError(
            "to hand tasks to datatrove it must be installed: pip install 'megatron-xalign[datatrove]'. Array jobs do "
            "without: xalign preprocess ... --task I/N in each, then xalign preprocess ... --join."
        ) from None
    names = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
    if kind not in names:
        raise ConfigError(f"{kind!r} is no executor of datatrove; they are {', '.join(names)}.")
    return getattr(executor, names[kind])

"""A study: parallel fractions x seeds x controls, planned, trained, measured and drawn on one page.

Every stage of every run leaves files; what is done is not done again, so a stopped study continues by the same command.
A run that fails is recorded as failed, with the reason, and the others go on: the page says so, and the exit code too.
"""

from __future__ import annotations

import itertools
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_xalign import launch, workflows
from megatron_xalign.config import RunConfig, read_config
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.formats.atomic import read_json, write_json, write_text
from megatron_xalign.formats.run_folder import RunFolder, check_same_run
from megatron_xalign.job_script import SlurmOptions

log = logging.getLogger(__name__)

STATE_FILE = "study.json"
"""In a study's folder: its runs, and how far each is."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """A variation of the runs that tells what an effect is due to, for instance shuffled pairs."""

    overrides: tuple[str, ...]
    """Settings that differ, as ``path.to.key=value``."""
    fractions: tuple[float, ...] | None = None
    """Parallel fractions it is run at; all above 0 if left out."""
    seeds: tuple[int, ...] | None = None
    """Seeds it is run with; all if left out."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What every training job of a study asks Slurm for (``xalign study --submit``)."""

    nodes: int = 1
    """Machines of one run."""
    time_limit: str = "24:00:00"
    """Of one job; a run saves before it, requeues itself and goes on."""
    measure_time_limit: str = "04:00:00"
    """Of the last job, which measures and draws."""
    partition: str | None = None
    """Where to queue."""
    account: str | None = None
    """Whose hours."""
    gpus_per_node: int | None = None
    """Devices of each machine; as many as processes if left out."""
    cpus_per_task: int | None = None
    """Cores of each machine; 7 a process if left out."""
    stop_seconds: int = 300
    """How long before the limit a run is told to save and leave."""
    max_restarts: int = 3
    """How often all processes start again after one failed."""
    sbatch: tuple[str, ...] = ()
    """Further options, as ``NAME=VALUE``."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job."""
    prefix: str = ""
    """What commands run in, such as ``apptainer exec --nv image.sif``."""

    def options(self, nproc_per_node: int) -> SlurmOptions:
        """As batch scripts are made of."""
        return SlurmOptions(
            time_limit=self.time_limit, partition=self.partition, account=self.account,
            gpus_per_node=nproc_per_node if self.gpus_per_node is None else self.gpus_per_node,
            cpus_per_task=self.cpus_per_task or 7 * nproc_per_node, stop_seconds=self.stop_seconds, more=self.sbatch,
        )


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Which runs a study is made of and how they are started."""

    run: str
    """YAML of a run; every run of the study is this one with a few settings changed. Relative to the study's YAML."""
    output_dir: str
    """Folder of the study: ``configs/``, ``runs/``, ``report/``, ``study.json``."""
    fractions: tuple[float, ...]
    """``data.mixture.parallel_fraction`` of the series."""
    seeds: tuple[int, ...] = (1234,)
    """Each fraction is trained once with each."""
    seeds_of: Literal["weights_and_data", "weights"] = "weights_and_data"
    """Whether a seed draws the order of the data too (``data.mixture.seed``), or initial weights only."""
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    """By name."""
    overrides: tuple[str, ...] = ()
    """Settings of every run that differ from ``run``, as ``path.to.key=value``."""
    nproc_per_node: int = 1
    """Processes of one run on each machine."""
    slurm: SlurmConfig | None = None
    """What its jobs ask for, where runs are jobs of a cluster."""
    title: str = "Parallel data and cross-lingual alignment"
    """Heading of the page."""
    hugging_face: bool = False
    """Whether every run's last checkpoint becomes a Hugging Face folder, checked."""

    def __post_init__(self) -> None:
        for name in ("fractions", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name}={list(values)} must name at least one value, none of them twice.")
        for fraction in self.fractions:
            if not 0.0 <= fraction <= 1.0:
                raise ConfigError(f"fractions: {fraction:g} is outside [0, 1]; five percent is written 0.05.")
        if self.nproc_per_node < 1:
            raise ConfigError(f"nproc_per_node={self.nproc_per_node} must be positive.")
        for name, control in self.controls.items():
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"controls: {name!r} becomes part of folder names; use letters, digits, - and _.")
            for kind, chosen, known in (
                ("fractions", control.fractions, self.fractions), ("seeds", control.seeds, self.seeds)
            ):
                unknown = sorted(set(chosen or ()) - set(known))
                if unknown:
                    raise ConfigError(f"controls.{name}.{kind}={unknown} are not among {kind}={list(known)}.")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    config: RunConfig
    """Resolved."""
    fraction: float
    """Its share of parallel data."""
    seed: int
    """Of its weights (and data)."""
    control: str | None
    """Name of the control it belongs to; None for the series itself."""
    config_path: Path
    """The YAML that ``xalign train`` reads."""

    @property
    def name(self) -> str:
        """Unique in the study."""
        return self.config.name

    @property
    def folder(self) -> RunFolder:
        """Where it lies."""
        return RunFolder(Path(self.config.output_dir))


@dataclass(frozen=True)
class StudyPlan:
    """The runs of a study, in the order in which they are trained."""

    config: StudyConfig
    config_path: Path
    overrides: tuple[str, ...]
    runs: list[StudyRun]

    @property
    def out(self) -> Path:
        """The study's folder."""
        return Path(self.config.output_dir)

    def describe(self) -> str:
        """What would be done, for ``--dry-run``."""
        state = _read_state(self.out)
        lines = [f"{'run':28s}{'fraction':>9s}{'seed':>8s}  {'control':14s}{'tokens':>15s}  state"]
        for run in self.runs:
            reached = state.get(run.name, {}).get("state", "planned")
            lines.append(
                f"{run.name:28s}{run.fraction:9g}{run.seed:8d}  {run.control or '-':14s}"
                f"{run.config.train_tokens:15,d}  {reached}"
            )
        total = sum(run.config.train_tokens for run in self.runs)
        page = self.out / "report" / "index.html"
        return "\n".join([*lines, f"{len(self.runs)} runs, {total:,} tokens; page: {page}"])


def run_name(fraction: float, seed: int, control: str | None) -> str:
    """``p0.05-s1`` or ``p0.05-shuffled-s1``."""
    return f"p{fraction:g}{f'-{control}' if control else ''}-s{seed}"


def plan_study(config_path: Path, overrides: Sequence[str] = ()) -> StudyPlan:
    """Resolve every run of a study.

    Seeds are the outer loop: after the first part of the work there is a whole series of one seed.

    Raises:
        ConfigError: a setting is wrong; the message names the run.
    """
    config = read_config(config_path, overrides, StudyConfig)
    base = config_path.parent / config.run
    out = Path(config.output_dir)
    runs = []
    for seed, (control, fraction) in itertools.product(config.seeds, _series(config)):
        chosen = config.controls[control] if control else None
        if chosen is not None and chosen.seeds is not None and seed not in chosen.seeds:
            continue
        name = run_name(fraction, seed, control)
        settings = [
            *config.overrides,
            *(chosen.overrides if chosen is not None else ()),
            f"name={name}", f"output_dir={out / 'runs' / name}", f"seed={seed}",
            f"data.mixture.parallel_fraction={fraction!r}",
            *([f"data.mixture.seed={seed}"] if config.seeds_of == "weights_and_data" else []),
        ]
        try:
            resolved = read_config(base, settings, RunConfig)
        except ConfigError as error:
            raise ConfigError(f"run {name} of {config_path}: {error}") from None
        if resolved.capture is None or resolved.data.probe is None:
            raise ConfigError(
                f"{base} has no {'capture section' if resolved.capture is None else 'data.probe'}; a study measures "
                "held-out sentences while its runs train."
            )
        runs.append(StudyRun(resolved, fraction, seed, control, out / "configs" / f"{name}.yaml"))
    return StudyPlan(config, config_path, tuple(overrides), runs)


def _series(config: StudyConfig) -> Iterator[tuple[str | None, float]]:
    yield from ((None, fraction) for fraction in config.fractions)
    for name, control in config.controls.items():
        fractions = control.fractions
        if fractions is None:
            fractions = tuple(fraction for fraction in config.fractions if fraction > 0)
        yield from ((name, fraction) for fraction in fractions)


def run_study(plan: StudyPlan, only: Sequence[str] = (), train: bool = True) -> dict[str, Any]:
    """Do what is not done yet; return ``study.json``.

    Args:
        plan: from ``plan_study``.
        only: names of runs; others are left as they are. All if empty.
        train: whether runs that are not trained are trained here; False takes what another job trained.

    Raises:
        ConfigError: ``only`` names no run of the study, or a folder holds another run.
    """
    unknown = sorted(set(only) - {run.name for run in plan.runs})
    if unknown:
        known = ", ".join(run.name for run in plan.runs)
        raise ConfigError(f"the study has no run {', '.join(unknown)}; it has {known}.")
    chosen = [run for run in plan.runs if not only or run.name in only]
    for run in chosen:
        # Proved before hours are spent on training, and before a config of another run is overwritten.
        if run.folder.config_path.is_file():
            check_same_run(run.folder, run.config)
        write_text(run.config_path, _header(run, plan.config.nproc_per_node) + to_yaml(run.config))
    for number, run in enumerate(chosen, start=1):
        log.info("[%d/%d] %s", number, len(chosen), run.name)
        _record(plan, run, _do(plan, run, train))
    if not only:
        return finish_study(plan)
    return read_study(plan)


def _do(plan: StudyPlan, run: StudyRun, train: bool) -> dict[str, Any]:
    """Train and measure one run; return its entry of ``study.json``."""
    stage, started = "trained", time.monotonic()
    try:
        if not workflows.is_trained(run.config):
            if not train:
                return {"state": "planned"}
            _record(plan, run, {"state": "running"})
            launch.run_workers(["train", str(run.config_path)], plan.config.nproc_per_node)
        stage = "analysed"
        if not workflows.is_analysed(run.folder.path):
            workflows.analyze(run.folder.path)
        if plan.config.hugging_face:
            stage = "converted"
            out = plan.out / "hf" / run.name
            if not workflows.is_converted(run.folder.path, out):
                workflows.convert_to_hf(run.folder.path, out)
                workflows.check_hf(run.folder.path, out)
    except XAlignError as error:
        log.error("%s could not be %s: %s", run.name, stage, error)
        return {"state": "failed", "stage": stage, "error": str(error)}
    return {"state": "done", "seconds": round(time.monotonic() - started, 1)}


def finish_study(plan: StudyPlan) -> dict[str, Any]:
    """Compare the runs that are done and draw the page; return ``study.json``."""
    state = read_study(plan)
    done = [run for run in plan.runs if state["runs"][run.name]["state"] == "done"]
    if not done:
        log.warning("no run of %s is done; there is nothing to draw.", plan.out)
        return state
    missing = {
        run.name: state["runs"][run.name].get("error", "not trained yet")
        for run in plan.runs if state["runs"][run.name]["state"] != "done"
    }
    command = ["xalign", "study", str(plan.config_path), *(f"--set={item}" for item in plan.overrides)]
    page = workflows.report(
        [run.folder.path for run in done], plan.out / "report", title=plan.config.title,
        commands=[shlex.join(command)],
        controls={run.name: run.control for run in done if run.control}, missing=missing,
        hf={run.name: plan.out / "hf" / run.name for run in done} if plan.config.hugging_face else None,
    )
    state["report"] = str(page)
    write_json(plan.out / STATE_FILE, state)
    return state


def read_study(plan: StudyPlan) -> dict[str, Any]:
    """How far every run is: ``{"runs": {name: {"state", ...}}, "report"}``."""
    known = _read_state(plan.out)
    return {
        "study": str(plan.config_path),
        "runs": {
            run.name: {
                "fraction": run.fraction, "seed": run.seed, "control": run.control, "folder": str(run.folder.path),
                **known.get(run.name, {"state": "planned"}),
            }
            for run in plan.runs
        },
    }


def _record(plan: StudyPlan, run: StudyRun, entry: dict[str, Any]) -> None:
    before = _read_state(plan.out).get(run.name, {})
    if entry["state"] == "done" and before.get("state") == "done":
        return
    # One file a run: jobs of a cluster finish at the same time.
    write_json(plan.out / "state" / f"{run.name}.json", entry)
    write_json(plan.out / STATE_FILE, read_study(plan))


def _read_state(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path) for path in sorted((out / "state").glob("*.json"))}


def _header(run: StudyRun, processes: int) -> str:
    about = f", control {run.control}" if run.control else ""
    return (
        f"# One run of a study: {run.fraction:g} of its content tokens come from parallel documents; seed {run.seed}"
        f"{about}.\n"
        f"# Run it alone: xalign train {run.config_path} --nproc-per-node {processes}\n"
    )


def describe_study(state: dict[str, Any]) -> str:
    """How far a study is, as text for a terminal."""
    lines = []
    for name, entry in state["runs"].items():
        seconds = f" in {entry['seconds'] / 60:.1f} minutes" if "seconds" in entry else ""
        lines.append(f"{name:28s}{entry['state']}{seconds}" + (f": {entry['error']}" if "error" in entry else ""))
    failed = [name for name, entry in state["runs"].items() if entry["state"] == "failed"]
    if failed:
        lines.append(f"{len(failed)} of {len(state['runs'])} runs failed; the same command tries them again.")
    return "\n".join([*lines, f"report  {state['report']}"] if "report" in state else lines)

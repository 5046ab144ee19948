"""Which runs a study has, and what becomes of those that fail; training and measuring stand aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xalign import study
from megatron_xalign.cli import main
from megatron_xalign.config import RunConfig, read_config
from megatron_xalign.errors import ConfigError, StoppedEarly, WorkerError
from megatron_xalign.study import plan_study, read_study, run_study
from megatron_xalign.study_jobs import study_scripts

RUN = """
model: {num_layers: 2}
data:
  probe: probe.jsonl
  sources: [{prefix: tokens/a}, {prefix: tokens/b}, {prefix: tokens/pairs}]
training: {train_steps: 10, global_batch_size: 8, micro_batch_size: 8}
capture: {}
"""
STUDY = """
run: run.yaml
output_dir: OUT
fractions: [0, 0.05, 0.2]
seeds: [1, 2]
controls:
  shuffled:
    overrides: [data.mixture.pairing=shuffled, data.sources.2.prefix=tokens/shuffled]
    fractions: [0.2]
    seeds: [1]
overrides: [training.train_steps=20]
"""
NAMES = ["p0-s1", "p0.05-s1", "p0.2-s1", "p0.2-shuffled-s1", "p0-s2", "p0.05-s2", "p0.2-s2"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("OUT", str(tmp_path / "out")))
    return path


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What would have been trained, measured and drawn."""
    calls: dict[str, list[Any]] = {"trained": [], "analysed": [], "reports": []}

    def train(arguments: list[str], processes: int) -> None:
        name = Path(arguments[1]).stem
        calls["trained"].append(name)
        if name in calls.get("failing", []):
            raise WorkerError(f"worker 0 of {name} was killed")

    def report(runs: list[Path], out: Path, **options: Any) -> Path:
        calls["reports"].append(([run.name for run in runs], options))
        return out / "index.html"

    monkeypatch.setattr("megatron_xalign.launch.run_workers", train)
    monkeypatch.setattr(study.workflows, "is_trained", lambda run: run.name in calls["trained"])
    monkeypatch.setattr(study.workflows, "is_analysed", lambda run: run.name in calls["analysed"])
    monkeypatch.setattr(study.workflows, "analyze", lambda run: calls["analysed"].append(run.name))
    monkeypatch.setattr(study.workflows, "report", report)
    return calls


def test_runs_are_the_product_of_fractions_seeds_and_controls(config: Path) -> None:
    plan = plan_study(config)
    assert [run.name for run in plan.runs] == NAMES
    for run in plan.runs:
        assert run.config.seed == run.config.data.mixture.seed == run.seed
        assert run.config.data.mixture.parallel_fraction == run.fraction
        assert run.config.training.train_steps == 20
        assert Path(run.config.output_dir) == plan.out / "runs" / run.name
        shuffled = run.control == "shuffled"
        assert run.config.data.mixture.pairing == ("shuffled" if shuffled else "aligned")
        assert run.config.data.sources[2].prefix == ("tokens/shuffled" if shuffled else "tokens/pairs")


def test_seeds_may_be_of_weights_alone(config: Path) -> None:
    seeds = {run.config.data.mixture.seed for run in plan_study(config, ["seeds_of=weights"]).runs}
    assert seeds == {RunConfig().data.mixture.seed}


def test_everything_is_done_once_and_every_run_can_be_run_alone(config: Path, done: dict[str, list[Any]]) -> None:
    plan = plan_study(config)
    state = run_study(plan)
    assert done["trained"] == done["analysed"] == NAMES
    runs, options = done["reports"][0]
    assert runs == NAMES and options["missing"] == {} and options["controls"] == {"p0.2-shuffled-s1": "shuffled"}
    assert {entry["state"] for entry in state["runs"].values()} == {"done"}
    assert json.loads((plan.out / "study.json").read_text()) == state
    for run in plan.runs:
        assert read_config(run.config_path, (), RunConfig) == run.config
    run_study(plan)
    assert done["trained"] == done["analysed"] == NAMES  # nothing was done again


def test_a_run_that_fails_is_told_and_the_others_go_on(
    config: Path, done: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    done["failing"] = ["p0.05-s1"]
    assert main("study", [str(config)]) == 1
    runs, options = done["reports"][0]
    assert runs == [name for name in NAMES if name != "p0.05-s1"]
    assert options["missing"] == {"p0.05-s1": "worker 0 of p0.05-s1 was killed"}
    told = capsys.readouterr().out
    assert "failed: worker 0 of p0.05-s1 was killed" in told and "1 of 7 runs failed" in told
    done["failing"], done["trained"] = [], [name for name in NAMES if name != "p0.05-s1"]
    assert main("study", [str(config), "--json"]) == 0
    assert {entry["state"] for entry in json.loads(capsys.readouterr().out)["runs"].values()} == {"done"}


def test_being_stopped_stops_the_study(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(arguments: list[str], processes: int) -> None:
        raise StoppedEarly("time is up.")

    monkeypatch.setattr("megatron_xalign.launch.run_workers", stop)
    with pytest.raises(StoppedEarly):
        run_study(plan_study(config))
    states = [entry["state"] for entry in read_study(plan_study(config))["runs"].values()]
    assert states == ["running", *["planned"] * 6]


def test_one_run_of_a_cluster_touches_no_other(config: Path, done: dict[str, list[Any]]) -> None:
    plan = plan_study(config)
    state = run_study(plan, ["p0-s2"])
    assert done["trained"] == done["analysed"] == ["p0-s2"] and done["reports"] == []
    assert [entry["state"] for entry in state["runs"].values()].count("planned") == 6
    state = run_study(plan, train=False)
    assert done["trained"] == ["p0-s2"] and done["reports"][0][0] == ["p0-s2"]
    assert set(done["reports"][0][1]["missing"]) == set(NAMES) - {"p0-s2"}


def test_a_dry_run_touches_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(config.parent.rglob("*"))
    assert main("study", [str(config), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in NAMES) and "7 runs" in told
    assert sorted(config.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fractions=[0, 1.2]", "1.2 is outside"),
        ("seeds=[1, 1]", "none of them twice"),
        ("controls.shuffled.fractions=[0.3]", r"controls\.shuffled\.fractions=\[0\.3\] are not among"),
        ("overrides=[trainin.steps=3]", "run p0-s1 of .*unknown setting trainin"),
        ("overrides=[capture=null]", "has no capture section"),
        ("overrides=[data.probe=null]", r"has no data\.probe"),
        ("nproc_per_node=0", "must be positive"),
        ("run=nowhere.yaml", r"nowhere\.yaml does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_work_starts(config: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_study(config, [override])


def test_an_unknown_run_is_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run p9; it has p0-s1, "):
        run_study(plan_study(config), ["p9"])


SLURM = "slurm={account: A, nodes: 2, time_limit: '2:00:00', prefix: env X=1, setup: [module load python]}"


def test_a_study_becomes_jobs_and_a_last_one_that_waits_for_them(
    config: Path, done: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[str, str]] = []

    def submit(script: str, path: Path) -> str:
        taken.append((path.name, script))
        return str(100 + len(taken))

    monkeypatch.setattr("megatron_xalign.job_script.submit", submit)
    done["trained"] = ["p0-s1"]
    arguments = [
        str(config), "--set", SLURM, "--set", "nproc_per_node=4", "--submit",
        "--set", "overrides=[training.train_steps=20, training.micro_batch_size=1]",
    ]
    assert main("study", [*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert taken == [] and shown.count("#!/bin/bash") == 7 and not (config.parent / "out").exists()
    assert main("study", arguments) == 0
    assert capsys.readouterr().out.split() == [str(101 + number) for number in range(7)]
    assert [name for name, _ in taken] == [*(f"{name}.sbatch" for name in NAMES[1:]), "measure.sbatch"]
    first, last = taken[0][1], taken[-1][1]
    assert all(line in first for line in ("#SBATCH --nodes=2", "#SBATCH --time=2:00:00", "module load python"))
    assert "p0.05-s1.yaml" in first and "--nproc-per-node 4" in first and "env X=1" in first
    assert last.splitlines()[:2] == ["#!/bin/bash", "#SBATCH --dependency=afterany:101:102:103:104:105:106"]
    assert f"study {config}" in last and "--no-train" in last and "nproc_per_node=4" in last
    assert done["trained"] == ["p0-s1"]  # nothing was trained here
    assert all(run.config_path.is_file() for run in plan_study(config).runs)


def test_jobs_need_a_slurm_section_and_a_layout_that_fits(config: Path, done: dict[str, list[Any]]) -> None:
    with pytest.raises(ConfigError, match="has no slurm section"):
        study_scripts(plan_study(config))
    with pytest.raises(ConfigError, match=r"run p0-s1 of .*cannot be divided"):
        study_scripts(plan_study(config, ["slurm={nodes: 3}"]))

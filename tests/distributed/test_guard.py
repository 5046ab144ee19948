"""Steps passed over and runs that go back, bit for bit: against runs that were led past those steps by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("guard_job.py")
SKIP, REWIND = {"nonfinite_policy": "skip"}, {"nonfinite_policy": "rewind"}
SPIKE = {"loss_spike_policy": "skip", "loss_spike_deviations": 2.0}
# Four samples a step: 9 is in step 3 and 13 in step 4; checkpoints after steps 2, 4, 6 and 8.
SCENARIOS = [
    {"name": "skip", "training": SKIP, "poisoned": 9},
    {"name": "skipped by hand", "training": {}, "load": "skip/step-000002", "move_on": 1},
    {"name": "skip resumed", "training": SKIP, "poisoned": 9, "load": "skip/step-000004"},
    {"name": "rewind", "training": REWIND, "poisoned": 13},
    {"name": "rewound by hand", "training": {}, "load": "rewind/step-000002", "move_on": 2},
    {"name": "rewind resumed", "training": REWIND, "poisoned": 13, "load": "rewind/step-000004"},
    {"name": "nothing to go back to", "training": REWIND, "poisoned": 1},
    {"name": "spike", "training": SPIKE, "poisoned": 25, "poison": "loss"},
    {"name": "spike ignored", "training": {}, "poisoned": 25, "poison": "loss"},
    {"name": "watched", "training": SKIP | SPIKE},
    {"name": "alone", "training": {}},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = {"folder": str(tmp_path_factory.mktemp("guard")), "scenarios": SCENARIOS}
    result: dict[str, Any] = run_processes(JOB, "run", arguments, timeout_seconds=600)[0]
    return result


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Bad steps on two processes, by scenario: what each saw. Only one of two data-parallel ranks reads the sample."""
    stages = {"pipeline_model_parallel_size": 2}
    scenarios = [
        {"name": "skip dp2", "training": SKIP, "poisoned": 9},
        {"name": "rewind dp2", "training": REWIND, "poisoned": 13},
        {"name": "rewind pp2", "training": REWIND, "poisoned": 13, "parallel": stages, "num_layers": 2},
        {"name": "spike pp2", "training": SPIKE, "poisoned": 25, "poison": "loss", "parallel": stages, "num_layers": 2},
    ]
    arguments = {"folder": str(tmp_path_factory.mktemp("split")), "scenarios": scenarios}
    by_rank = run_processes(JOB, "run", arguments, 2)
    return {scenario["name"]: [found[scenario["name"]] for found in by_rank] for scenario in scenarios}


@pytest.mark.parametrize(
    ("name", "step", "left"), [("skip dp2", 3, [3]), ("rewind dp2", 4, [3, 4]), ("rewind pp2", 4, [3, 4]),
                               ("spike pp2", 7, [7])],
)
def test_all_processes_judge_alike(
    split: dict[str, list[dict[str, Any]]], runs: dict[str, Any], name: str, step: int, left: list[int]
) -> None:
    first, second = split[name]
    for found in (first, second):
        assert found["error"] == "" and found["passed_over"] == [step]
        back = step - len(left)
        assert found["weights"][str(step)] == found["weights"][str(back)] != found["weights"][str(step + 1)]
    assert [line["step"] for line in first["lines"]] == [number for number in range(1, 9) if number not in left]
    if name.endswith("dp2"):
        assert first["weights"] == second["weights"]
        alone = {line["step"]: line["loss"] for line in runs[name.split()[0]]["lines"]}
        assert {line["step"]: line["loss"] for line in first["lines"]} == pytest.approx(alone, abs=1e-6)


def test_a_guard_that_finds_nothing_changes_no_bit(runs: dict[str, Any]) -> None:
    assert runs["watched"]["weights"] == runs["alone"]["weights"]
    assert runs["watched"]["passed_over"] == []
    assert [line["loss"] for line in runs["watched"]["lines"]] == [line["loss"] for line in runs["alone"]["lines"]]


def test_a_skipped_step_leaves_the_weights_and_moves_the_schedule(runs: dict[str, Any]) -> None:
    seen = runs["skip"]
    assert seen["error"] == "" and seen["passed_over"] == [3]
    assert seen["weights"]["3"] == seen["weights"]["2"] != seen["weights"]["4"]
    for step in range(4, 9):
        assert seen["weights"][str(step)] == runs["skipped by hand"]["weights"][str(step)]
    # Of step 3 there is no loss, and its tokens were not trained on.
    assert [line["step"] for line in seen["lines"]] == [1, 2, 4, 5, 6, 7, 8]
    assert seen["lines"][-1]["tokens_by_source"] == {"mono": 7 * 4 * 8}
    assert seen["lines"][-1]["steps_passed_over"] == 1
    assert [line["lr"] for line in seen["lines"]] == [
        line["lr"] for line in runs["alone"]["lines"] if line["step"] != 3
    ]


def test_a_run_goes_back_to_its_checkpoint_and_on_with_later_data(runs: dict[str, Any]) -> None:
    seen = runs["rewind"]
    assert seen["error"] == "" and seen["passed_over"] == [4]
    assert seen["weights"]["4"] == seen["weights"]["2"] != seen["weights"]["3"]
    for step in range(5, 9):
        assert seen["weights"][str(step)] == runs["rewound by hand"]["weights"][str(step)]
    assert [line["step"] for line in seen["lines"]] == [1, 2, 5, 6, 7, 8]
    assert seen["lines"][-1]["tokens_by_source"] == {"mono": 6 * 4 * 8}
    assert seen["saved"] == [f"step-{step:06d}" for step in (2, 4, 6, 8)]


@pytest.mark.parametrize("name", ["skip", "rewind"])
def test_a_run_resumed_after_it_ends_in_the_same_bits_and_counts(runs: dict[str, Any], name: str) -> None:
    resumed = runs[f"{name} resumed"]
    assert resumed["weights"]["8"] == runs[name]["weights"]["8"]
    assert resumed["state"] == runs[name]["state"]


def test_going_back_without_a_checkpoint_is_an_error(runs: dict[str, Any]) -> None:
    assert runs["nothing to go back to"]["error"].startswith("step 1: there is no checkpoint to go back to yet")


def test_a_spike_in_the_loss_is_passed_over(runs: dict[str, Any]) -> None:
    assert runs["spike"]["passed_over"] == [7]
    assert runs["spike"]["weights"]["6"] == runs["spike"]["weights"]["7"] == runs["alone"]["weights"]["6"]
    assert runs["spike"]["lines"][-1]["loss_spikes"] == 1
    losses = {line["step"]: line["loss"] for line in runs["spike ignored"]["lines"]}
    assert losses[7] > losses[6] + 0.5

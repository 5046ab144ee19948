"""The loop's moments, order, stops and files, on one process with a real model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("loop_job.py")
STEP_KEYS = ["consumed_tokens", "grad_norm", "lr", "step"]
LINE_KEYS = sorted([
    *STEP_KEYS, "loss", "loss_by_language", "loss_by_source", "tokens_by_language", "tokens_by_source", "seconds",
    "seconds_left", "tokens_per_second", "memory_gib",
])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result: dict[str, Any] = run_processes(JOB, "examine", {"folder": str(tmp_path_factory.mktemp("loop"))})[0]
    return result


def moments(first: int, last: int, saved: list[int], logged: list[int]) -> list[Any]:
    """What both observers and ``save`` should have seen from step ``first`` to ``last``."""
    events: list[Any] = []
    for step in range(first, last):
        events += [[name, "before_step", step] for name in "ab"]
        keys = LINE_KEYS if step + 1 in logged else STEP_KEYS
        events += [[name, "after_step", step + 1, keys] for name in "ba"]
        if step + 1 in saved:
            events += [["save", step + 1], *([name, "after_save", step + 1, f"step-{step + 1}"] for name in "ab")]
    return [*events, ["b", "close"], ["a", "close"]]


def test_observers_see_every_moment_in_order(runs: dict[str, Any]) -> None:
    assert runs["whole"]["error"] == ""
    assert runs["whole"]["events"] == moments(0, 5, saved=[2, 4, 5], logged=[3, 5])


def test_metrics_have_a_line_per_interval_and_for_the_last_step(runs: dict[str, Any]) -> None:
    lines = runs["whole"]["lines"]
    assert [(line["step"], line["consumed_tokens"]) for line in lines] == [(3, 3 * 4 * 8), (5, 5 * 4 * 8)]
    for line in lines:
        assert sorted(line) == LINE_KEYS
        assert line["loss_by_language"] == {"eng_Latn": pytest.approx(line["loss"])}
        assert line["loss_by_source"] == {"mono": pytest.approx(line["loss"])}
        assert line["tokens_by_source"] == {"mono": line["consumed_tokens"]}
        assert line["seconds"] > 0 and line["tokens_per_second"] > 0
    assert runs["whole"]["returned"] == lines[-1]


def test_samples_are_read_in_order_and_a_resumed_run_reads_on(runs: dict[str, Any]) -> None:
    in_order = [[first, first + 1] for first in range(0, 20, 2)]
    assert runs["whole"]["read"] == in_order
    assert runs["rest"]["read"] == in_order[6:]
    assert runs["rest"]["events"] == moments(3, 5, saved=[4, 5], logged=[5])


def test_a_finished_run_has_nothing_left_to_do(runs: dict[str, Any]) -> None:
    assert runs["nothing left"]["returned"] == {}
    assert runs["nothing left"]["events"] == [["b", "close"], ["a", "close"]]


def test_an_observer_that_raises_stops_the_run_is_named_and_all_are_closed(runs: dict[str, Any]) -> None:
    seen = runs["observer fails"]
    assert seen["error"] == "OSError: no space left"
    assert seen["notes"] == ["raised by Watcher.after_step at step 2, which stopped the run."]
    assert seen["events"][-3:] == [["a", "after_step", 2, STEP_KEYS], ["b", "close"], ["a", "close"]]
    assert ["save", 2] not in seen["events"]


@pytest.mark.parametrize("name", ["not a number", "not a number, unclipped"])
def test_a_gradient_that_is_not_a_number_stops_the_run_before_it_is_saved(runs: dict[str, Any], name: str) -> None:
    seen = runs[name]  # sample 9 is in the third step
    assert seen["error"].startswith("XAlignError: step 3: the gradient norm is nan")
    assert "optimizer.lr" in seen["error"]
    assert [event for event in seen["events"] if event[0] == "save"] == [["save", 2]]
    assert seen["events"][-2:] == [["b", "close"], ["a", "close"]]


def test_without_clipping_the_gradient_norm_is_still_reported(runs: dict[str, Any]) -> None:
    # Both runs take their first step with learning rate zero, and gradients this small are not clipped.
    first, unclipped = runs["whole"]["lines"][0], runs["unclipped"]["lines"][0]
    assert unclipped["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert unclipped["grad_norm"] > 0


def test_a_batch_that_cannot_be_divided_over_ranks_is_refused(runs: dict[str, Any]) -> None:
    said = runs["odd batch"]["error"]
    for part in ("ConfigError", "global_batch_size=6", "micro_batch_size=3", "4 data-parallel ranks", "multiple of 12"):
        assert part in said


def test_a_signal_lets_the_step_end_and_saves(runs: dict[str, Any]) -> None:
    told = runs["told to stop"]
    assert told["error"].startswith("StoppedEarly: stopped after step 3 of 5 because it received SIGUSR1; saved ")
    assert told["events"] == moments(0, 3, saved=[2, 3], logged=[3])


def test_a_run_that_is_out_of_time_saves_after_the_step(runs: dict[str, Any]) -> None:
    late = runs["out of time"]
    assert "after step 1 of 5 because its 1e-06 minutes (training.exit_duration_minutes) are over" in late["error"]
    assert late["events"] == moments(0, 1, saved=[1], logged=[])


def test_a_signal_in_the_last_step_changes_nothing(runs: dict[str, Any]) -> None:
    assert runs["told at the end"]["error"] == ""
    assert runs["told at the end"]["events"] == runs["whole"]["events"]


def test_a_warm_up_as_long_as_the_run_is_refused(runs: dict[str, Any]) -> None:
    said = runs["warm-up too long"]["error"]
    for part in ("ConfigError", "lr_warmup_steps=5", "train_steps=5", "at most 4"):
        assert part in said


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_stays_at_its_peak_and_decays_in_the_last_steps(runs: dict[str, Any], shape: str) -> None:
    left = {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "exponential": lambda done: 2 * 0.5**done - 1,
        "minus_sqrt": lambda done: 1 - math.sqrt(done),
    }[shape]
    expected = [step / 4 for step in range(4)] + [1.0] * 4 + [0.1 + 0.9 * left(step / 4) for step in range(5)]
    assert runs["lr"][f"WSD {shape}"] == pytest.approx(expected)


def test_inverse_square_root_falls_with_the_number_of_steps(runs: dict[str, Any]) -> None:
    expected = [step / 4 for step in range(4)] + [math.sqrt(4 / step) for step in range(4, 13)]
    assert runs["lr"]["inverse-square-root"] == pytest.approx(expected)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_decays_as_written(runs: dict[str, Any], style: str) -> None:
    decay = {
        "cosine": lambda done: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": lambda done: 1.0 - 0.9 * done,
        "constant": lambda done: 1.0,
    }[style]
    expected = [step / 4 for step in range(4)] + [decay((step - 4) / 8) for step in range(4, 13)]
    assert runs["lr"][style] == pytest.approx(expected)


def test_matrices_are_decayed_and_norms_are_not(runs: dict[str, Any]) -> None:
    decayed = {name for name, decay in runs["decay"].items() if decay == 0.25}
    kept = {name for name, decay in runs["decay"].items() if decay == 0.0}
    assert decayed | kept == set(runs["decay"])
    assert kept == {name for name in runs["decay"] if name.endswith("layernorm.weight")}
    assert len(kept) == 3 and len(decayed) == 6

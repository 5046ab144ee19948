"""Judgements of steps by the stated rule; what the loop does with them is in tests/distributed/test_guard.py."""

from __future__ import annotations

import json
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_xalign.config import TrainingConfig
from megatron_xalign.errors import XAlignError
from megatron_xalign.training.guard import LossGuard, build_guard, gradients_are_finite

ALONE: Any = SimpleNamespace(world_size=1)


class Chunk(torch.nn.Module):
    """A model chunk whose gradients lie where Megatron has them."""

    def __init__(self, *gradients: float) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(3)) for _ in gradients)
        for weight, value in zip(self.weights, gradients, strict=True):
            weight.main_grad = torch.tensor([0.0, value, 1.0])


FINE = [Chunk(1.0, -2.0)]


def guard(**settings: Any) -> LossGuard:
    built = build_guard(TrainingConfig(loss_spike_window=4, save_interval_steps=2, **settings), ALONE)
    assert built is not None
    return built


def test_a_run_that_asks_for_nothing_has_no_guard() -> None:
    assert build_guard(TrainingConfig(), ALONE) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_follows_its_policy(bad: float) -> None:
    assert guard(nonfinite_policy="skip").judge(1, bad, FINE) == "skip"
    assert guard(nonfinite_policy="rewind").judge(1, bad, FINE) == "rewind"
    with pytest.raises(XAlignError, match=f"step 7: the loss is {bad}"):
        guard(loss_spike_policy="warn").judge(7, bad, FINE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_found_in_any_chunk(bad: float) -> None:
    assert gradients_are_finite([Chunk(1.0), Chunk(2.0, 3e38)], ALONE)
    assert not gradients_are_finite([Chunk(1.0), Chunk(2.0, bad)], ALONE)
    assert guard(nonfinite_policy="skip").judge(1, 2.0, [Chunk(1.0, bad)]) == "skip"


def test_a_spike_is_what_lies_so_many_deviations_above_the_last_losses() -> None:
    recent = [3.0, 3.2, 2.9, 3.1]
    limit = statistics.fmean(recent) + 6 * statistics.pstdev(recent)
    for loss, verdict in ((limit - 1e-6, "go"), (limit + 1e-6, "skip"), (1.0, "go")):
        watching = guard(loss_spike_policy="skip")
        # The first loss has left the window when the spike comes.
        for step, before in enumerate([99.0, *recent], start=1):
            assert watching.judge(step, before, FINE) == "go"
        assert watching.judge(6, loss, FINE) == verdict


def test_nothing_is_a_spike_before_the_window_is_full_or_for_a_trifle_on_a_flat_curve() -> None:
    watching = guard(loss_spike_policy="skip")
    assert [watching.judge(step, loss, FINE) for step, loss in enumerate([1.0, 50.0, 1.0, 1.0], 1)] == ["go"] * 4
    flat = guard(loss_spike_policy="skip")
    assert [flat.judge(step, loss, FINE) for step, loss in enumerate([2.0] * 4 + [2.011, 2.02], 1)] == ["go"] * 6


def test_a_warning_lets_the_step_be_and_counts_it(caplog: pytest.LogCaptureFixture) -> None:
    watching = guard(loss_spike_policy="warn")
    for step in range(1, 5):
        watching.judge(step, 2.0, FINE)
    assert watching.judge(5, 9.0, FINE) == "go"
    assert watching.counts() == {"steps_passed_over": 0, "loss_spikes": 1}
    assert "step 5: the loss 9.0000 is" in caplog.text and "mean 2.0000 of the last 4 steps" in caplog.text


def test_a_run_that_does_not_recover_stops_and_good_steps_are_a_new_start() -> None:
    watching = guard(nonfinite_policy="skip", max_bad_steps=2)
    nan = float("nan")
    assert [watching.judge(step, nan, FINE) for step in (1, 2)] == ["skip", "skip"]
    for step in (3, 4):
        watching.judge(step, 2.0, FINE)
    assert [watching.judge(step, nan, FINE) for step in (5, 6)] == ["skip", "skip"]
    watching.judge(7, 2.0, FINE)
    with pytest.raises(XAlignError, match="2 steps were passed over before it"):
        watching.judge(8, nan, FINE)


def test_a_resumed_guard_judges_as_the_one_that_went_on() -> None:
    losses = [3.0, 3.2, 2.9, 3.1, 3.05, float("nan"), 3.9, 3.0, 2.8]
    whole, first = (guard(nonfinite_policy="skip", loss_spike_policy="skip") for _ in range(2))
    verdicts = [whole.judge(step, loss, FINE) for step, loss in enumerate(losses, 1)]
    assert verdicts.count("skip") == 2
    before = [first.judge(step, loss, FINE) for step, loss in enumerate(losses[:5], 1)]
    resumed = guard(nonfinite_policy="skip", loss_spike_policy="skip")
    values, arrays = json.loads(json.dumps(first.state()))
    resumed.restore((values, arrays))
    after = [resumed.judge(step, loss, FINE) for step, loss in enumerate(losses[5:], 6)]
    assert before + after == verdicts
    assert resumed.state() == whole.state() and resumed.counts() == whole.counts()

"""What to do with a step whose loss or gradient is not a finite number, or whose loss is far above the last ones'.

A step is judged when its gradients are there and before the weights move. One that is passed over leaves weights and
moments as they are; the learning rate and the data go on, so sample k of the run stays in the step where it is. All
that a judgement depends on is in checkpoints, and it is the same on every process.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_xalign.config import TrainingConfig
from megatron_xalign.errors import XAlignError
from megatron_xalign.topology import ObserverState, Ranks

Verdict = Literal["go", "skip", "rewind"]
"""Move the weights; leave them; or take those of the last checkpoint."""

SMALLEST_DEVIATION = 1e-3
"""Share of the mean that a standard deviation counts at least, so that a flat curve does not make spikes of trifles."""

log = logging.getLogger(__name__)


def build_guard(config: TrainingConfig, ranks: Ranks, *, check_gradients: bool = True) -> LossGuard | None:
    """The guard that a run asks for; None if it asks for none, which costs nothing."""
    if config.nonfinite_policy == "stop" and config.loss_spike_policy == "ignore":
        return None
    return LossGuard(config, ranks, check_gradients=check_gradients)


class LossGuard:
    """Judges every step.

    A loss is a spike if it is more than ``loss_spike_deviations`` standard deviations above the mean of the last
    ``loss_spike_window`` steps' losses, once there are so many. Steps passed over are not among them.

    Args:
        config: policies, and when a run has passed over too much.
        ranks: this process's place.
        check_gradients: whether to look at gradients too; not where the loss is scaled and they may overflow.
    """

    name = "loss_guard"

    def __init__(self, config: TrainingConfig, ranks: Ranks, *, check_gradients: bool = True) -> None:
        self._config, self._ranks = config, ranks
        self._check_gradients = check_gradients and config.nonfinite_policy != "stop"
        self._recent: deque[float] = deque(maxlen=config.loss_spike_window)
        self._good = self._bad = 0
        self._passed_over = self._spikes = 0

    def judge(self, step: int, loss: float, model_chunks: Sequence[Any]) -> Verdict:
        """Say what becomes of a step. Every process calls it with the same loss.

        Args:
            step: the step, counted from 1.
            loss: its mean loss over the global batch.
            model_chunks: the model, with the step's gradients in Megatron's buffers.

        Raises:
            XAlignError: the policy is to stop, or more than ``max_bad_steps`` were passed over.
        """
        config = self._config
        if not math.isfinite(loss):
            return self._act(step, f"the loss is {loss}", config.nonfinite_policy, "nonfinite_policy")
        if self._check_gradients and not gradients_are_finite(model_chunks, self._ranks):
            return self._act(step, "a gradient is not finite", config.nonfinite_policy, "nonfinite_policy")
        spike = self._spike(loss)
        if spike is not None:
            self._spikes += 1
            if config.loss_spike_policy != "warn":
                return self._act(step, spike, config.loss_spike_policy, "loss_spike_policy")
            log.warning("step %d: %s.", step, spike)
        self._recent.append(loss)
        self._good += 1
        if self._good >= config.save_interval_steps:
            self._bad = 0
        return "go"

    def counts(self) -> dict[str, int]:
        """Steps passed over and spikes since the start of the run, for a line of metrics."""
        return {"steps_passed_over": self._passed_over, "loss_spikes": self._spikes}

    def state(self) -> ObserverState:
        """What the next judgement depends on, for a checkpoint."""
        return {
            "recent": list(self._recent), "good": self._good, "bad": self._bad, "passed_over": self._passed_over,
            "spikes": self._spikes,
        }, {}

    def restore(self, state: ObserverState) -> None:
        """Go on from a state."""
        values = state[0]
        self._recent = deque(values["recent"], maxlen=self._config.loss_spike_window)
        self._good, self._bad = values["good"], values["bad"]
        self._passed_over, self._spikes = values["passed_over"], values["spikes"]

    def _spike(self, loss: float) -> str | None:
        window = self._config.loss_spike_window
        if self._config.loss_spike_policy == "ignore" or len(self._recent) < window:
            return None
        mean = math.fsum(self._recent) / window
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in self._recent) / window)
        above = (loss - mean) / max(deviation, SMALLEST_DEVIATION * abs(mean), 1e-12)
        if above <= self._config.loss_spike_deviations:
            return None
        return (
            f"the loss {loss:.4f} is {above:.1f} standard deviations above the mean {mean:.4f} of the last {window} "
            "steps"
        )

    def _act(self, step: int, what: str, policy: str, setting: str) -> Verdict:
        self._good, self._bad = 0, self._bad + 1
        if policy == "stop":
            raise XAlignError(
                f"step {step}: {what}; nothing of this step was saved. Use a lower optimizer.lr and go on from the "
                f"last checkpoint, or let training.{setting} be skip or rewind."
            )
        if self._bad > self._config.max_bad_steps:
            raise XAlignError(
                f"step {step}: {what}, and {self._config.max_bad_steps} steps were passed over before it "
                "(training.max_bad_steps); the run does not recover by itself. Use a lower optimizer.lr, more "
                "optimizer.lr_warmup_steps or an earlier checkpoint."
            )
        self._passed_over += 1
        log.warning("step %d: %s; %s.", step, what, "its update is left out" if policy == "skip" else "going back")
        return "skip" if policy == "skip" else "rewind"


def gradients_are_finite(model_chunks: Sequence[Any], ranks: Ranks) -> bool:
    """Whether every gradient of the whole model is a finite number; the same answer on every process."""
    gradients = [
        parameter.main_grad for chunk in model_chunks for parameter in chunk.parameters() if parameter.requires_grad
    ]
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, float("inf"))])
    verdict = torch.isfinite(largest).all().to(torch.int64).reshape(1)
    if ranks.world_size > 1:
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict.item())

"""AdamW over this rank's share of the model, and the schedule of its learning rate; both are Megatron's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_xalign.config import OptimizerConfig, ParallelConfig
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.training.model import ParamsDtype


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and the scheduler of its learning rate, which step together and are checkpointed together."""

    megatron: Any
    """Megatron's ``MegatronOptimizer``: clipping, float32 main weights, shards of the distributed optimizer."""
    scheduler: Any
    """Megatron's ``OptimizerParamScheduler``; it counts optimizer steps."""
    clip_grad: float
    """Gradient norm above which gradients are scaled down; 0 means never."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.megatron.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Drop what the optimizer holds of the last step's gradients."""
        self.megatron.zero_grad()

    def pass_over(self, schedule_units: int = 1) -> float:
        """Leave the weights as they are and move the learning rate on; returns what it was."""
        lr = self.lr
        self.scheduler.step(increment=schedule_units)
        return lr

    def step(self, schedule_units: int = 1) -> tuple[float, float]:
        """Move the weights by the gradients now in Megatron's buffers, then move the learning rate.

        Args:
            schedule_units: what the schedule counts for this step; see ``batch_sizes.BatchSizes.schedule_units``.

        Returns:
            Norm of the gradient of the whole model before clipping, and the learning rate used.

        Raises:
            XAlignError: the gradient norm is not a finite number. It is the same number on every process, so every
                process raises.
        """
        lr = self.lr
        _, grad_norm, _ = self.megatron.step()
        if not self.clip_grad:
            grad_norm = self.megatron.get_grad_norm()
        grad_norm = float(grad_norm)
        if not math.isfinite(grad_norm):
            raise XAlignError(
                f"the gradient norm is {grad_norm} at learning rate {lr:g}; nothing of this step was saved. Use a "
                "lower optimizer.lr, more optimizer.lr_warmup_steps or a smaller optimizer.clip_grad, and go on from "
                "the last checkpoint."
            )
        self.scheduler.step(increment=schedule_units)
        return grad_norm, lr


def build_optimizer(
    model_chunks: Sequence[Any],
    config: OptimizerConfig,
    *,
    parallel: ParallelConfig,
    params_dtype: ParamsDtype,
    train_steps: int,
    schedule_unit: int = 1,
) -> Optimizer:
    """Build AdamW and its schedule: linear warm-up from zero, then the decay, over ``train_steps``.

    As in Megatron, the first step of a warm-up has learning rate zero, and matrices are decayed while norms are not.
    The kernel is Transformer Engine's or Apex's where installed, else torch's.

    Args:
        model_chunks: what ``build_model`` returned.
        config: learning rate, decay, moments, clipping.
        parallel: whether optimizer state is sharded over data-parallel ranks.
        params_dtype: type of the model's weights; with ``bf16`` the optimizer keeps float32 main weights.
        train_steps: optimizer steps of the whole run; the learning rate ends there.
        schedule_unit: what the schedule counts for one of them; the samples of a full batch where batches grow, so that
            the learning rate is a function of the samples consumed.

    Raises:
        ConfigError: the warm-up is as long as the run, or the installed Megatron-Core lacks a setting.
    """
    # Imported late: the CPU backend must be in place first.
    from megatron.core.optimizer import OptimizerConfig as MegatronConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    if config.lr_warmup_steps >= train_steps:
        raise ConfigError(
            f"optimizer.lr_warmup_steps={config.lr_warmup_steps} leaves nothing of training.train_steps={train_steps}; "
            f"use at most {train_steps - 1} steps of warm-up, or a longer run."
        )
    if config.lr_warmup_steps + config.lr_wsd_decay_steps > train_steps:
        raise ConfigError(
            f"optimizer.lr_wsd_decay_steps={config.lr_wsd_decay_steps} and optimizer.lr_warmup_steps="
            f"{config.lr_warmup_steps} are more than training.train_steps={train_steps}; use at most "
            f"{train_steps - config.lr_warmup_steps} steps of decay."
        )
    settings = {
        "optimizer": "adam",
        "lr": config.lr,
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_eps": config.adam_eps,
        "clip_grad": config.clip_grad,
        "bf16": params_dtype == "bf16",
        "params_dtype": torch.bfloat16 if params_dtype == "bf16" else torch.float32,
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
    }
    unknown = sorted(set(settings) - {item.name for item in dataclasses.fields(MegatronConfig)})
    if unknown:
        raise ConfigError(f"the installed megatron-core has no optimizer setting {', '.join(unknown)}.")
    megatron = get_megatron_optimizer(config=MegatronConfig(**settings), model_chunks=list(model_chunks))
    scheduler = OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps * schedule_unit,
        lr_decay_steps=train_steps * schedule_unit,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_steps * schedule_unit,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_steps * schedule_unit or None,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    return Optimizer(megatron=megatron, scheduler=scheduler, clip_grad=config.clip_grad)

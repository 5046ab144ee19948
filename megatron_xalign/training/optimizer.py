"""AdamW over this rank's share of the model, and the schedule of its learning rate; both are Megatron's."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_xalign.config import Fp16Config, OptimizerConfig, ParallelConfig, ParamsDtype
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.platform import is_cpu
from megatron_xalign.training import precision
from megatron_xalign.training.backends import Choice, use_optimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and the scheduler of its learning rate, which step together and are checkpointed together."""

    megatron: Any
    """Megatron's ``MegatronOptimizer``: clipping, float32 main weights, shards of the distributed optimizer."""
    scheduler: Any
    """Megatron's ``OptimizerParamScheduler``; it counts optimizer steps."""
    clip_grad: float
    """Gradient norm above which gradients are scaled down; 0 means never."""
    fp16: Fp16Config | None = None
    """How the loss is scaled; None where it is not."""

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

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next step is multiplied by; None where it is not scaled."""
        return None if self.fp16 is None else float(self.megatron.get_loss_scale())

    def step(self, schedule_units: int = 1) -> tuple[float | None, float]:
        """Move the weights by the gradients now in Megatron's buffers, then move the learning rate.

        Args:
            schedule_units: what the schedule counts for this step; see ``batch_sizes.BatchSizes.schedule_units``.

        Returns:
            Norm of the gradient of the whole model before clipping, and the learning rate used. The norm is None where
            gradients overflowed in fp16: the weights then stay, and the scale of the loss is lowered.

        Raises:
            XAlignError: the gradient norm is not a finite number, or gradients overflow at the lowest loss scale. It
                is the same on every process, so every process raises.
        """
        lr = self.lr
        scale = self.loss_scale
        stepped, grad_norm, _ = self.megatron.step()
        if scale is not None and not stepped:
            assert self.fp16 is not None
            if self.fp16.loss_scale is None and scale <= self.fp16.min_loss_scale:
                raise XAlignError(
                    f"gradients overflow fp16 even at the lowest loss scale, {scale:g}, at learning rate {lr:g}; "
                    "nothing of this step was saved. Use a lower optimizer.lr or precision: bf16, and go on from the "
                    "last checkpoint."
                )
            log.info("gradients overflowed at loss scale %g; this step moves no weight.", scale)
            return None, lr
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
    fp16: Fp16Config | None = None,
    choice: Choice | None = None,
) -> Optimizer:
    """Build AdamW and its schedule: linear warm-up from zero, then the decay, over ``train_steps``.

    As in Megatron, the first step of a warm-up has learning rate zero, and matrices are decayed while norms are not.

    Args:
        model_chunks: what ``build_model`` returned.
        config: learning rate, decay, moments, clipping.
        parallel: whether optimizer state is sharded over data-parallel ranks.
        params_dtype: type of the model's weights; with ``bf16`` and ``fp16`` the optimizer keeps float32 main weights.
        train_steps: optimizer steps of the whole run; the learning rate ends there.
        schedule_unit: what the schedule counts for one of them; the samples of a full batch where batches grow, so that
            the learning rate is a function of the samples consumed.
        fp16: how the loss is scaled with ``fp16``; the defaults if left out.
        choice: whose kernel, as ``backends.choose`` found; left out, the one Megatron takes: Transformer Engine's or
            apex's where installed, else torch's.

    Raises:
        ConfigError: the warm-up is as long as the run, or the installed Megatron-Core lacks a setting.
    """
    # Imported late: the CPU backend must be in place first.
    from megatron.core.optimizer import OptimizerConfig as MegatronConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.utils import get_model_config

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
        "fp16": params_dtype == "fp16",
        "params_dtype": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[params_dtype],
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
    }
    if choice is not None:
        use_optimizer(choice)
        settings |= precision.optimizer_settings(choice.fp8 if choice.layers == "te" else None)
    scaled = (fp16 or Fp16Config()) if params_dtype == "fp16" else None
    if scaled is not None:
        settings |= dataclasses.asdict(scaled)
    unknown = sorted(set(settings) - {item.name for item in dataclasses.fields(MegatronConfig)})
    if unknown:
        raise ConfigError(f"the installed megatron-core has no optimizer setting {', '.join(unknown)}.")
    megatron = get_megatron_optimizer(config=MegatronConfig(**settings), model_chunks=list(model_chunks))
    if is_cpu():
        for group in megatron.param_groups:
            # torch's AdamW in one pass over each tensor. It is in checkpoints: a run goes on as it began.
            group["fused"] = True
    if scaled is not None:
        for chunk in model_chunks:
            # Megatron's schedules multiply the loss by it before the backward pass.
            get_model_config(chunk).grad_scale_func = megatron.scale_loss
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
    return Optimizer(megatron=megatron, scheduler=scheduler, clip_grad=config.clip_grad, fp16=scaled)

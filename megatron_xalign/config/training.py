"""How weights move, how long, and in what batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_xalign.config.checks import require


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and decay; norms and biases are not decayed."""

    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float = 2e-4
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after warm-up; ``WSD`` stays at ``lr`` and decays in the last ``lr_wsd_decay_steps``."""
    lr_wsd_decay_steps: int = 0
    """Steps of the decay at the end of a ``WSD`` schedule."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of that decay."""
    lr_warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr={self.lr} must be positive.")
        require(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} is outside [0, lr={self.lr}].")
        require(self.lr_warmup_steps >= 0, f"lr_warmup_steps={self.lr_warmup_steps} is negative.")
        require(
            (self.lr_wsd_decay_steps > 0) == (self.lr_decay_style == "WSD"),
            f"lr_wsd_decay_steps={self.lr_wsd_decay_steps} with lr_decay_style={self.lr_decay_style}; WSD needs a "
            "positive number of steps, about a tenth of the run, and other styles none.",
        )
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is negative.")
        require(self.clip_grad >= 0, f"clip_grad={self.clip_grad} is negative; 0 turns clipping off.")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is outside [0, 1).")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and in what batches."""

    train_steps: int = 100
    """Optimizer steps; budget in tokens = steps x global batch x sequence length."""
    global_batch_size: int = 32
    """Samples of one step, over all data-parallel ranks."""
    micro_batch_size: int = 8
    """Samples of one forward pass on one rank."""
    rampup_batch_size: tuple[int, ...] = ()
    """``[start, increment, samples]``: the global batch grows from ``start`` by ``increment`` to ``global_batch_size``
    over the first ``samples`` samples, as Megatron's. The budget stays; the run takes more steps. Empty: constant."""
    load_weights: str | None = None
    """Checkpoint whose weights the run starts from (``xalign convert from-hf``, or another run's); optimizer and data
    start afresh."""
    load_state: str | None = None
    """Checkpoint of another run that this one goes on from, with its optimizer, its place in the data and its steps: a
    longer run, another decay of the learning rate, another mixture from there on."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass to save memory: ``full``, whole layers; ``selective``,
    ``recompute_modules`` of every layer."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)
    """Parts of a layer that ``selective`` computes again; ``layernorm`` needs Transformer Engine."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """``full``: ``uniform`` keeps the input of every ``recompute_num_layers``-th layer; ``block`` computes the first
    ``recompute_num_layers`` layers of every pipeline block again and keeps the others' activations."""
    recompute_num_layers: int = 1
    """See ``recompute_method``."""
    z_loss_coefficient: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator in what is minimised (PaLM: 1e-4); reported losses
    are without it."""
    nonfinite_policy: Literal["stop", "skip", "rewind"] = "stop"
    """What to do when a loss or gradient is not a finite number: stop; leave that step's update out; or go back to the
    weights of the last checkpoint and on with the data after that step."""
    loss_spike_policy: Literal["ignore", "warn", "skip", "rewind", "stop"] = "ignore"
    """What to do when a step's loss is more than ``loss_spike_deviations`` standard deviations above the mean of the
    last ``loss_spike_window`` steps. Anything but ``ignore`` sums the loss over all processes at every step."""
    loss_spike_deviations: float = 6.0
    """See ``loss_spike_policy``."""
    loss_spike_window: int = 100
    """See ``loss_spike_policy``; no step is a spike before that many have been seen."""
    max_bad_steps: int = 10
    """Steps that ``skip`` and ``rewind`` may pass over with no ``save_interval_steps`` good ones in a row between; one
    more stops the run."""
    log_interval_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    save_interval_steps: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 0
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this are kept besides; 0: none."""
    checkpoint_hashes: bool = True
    """Whether SHA-256 of every file is kept and compared before loading; without, sizes only."""
    hf_export_interval_steps: int = 0
    """Export checkpoints of these steps (and the last) to ``hf/step-NNNNNN`` while training goes on; a multiple of
    ``save_interval_steps``. 0: never."""
    async_save: bool = False
    """Whether training goes on while a checkpoint is written, from a copy of the state in main memory."""
    allow_changed_data: bool = False
    """Whether a run may go on with other token files than it began with; its samples are then others from there on."""
    exit_duration_minutes: float = 0.0
    """Save and exit with code 75 after the step in which the run is this old; 0 is never. For queues with a time
    limit; SIGTERM and SIGUSR1 do the same at once."""
    eval_interval_steps: int = 0
    """Steps between measurements of the loss on the validation documents of ``data.split``; step 0 and the last step
    are always measured. 0: never."""
    eval_samples_per_source: int = 64
    """Validation samples of each source; the same ones every time."""

    def __post_init__(self) -> None:
        for name in (
            "train_steps", "global_batch_size", "micro_batch_size", "log_interval_steps", "save_interval_steps",
            "recompute_num_layers", "loss_spike_deviations", "max_bad_steps",
        ):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(self.keep_checkpoints >= 0, f"keep_checkpoints={self.keep_checkpoints} is negative; 0 keeps all.")
        require(
            self.hf_export_interval_steps >= 0 and self.hf_export_interval_steps % self.save_interval_steps == 0,
            f"hf_export_interval_steps={self.hf_export_interval_steps} is not a multiple of save_interval_steps="
            f"{self.save_interval_steps}; only saved steps can be exported.",
        )
        require(self.keep_every_steps >= 0, f"keep_every_steps={self.keep_every_steps} is negative; 0 is none.")
        require(
            self.exit_duration_minutes >= 0,
            f"exit_duration_minutes={self.exit_duration_minutes} is negative; 0 is never.",
        )
        require(
            self.eval_interval_steps >= 0, f"eval_interval_steps={self.eval_interval_steps} is negative; 0 is never."
        )
        require(
            self.eval_samples_per_source > 0,
            f"eval_samples_per_source={self.eval_samples_per_source} must be positive.",
        )
        require(
            self.load_weights is None or self.load_state is None,
            f"load_weights={self.load_weights} and load_state={self.load_state}: a run begins with one of them.",
        )
        if self.rampup_batch_size:
            self._check_rampup()
        require(self.z_loss_coefficient >= 0, f"z_loss_coefficient={self.z_loss_coefficient} is negative; 0 is none.")
        require(
            self.loss_spike_window > 1,
            f"loss_spike_window={self.loss_spike_window} steps have no deviation; use 2 or more.",
        )
        require(
            self.recompute != "selective" or bool(self.recompute_modules),
            "recompute_modules is empty with recompute=selective; name core_attn, mlp or layernorm.",
        )
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"global_batch_size={self.global_batch_size} is not divisible by "
            f"micro_batch_size={self.micro_batch_size}.",
        )


    def _check_rampup(self) -> None:
        given = f"rampup_batch_size={list(self.rampup_batch_size)}"
        require(
            len(self.rampup_batch_size) == 3 and min(self.rampup_batch_size) > 0,
            f"{given} should be three positive numbers: the first batch size, its increment, and the samples it takes "
            "to grow.",
        )
        start, increment, _ = self.rampup_batch_size
        require(
            start <= self.global_batch_size and (self.global_batch_size - start) % increment == 0,
            f"{given} does not reach global_batch_size={self.global_batch_size} from {start} in steps of {increment}.",
        )

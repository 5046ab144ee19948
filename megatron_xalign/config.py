"""Every knob of a training run as a frozen dataclass; YAML in, YAML out, overrides from the command line.

Precedence: field default, then YAML, then ``--set path.to.key=value``. An unknown key is an error that
names the nearest known one; so is a value of the wrong type. Field names are Megatron's where Megatron
has the thing.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_xalign.config_tree import ConfigType, apply_override, from_tree, read_yaml
from megatron_xalign.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: rotary positions, SwiGLU (Megatron's ``GPTModel``)."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 192
    """Width of the residual stream."""
    ffn_hidden_size: int = 512
    """Width of the SwiGLU MLP after the gate; one neuron is one of these coordinates."""
    num_attention_heads: int = 6
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: int | None = None
    """Width of one attention head; default: ``hidden_size`` over ``num_attention_heads``."""
    qk_layernorm: bool = False
    """Normalise every query and key head before the rotary positions (Qwen3)."""
    add_qkv_bias: bool = False
    """Biases of query, key and value projections (Qwen2); nothing else has a bias."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """``RMSNorm`` with a weight (Llama) or ``LayerNorm`` without weight and bias (OLMo, the study's model)."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance inside the norm."""
    rotary_base: int = 10_000
    """Base of the rotary position frequencies."""
    rope_scaling_factor: float | None = None
    """Stretch low rotary frequencies by this, for contexts beyond 8,192 tokens (Llama 3.1); none if left out."""
    untie_embeddings_and_output_weights: bool = True
    """Whether input embedding and output projection are two matrices."""
    init_method: Literal["scaled", "mitchell"] = "scaled"
    """Initial matrices: ``scaled``, normal with ``init_method_std``, a layer's outputs with that over sqrt(2 *
    num_layers), as Megatron's; ``mitchell``, OLMo's: normal cut at 3 deviations of 1 / sqrt(inputs), the outputs of
    layer n with that over sqrt(2 * n)."""
    init_method_std: float = 0.02
    """Standard deviation of the ``scaled`` initialisation."""
    vocab_size: int | None = None
    """Ids the model has; default: as many as the tokenizer. Imported models may have more."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size, as Megatron pads it."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "rotary_base"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        _require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
            "change one of them or set kv_channels.",
        )
        _require(
            self.head_size > 0 and self.head_size % 2 == 0,
            f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads} and kv_channels="
            f"{self.kv_channels} give heads {self.head_size} wide; rotary positions need an even, positive width.",
        )
        _require(
            not (self.normalization == "LayerNorm" and (self.qk_layernorm or self.add_qkv_bias)),
            "normalization=LayerNorm (OLMo) goes without qk_layernorm and add_qkv_bias; no known model has both.",
        )
        _require(
            self.vocab_size is None or self.vocab_size > 0, f"vocab_size={self.vocab_size} must be positive."
        )
        _require(
            self.rope_scaling_factor is None or self.rope_scaling_factor >= 1.0,
            f"rope_scaling_factor={self.rope_scaling_factor} is below 1.",
        )
        _require(
            self.num_query_groups is None
            or (self.num_query_groups > 0 and self.num_attention_heads % self.num_query_groups == 0),
            f"num_attention_heads={self.num_attention_heads} is not divisible by "
            f"num_query_groups={self.num_query_groups}.",
        )
        _require(self.init_method_std > 0, f"init_method_std={self.init_method_std} must be positive.")
        _require(
            self.make_vocab_size_divisible_by > 0,
            f"make_vocab_size_divisible_by={self.make_vocab_size_divisible_by} must be positive.",
        )

    @property
    def query_groups(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is laid over processes; what is left of the world size is data-parallel."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Processes that hold consecutive blocks of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Blocks of layers each of those holds instead of one (interleaved schedule); Megatron-LM's
    ``--num-layers-per-virtual-pipeline-stage`` is ``num_layers`` over pipeline size over this."""
    context_parallel_size: int = 1
    """Processes that share every sequence; each holds two of its ``2 * context_parallel_size`` chunks."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence inside a tensor-parallel group."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    use_megatron_fsdp: bool = False
    """Not supported; here so that asking for it is answered."""
    distributed_timeout_seconds: int = 300
    """How long a collective may wait for a rank before the job stops."""
    heartbeat_interval_seconds: float = 5.0
    """How often every process says where it is, so that one that hangs or falls behind by four fifths of
    ``distributed_timeout_seconds`` is named when the job ends; 0 turns that off."""

    def __post_init__(self) -> None:
        _require(
            self.heartbeat_interval_seconds >= 0,
            f"heartbeat_interval_seconds={self.heartbeat_interval_seconds} is negative; 0 turns it off.",
        )
        for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
            "distributed_timeout_seconds",
        ):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        _require(
            not self.use_megatron_fsdp,
            "use_megatron_fsdp=true is not supported: Megatron-FSDP writes checkpoints of its own (fsdp_dtensor), "
            "which no other layout could go on from and no converter here reads. use_distributed_optimizer=true shards "
            "optimizer state, tensor_model_parallel_size and pipeline_model_parallel_size the model; --dry-run says "
            "what a process then needs.",
        )
        virtual = self.virtual_pipeline_model_parallel_size
        _require(
            virtual is None or (virtual > 1 and self.pipeline_model_parallel_size > 1),
            f"virtual_pipeline_model_parallel_size={virtual} with pipeline_model_parallel_size="
            f"{self.pipeline_model_parallel_size}; an interleaved pipeline needs at least 2 of both. Leave it out for "
            "one block of layers a stage.",
        )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel=true needs tensor_model_parallel_size above 1.",
        )

    @property
    def model_parallel_size(self) -> int:
        """Processes one copy of the model needs."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_size(self) -> int:
        """Blocks of layers each pipeline stage holds."""
        return self.virtual_pipeline_model_parallel_size or 1


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
        _require(self.lr > 0, f"lr={self.lr} must be positive.")
        _require(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} is outside [0, lr={self.lr}].")
        _require(self.lr_warmup_steps >= 0, f"lr_warmup_steps={self.lr_warmup_steps} is negative.")
        _require(
            (self.lr_wsd_decay_steps > 0) == (self.lr_decay_style == "WSD"),
            f"lr_wsd_decay_steps={self.lr_wsd_decay_steps} with lr_decay_style={self.lr_decay_style}; WSD needs a "
            "positive number of steps, about a tenth of the run, and other styles none.",
        )
        _require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is negative.")
        _require(self.clip_grad >= 0, f"clip_grad={self.clip_grad} is negative; 0 turns clipping off.")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is outside [0, 1).")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One token file of the mixture."""

    prefix: str
    """Path without ``.bin``/``.idx``; origin and languages come from the manifest beside it."""
    max_repeats: float = 1.0
    """How often its text may be seen; more is asked for here, never silent."""
    language: str | None = None
    """Language of a file that Megatron wrote, which has no manifest; left out for files of ``xalign preprocess``."""

    def __post_init__(self) -> None:
        _require(bool(self.prefix), "prefix is empty; it is the path of a token file without its ending.")
        _require(
            math.isfinite(self.max_repeats) and self.max_repeats > 0,
            f"max_repeats={self.max_repeats} must be positive and finite.",
        )
        _require(self.language is None or bool(self.language), "language is empty; leave it out or write fin_Latn.")


@dataclass(frozen=True, kw_only=True)
class SchedulePhase:
    """One stretch of a schedule of the parallel fraction; it begins where the one before ends."""

    until_tokens: int
    """Tokens of the run (samples x ``data.seq_length``) at which it ends."""
    parallel_fraction: float
    """The fraction in it, or at its beginning where ``to`` is given."""
    to: float | None = None
    """The fraction at its end; it changes in a straight line, in tokens."""

    def __post_init__(self) -> None:
        _require(self.until_tokens > 0, f"until_tokens={self.until_tokens} must be positive.")
        for name, value in (("parallel_fraction", self.parallel_fraction), ("to", self.to)):
            _require(
                value is None or (math.isfinite(value) and 0.0 <= value <= 1.0),
                f"{name}={value} is outside [0, 1]; five percent is written 0.05.",
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How the training budget is split between monolingual and parallel text (docs/mixture.md)."""

    parallel_fraction: float = 0.0
    """Share of the tokens trained on that come from parallel documents, in [0, 1]."""
    schedule: tuple[SchedulePhase, ...] = ()
    """The fraction as it changes over the run, instead of ``parallel_fraction``; the last value holds to the end."""
    fraction_of: Literal["content", "all"] = "content"
    """Which tokens the share counts: ``content`` leaves out end-of-document and template tokens, ``all`` counts all."""
    languages: dict[str, float] = field(default_factory=dict)
    """Share of the content tokens per language, parallel tokens included; empty means equal shares of the languages
    with monolingual text."""
    budget_rule: Literal["replace", "add"] = "replace"
    """``replace``: parallel tokens take the place of monolingual ones; ``add``: the monolingual budget stays."""
    pairing: Literal["aligned", "shuffled", "separated"] = "aligned"
    """How parallel token files were made (``xalign preprocess --pairing``): the translation next to its source, next to
    another one of similar length, or as a document of its own. A file made otherwise is an error."""
    packing: Literal["source_windows", "mixed_documents"] = "source_windows"
    """A sample is a window of one source, as in Megatron; or documents of all sources one behind the other."""
    keep_pairs_whole: bool = False
    """Whether every parallel document stays inside one sample; what that leaves empty is padding without loss."""
    seed: int = 1234
    """Order of documents, windows and batches; share it between runs that are to be compared."""

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.parallel_fraction) and 0.0 <= self.parallel_fraction <= 1.0,
            f"parallel_fraction={self.parallel_fraction} is outside [0, 1]; five percent is written 0.05.",
        )
        _require(
            self.budget_rule == "replace" or self.parallel_fraction < 1.0,
            "parallel_fraction=1.0 with budget_rule=add has no monolingual budget to add to; use replace.",
        )
        if self.schedule:
            self._check_schedule()
        _require(self.seed >= 0, f"seed={self.seed} is negative.")
        if self.languages:
            for language, share in self.languages.items():
                _require(
                    math.isfinite(share) and 0.0 < share <= 1.0, f"languages.{language}={share} is outside (0, 1]."
                )
            total = math.fsum(self.languages.values())
            _require(
                abs(total - 1.0) < 1e-6,
                f"languages shares {dict(self.languages)} add up to {total:g}; they must add up to 1.",
            )

    def mean_fraction(self, tokens: int) -> float:
        """The fraction that is asked for, on average over the first ``tokens`` of a run."""
        total, begin = Fraction(0), 0
        held = Fraction(self.parallel_fraction)
        for phase in self.schedule:
            first = Fraction(phase.parallel_fraction)
            held = first if phase.to is None else Fraction(phase.to)
            end = min(phase.until_tokens, tokens)
            if end <= begin:
                break
            at_end = first + (held - first) * Fraction(end - begin, phase.until_tokens - begin)
            total += (first + at_end) / 2 * (end - begin)
            begin = end
        return float((total + held * (tokens - begin)) / tokens)

    def _check_schedule(self) -> None:
        _require(
            self.parallel_fraction == 0.0,
            f"parallel_fraction={self.parallel_fraction} and schedule both say what the fraction is; leave one out.",
        )
        before = 0
        for index, phase in enumerate(self.schedule):
            _require(
                phase.until_tokens > before,
                f"schedule.{index}.until_tokens={phase.until_tokens:,} is not after {before:,}, where it begins.",
            )
            before = phase.until_tokens
        last = self.schedule[-1]
        held = last.parallel_fraction if last.to is None else last.to
        _require(
            self.budget_rule == "replace" or held < 1.0,
            f"schedule ends at {held:g}, which holds to the end of the run, and budget_rule=add would never reach its "
            "monolingual budget; use replace, or end below 1.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    tokenizer: str = ""
    """Folder with ``tokenizer.json`` and ``manifest.json``, as ``xalign tokenizer train`` writes it."""
    sources: tuple[SourceConfig, ...] = ()
    """Token files of the mixture."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How they are mixed."""
    seq_length: int = 256
    """Tokens of one sample."""
    split: str = "100,0,0"
    """Documents of every source for training, validation and test, as proportions in Megatron's notation."""
    reset_position_ids: bool = False
    """Whether positions start again at every document of a sample."""
    reset_attention_mask: bool = False
    """Whether tokens attend to tokens of their own document only."""
    eod_mask_loss: bool = False
    """Whether what follows an end-of-document token bears no loss."""
    index_cache_dir: str = ""
    """Folder for index files that runs share; empty: the user's cache folder; ``none``: nothing is kept."""
    num_workers: int = 0
    """Processes of each rank that read samples ahead; 0 reads when asked, fast enough from a local disk."""
    prefetch_factor: int = 2
    """Micro-batches each of them keeps ready."""
    probe: str | None = None
    """JSON lines of held-out translations (``{"id", "texts": {language: text}}``), for capture."""

    def __post_init__(self) -> None:
        _require(self.num_workers >= 0, f"num_workers={self.num_workers} is negative; 0 reads in the process itself.")
        _require(self.prefetch_factor > 0, f"prefetch_factor={self.prefetch_factor} must be positive.")
        _require(0 < self.seq_length < 1 << 31, f"seq_length={self.seq_length} is outside 1..2147483647.")
        parts = self.split_parts
        _require(
            len(parts) == 3 and min(parts) >= 0 and parts[0] > 0,
            f"split={self.split!r} should be three proportions, for training, validation and test, the first above 0: "
            "98,1,1.",
        )

    @property
    def split_parts(self) -> tuple[Fraction, ...]:
        """``split`` as exact numbers; empty where it is not a list of numbers."""
        try:
            return tuple(Fraction(part.strip()) for part in self.split.split(","))
        except (ValueError, ZeroDivisionError):
            return ()


FP8_MULTIPLE_OF = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""What both axes of a matrix must be a multiple of for each FP8 recipe."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix products of transformer layers in 8-bit floating point; everything else as in bf16 (docs/precision.md)."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How a tensor's scale is found: ``delayed`` from the largest values of past steps, ``tensorwise`` from the tensor
    itself, ``blockwise`` for blocks of 128, ``mxfp8`` for blocks of 32 (Blackwell)."""
    format: Literal["e4m3", "hybrid"] = "hybrid"
    """``hybrid`` gives gradients the wider range of E5M2; ``e4m3`` uses E4M3 for everything."""
    margin: int = 0
    """``delayed``: scales are divided by two to this power, room for values larger than any seen."""
    amax_history_len: int = 1024
    """``delayed``: how many past steps count."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """``delayed``: which of them gives the scale."""
    first_last_layers_bf16: bool = False
    """Whether the first and the last layers stay in bf16, which is where FP8 hurts most."""
    num_layers_at_start_in_bf16: int = 1
    """How many of the first ones."""
    num_layers_at_end_in_bf16: int = 1
    """How many of the last ones."""
    param_gather: bool = False
    """Keep weights in FP8 and gather them so from the distributed optimizer, which holds float32 main weights."""

    def __post_init__(self) -> None:
        _require(0 <= self.margin <= 16, f"margin={self.margin} is outside 0..16; it is a power of two.")
        _require(self.amax_history_len > 0, f"amax_history_len={self.amax_history_len} must be positive.")
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; 0 keeps none of them.")
        if self.recipe != "delayed":
            for name, default in (("margin", 0), ("amax_history_len", 1024), ("amax_compute_algo", "max")):
                _require(
                    getattr(self, name) == default,
                    f"{name}={getattr(self, name)} belongs to recipe=delayed and does nothing with recipe="
                    f"{self.recipe}; leave it out.",
                )


@dataclass(frozen=True, kw_only=True)
class Fp16Config:
    """Weights and activations in fp16, with a scaled loss: small gradients would vanish otherwise."""

    loss_scale: float | None = None
    """A fixed scale; left out, the scale is halved when gradients overflow and doubled when they have not for long."""
    initial_loss_scale: float = 16.0
    """Scale of the first step. The loss of a micro-batch is a sum over its tokens, so scales are as many times smaller
    as it has tokens than those of a mean."""
    min_loss_scale: float = 2.0**-10
    """The scale is never lowered below this."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the scale is doubled."""
    hysteresis: int = 2
    """Overflows after which it is halved."""

    def __post_init__(self) -> None:
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
            value = getattr(self, name)
            _require(
                value is None or (math.isfinite(value) and value > 0), f"{name}={value} must be positive and finite."
            )
        _require(
            self.min_loss_scale <= self.initial_loss_scale,
            f"min_loss_scale={self.min_loss_scale} is above initial_loss_scale={self.initial_loss_scale}.",
        )
        for name in ("loss_scale_window", "hysteresis"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """A precision with settings of its own: exactly one of the two."""

    fp8: Fp8Config | None = None
    """FP8 matrix products on top of bf16."""
    fp16: Fp16Config | None = None
    """fp16 with these settings of the loss scale; ``precision: fp16`` takes the defaults."""

    def __post_init__(self) -> None:
        _require(
            (self.fp8 is None) != (self.fp16 is None),
            "fp8 and fp16: exactly one of them is a precision, as in precision: {fp8: {recipe: delayed}}; or write one "
            "of the words bf16, fp16, fp32.",
        )


Precision = Literal["bf16", "fp16", "fp32"] | PrecisionConfig
ParamsDtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Whose kernels compute (docs/precision.md). ``auto`` takes the fastest there is; the log says which and why."""

    layers: Literal["auto", "te", "local"] = "auto"
    """Linear layers and norms: Transformer Engine's, or Megatron's own with our norm (``local``)."""
    attention: Literal["auto", "te", "flash", "sdpa", "unfused"] = "auto"
    """Attention: Transformer Engine's, the flash-attn package, torch's scaled dot product, or plain matrix products."""
    optimizer: Literal["auto", "te", "apex", "torch"] = "auto"
    """AdamW's kernel: fused of Transformer Engine or NVIDIA apex, or torch's."""


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
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        _require(self.keep_checkpoints >= 0, f"keep_checkpoints={self.keep_checkpoints} is negative; 0 keeps all.")
        _require(
            self.hf_export_interval_steps >= 0 and self.hf_export_interval_steps % self.save_interval_steps == 0,
            f"hf_export_interval_steps={self.hf_export_interval_steps} is not a multiple of save_interval_steps="
            f"{self.save_interval_steps}; only saved steps can be exported.",
        )
        _require(self.keep_every_steps >= 0, f"keep_every_steps={self.keep_every_steps} is negative; 0 is none.")
        _require(
            self.exit_duration_minutes >= 0,
            f"exit_duration_minutes={self.exit_duration_minutes} is negative; 0 is never.",
        )
        _require(
            self.eval_interval_steps >= 0, f"eval_interval_steps={self.eval_interval_steps} is negative; 0 is never."
        )
        _require(
            self.eval_samples_per_source > 0,
            f"eval_samples_per_source={self.eval_samples_per_source} must be positive.",
        )
        _require(
            self.load_weights is None or self.load_state is None,
            f"load_weights={self.load_weights} and load_state={self.load_state}: a run begins with one of them.",
        )
        if self.rampup_batch_size:
            self._check_rampup()
        _require(self.z_loss_coefficient >= 0, f"z_loss_coefficient={self.z_loss_coefficient} is negative; 0 is none.")
        _require(
            self.loss_spike_window > 1,
            f"loss_spike_window={self.loss_spike_window} steps have no deviation; use 2 or more.",
        )
        _require(
            self.recompute != "selective" or bool(self.recompute_modules),
            "recompute_modules is empty with recompute=selective; name core_attn, mlp or layernorm.",
        )
        _require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"global_batch_size={self.global_batch_size} is not divisible by "
            f"micro_batch_size={self.micro_batch_size}.",
        )


    def _check_rampup(self) -> None:
        given = f"rampup_batch_size={list(self.rampup_batch_size)}"
        _require(
            len(self.rampup_batch_size) == 3 and min(self.rampup_batch_size) > 0,
            f"{given} should be three positive numbers: the first batch size, its increment, and the samples it takes "
            "to grow.",
        )
        start, increment, _ = self.rampup_batch_size
        _require(
            start <= self.global_batch_size and (self.global_batch_size - start) % increment == 0,
            f"{given} does not reach global_batch_size={self.global_batch_size} from {start} in steps of {increment}.",
        )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Tokens that are kept with their text, to see what chosen neurons fire on."""

    neurons: dict[str, tuple[int, ...]]
    """Layer to neurons, both counting from 0: ``{3: [17, 40]}``."""
    tokens_per_language: int = 256
    """Tokens of each language kept of a window, drawn without regard to activations."""
    top: int = 16
    """Tokens of the largest activations kept for each neuron."""
    context_tokens: int = 16
    """Tokens of text kept on either side."""
    seed: int = 1234
    """Of the draw."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_language", "top"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        _require(self.context_tokens >= 0, f"context_tokens={self.context_tokens} is negative.")
        _require(0 <= self.seed < 1 << 32, f"seed={self.seed} is outside 0..4294967295.")
        for layer, neurons in self.neurons.items():
            _require(layer.isdecimal(), f"neurons.{layer}: layers are numbers from 0, such as {{3: [17, 40]}}.")
            _require(
                bool(neurons) and min(neurons) >= 0 and len(set(neurons)) == len(neurons),
                f"neurons.{layer}={list(neurons)} must be different numbers from 0.",
            )
        _require(bool(self.neurons), "neurons={} names no neuron; {3: [17, 40]} names two of layer 3.")

    @property
    def chosen(self) -> list[tuple[int, int]]:
        """(layer, neuron) of each, in order."""
        return sorted((int(layer), neuron) for layer, neurons in self.neurons.items() for neuron in neurons)


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What is recorded of the model's insides while it trains (docs/capture.md)."""

    probe_interval_steps: int = 50
    """Steps between probes (and between files in ``neurons/``); step 0 and the last step are always probed."""
    probe_batch_tokens: int = 4096
    """Padded tokens of one probe forward pass."""
    stream: bool = True
    """Whether per-language neuron sums are taken from the training batches."""
    stream_interval_steps: int = 1
    """Take the sums at every n-th step."""
    layers: tuple[int, ...] | None = None
    """Layers to capture, counting from 0; all if left out."""
    stream_residual: bool = False
    """Whether the stream also sums the residual stream, per language and coordinate."""
    stream_attention: bool = False
    """Whether it also sums what attention adds to the residual stream."""
    sample: SampleConfig | None = None
    """Neurons whose tokens are kept with their text; none if left out."""
    score_pairs: int = 512
    """Probe pairs that scores (``scores.jsonl``) are computed on at every probe; 0: no scores at all."""
    on_error: Literal["stop", "disable"] = "stop"
    """What becomes of the run when capture fails: it stops, or goes on without capture and says so in its log."""
    quantized: bool = False
    """Record neurons as an FP8 product reads them, not as they are before; with FP8 layers of this project only."""

    def __post_init__(self) -> None:
        for name in ("probe_interval_steps", "probe_batch_tokens", "stream_interval_steps"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        _require(self.score_pairs >= 0, f"score_pairs={self.score_pairs} is negative; 0 computes no scores.")
        if self.layers is not None:
            _require(
                bool(self.layers) and min(self.layers) >= 0 and list(self.layers) == sorted(set(self.layers)),
                f"layers={list(self.layers)} must be layer numbers in order, counting from 0, such as [0, 6, 12].",
            )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where the numbers of ``metrics.jsonl`` go besides that file."""

    tensorboard: bool = True
    """Write them to ``tensorboard/`` in the run folder; looking at them takes ``pip install tensorboard``."""
    wandb_project: str | None = None
    """Project of Weights & Biases; none if left out."""
    wandb_mode: Literal["online", "offline"] = "online"
    """``offline`` writes to the run folder, for ``wandb sync`` later; compute nodes often see no network."""
    mlflow_experiment: str | None = None
    """Experiment of MLflow; none if left out."""
    mlflow_tracking_uri: str | None = None
    """MLflow's server; ``MLFLOW_TRACKING_URI``, or else a folder of the run, if left out."""


@dataclass(frozen=True, kw_only=True)
class ObserverConfig:
    """An observer of the user's own; docs/training.md says how one is written."""

    factory: str
    """``FILE.py:NAME`` or ``package.module:NAME``: a class, or a function that returns an observer; called with the
    run (``RunContext``) and the options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments."""

    def __post_init__(self) -> None:
        place, _, name = self.factory.rpartition(":")
        _require(
            bool(place) and name.isidentifier(),
            f"factory={self.factory!r} should be FILE.py:NAME or package.module:NAME.",
        )
        try:
            json.dumps(self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"options={self.options!r} should be of numbers, texts and lists: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str = "run"
    """Shown in logs and reports."""
    output_dir: str = "run"
    """Run folder: config, metrics, checkpoints, neuron statistics."""
    seed: int = 1234
    """Initial weights (and dropout, where there is any)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its layout over processes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights move."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it reads."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long, in what batches."""
    precision: Precision = "fp32"
    """``bf16``, ``fp16`` (both keep fp32 main weights and gradients), ``fp32``, or ``{fp8: {recipe: ...}}``."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    """Whose kernels compute."""
    capture: CaptureConfig | None = None
    """What is watched; nothing if left out."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where its numbers go."""
    observers: tuple[ObserverConfig, ...] = ()
    """What else watches it: observers of the user's own."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "name is empty.")
        _require(self.seed >= 0, f"seed={self.seed} is negative.")
        tensor, pipeline = self.parallel.tensor_model_parallel_size, self.parallel.pipeline_model_parallel_size
        for name, size in (
            ("num_attention_heads", self.model.num_attention_heads),
            ("num_query_groups", self.model.query_groups),
            ("ffn_hidden_size", self.model.ffn_hidden_size),
        ):
            _require(
                size % tensor == 0,
                f"model.{name}={size} is not divisible by parallel.tensor_model_parallel_size={tensor}.",
            )
        virtual, context = self.parallel.virtual_size, self.parallel.context_parallel_size
        _require(
            self.model.num_layers % (pipeline * virtual) == 0,
            f"model.num_layers={self.model.num_layers} is not divisible by "
            f"parallel.pipeline_model_parallel_size={pipeline}"
            + (f" times parallel.virtual_pipeline_model_parallel_size={virtual}." if virtual > 1 else "."),
        )
        captured = self.capture.layers if self.capture is not None else None
        sampled = self.capture.sample.chosen if self.capture is not None and self.capture.sample is not None else []
        for layer, neuron in sampled:
            _require(
                layer in (captured or range(self.model.num_layers)) and neuron < self.model.ffn_hidden_size,
                f"capture.sample.neurons names neuron {neuron} of layer {layer}, which is not captured: layers are "
                f"{list(captured or range(self.model.num_layers))}, neurons 0 to {self.model.ffn_hidden_size - 1}.",
            )
        _require(
            captured is None or captured[-1] < self.model.num_layers,
            f"capture.layers={captured} names layers beyond the {self.model.num_layers} of model.num_layers, which "
            "are counted from 0.",
        )
        _require(
            context == 1 or self.data.seq_length % (2 * context) == 0,
            f"data.seq_length={self.data.seq_length} is not divisible by {2 * context}, twice "
            f"parallel.context_parallel_size={context}: every process holds two chunks of a sequence.",
        )
        _require(
            not self.parallel.sequence_parallel or self.data.seq_length // context % tensor == 0,
            f"data.seq_length={self.data.seq_length}"
            + (f" over parallel.context_parallel_size={context}" if context > 1 else "")
            + f" is not divisible by parallel.tensor_model_parallel_size={tensor}, which sequence_parallel needs.",
        )

    @classmethod
    def from_older(cls, tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """Settings as they are written now; configs of older runs and checkpoints say ``training.params_dtype``."""
        training = tree.get("training")
        if not isinstance(training, Mapping) or "params_dtype" not in training:
            return tree
        older = training["params_dtype"]
        if older not in get_args(ParamsDtype):
            raise ConfigError(
                f"{path}training.params_dtype={older!r} is not one of fp32, bf16, fp16; the setting is called "
                f"{path}precision now."
            )
        if tree.get("precision", older) != older:
            raise ConfigError(
                f"{path}training.params_dtype={older} and {path}precision={tree['precision']} say different things; "
                "leave out the first, which is the older name."
            )
        rest = {key: value for key, value in training.items() if key != "params_dtype"}
        return {**tree, "training": rest, "precision": older}

    @property
    def params_dtype(self) -> ParamsDtype:
        """Type of weights and activations."""
        if isinstance(self.precision, PrecisionConfig):
            return "bf16" if self.precision.fp8 is not None else "fp16"
        return self.precision

    @property
    def fp8(self) -> Fp8Config | None:
        """The FP8 settings; None where matrix products are of the type of weights."""
        return self.precision.fp8 if isinstance(self.precision, PrecisionConfig) else None

    @property
    def precision_name(self) -> str:
        """The precision in a few words: ``bf16``, ``FP8 (delayed, hybrid)``."""
        return self.params_dtype if self.fp8 is None else f"FP8 ({self.fp8.recipe}, {self.fp8.format})"

    @property
    def length_multiple_of(self) -> int:
        """What the padded length of a batch must be a multiple of: whole FP8 blocks on every rank."""
        if self.fp8 is None:
            return 1
        parts = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return FP8_MULTIPLE_OF[self.fp8.recipe] * parts

    @property
    def fp16(self) -> Fp16Config | None:
        """How the loss is scaled; None where it is not fp16."""
        if isinstance(self.precision, PrecisionConfig):
            return self.precision.fp16
        return Fp16Config() if self.precision == "fp16" else None

    @property
    def train_samples(self) -> int:
        """Samples of the whole run."""
        return self.training.train_steps * self.training.global_batch_size

    @property
    def parallel_fraction(self) -> float:
        """The parallel fraction that is asked for; of a schedule, its mean over ``train_tokens``."""
        return self.data.mixture.mean_fraction(self.train_tokens)

    @property
    def train_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train_samples * self.data.seq_length


def read_config(path: str | Path, overrides: Sequence[str] = (), into: type[ConfigType] | None = None) -> ConfigType:
    """Read a YAML file into a config dataclass.

    Args:
        path: the YAML file.
        overrides: ``path.to.key=value`` strings, applied after the file; values are YAML.
        into: the dataclass to build; ``RunConfig`` if left out.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    target: type[Any] = into or RunConfig
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return typing.cast(ConfigType, from_tree(target, tree))

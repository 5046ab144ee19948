"""Megatron-LM's flags and our settings: one table, from which launch scripts are translated and the docs are made.

A flag is carried (it becomes a setting), implied (what it asks for is always so here, or changes no number), or
neither, and then it is named. Where Megatron's default is another than ours, the translation writes Megatron's.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_xalign.config import RunConfig
from megatron_xalign.errors import ConfigError
from megatron_xalign.shell_script import commands_of

MISSING = object()


@dataclass(frozen=True)
class Flag:
    """One flag of Megatron-LM."""

    name: str
    setting: str
    """Dotted path of ours."""
    convert: Callable[[str], Any] = str
    """From the flag's value; ``_true`` for a switch."""
    default: Any = MISSING
    """Megatron's, where it is not ours: written out if the flag is not given."""
    note: str = ""
    """For the docs."""
    many: bool = False
    """Whether it takes several values; the setting is a list of them."""


def _true(value: str) -> bool:
    return True


def _count(text: str) -> int:
    return int(text.replace("_", ""))


def _proportions(text: str) -> str:
    """As Megatron reads them: whatever stands between the numbers, parts that are not named get nothing."""
    numbers = re.findall(r"[.0-9]+", text)
    return ",".join([*numbers, *["0"] * (3 - len(numbers))])


FLAGS = (
    Flag("--num-layers", "model.num_layers", _count),
    Flag("--hidden-size", "model.hidden_size", _count),
    Flag("--ffn-hidden-size", "model.ffn_hidden_size", _count, note="left out: 8/3 of hidden-size, in steps of 64"),
    Flag("--num-attention-heads", "model.num_attention_heads", _count),
    Flag("--num-query-groups", "model.num_query_groups", _count, note="with --group-query-attention"),
    Flag("--kv-channels", "model.kv_channels", _count),
    Flag("--qk-layernorm", "model.qk_layernorm", _true),
    Flag("--add-qkv-bias", "model.add_qkv_bias", _true),
    Flag("--norm-epsilon", "model.layernorm_epsilon", float),
    Flag("--rotary-base", "model.rotary_base", _count),
    Flag("--rope-scaling-factor", "model.rope_scaling_factor", float, note="with --use-rope-scaling"),
    Flag("--untie-embeddings-and-output-weights", "model.untie_embeddings_and_output_weights", _true, False),
    Flag("--init-method-std", "model.init_method_std", float),
    Flag("--vocab-size", "model.vocab_size", _count),
    Flag("--make-vocab-size-divisible-by", "model.make_vocab_size_divisible_by", _count),
    Flag("--tensor-model-parallel-size", "parallel.tensor_model_parallel_size", _count),
    Flag("--pipeline-model-parallel-size", "parallel.pipeline_model_parallel_size", _count),
    Flag("--context-parallel-size", "parallel.context_parallel_size", _count),
    Flag(
        "--num-virtual-stages-per-pipeline-rank", "parallel.virtual_pipeline_model_parallel_size", _count,
        note="--num-layers-per-virtual-pipeline-stage L is layers / (pipeline size x L)",
    ),
    Flag("--sequence-parallel", "parallel.sequence_parallel", _true),
    Flag("--use-distributed-optimizer", "parallel.use_distributed_optimizer", _true),
    Flag("--distributed-timeout-minutes", "parallel.distributed_timeout_seconds", lambda text: 60 * _count(text), 600),
    Flag("--lr", "optimizer.lr", float),
    Flag("--min-lr", "optimizer.min_lr", float, 0.0),
    Flag("--lr-decay-style", "optimizer.lr_decay_style", default="linear"),
    Flag("--lr-warmup-iters", "optimizer.lr_warmup_steps", _count, 0, "also from --lr-warmup-samples and -fraction"),
    Flag("--lr-wsd-decay-iters", "optimizer.lr_wsd_decay_steps", _count),
    Flag("--lr-wsd-decay-style", "optimizer.lr_wsd_decay_style"),
    Flag("--weight-decay", "optimizer.weight_decay", float, 0.01),
    Flag("--adam-beta1", "optimizer.adam_beta1", float, 0.9),
    Flag("--adam-beta2", "optimizer.adam_beta2", float, 0.999),
    Flag("--adam-eps", "optimizer.adam_eps", float, 1e-8),
    Flag("--clip-grad", "optimizer.clip_grad", float, 1.0),
    Flag("--seq-length", "data.seq_length", _count),
    Flag("--split", "data.split", _proportions, "969,30,1"),
    Flag("--reset-position-ids", "data.reset_position_ids", _true),
    Flag("--reset-attention-mask", "data.reset_attention_mask", _true),
    Flag("--eod-mask-loss", "data.eod_mask_loss", _true),
    Flag("--num-workers", "data.num_workers", _count),
    Flag("--data-cache-path", "data.index_cache_dir"),
    Flag("--train-iters", "training.train_steps", _count, note="also from --train-samples"),
    Flag("--global-batch-size", "training.global_batch_size", _count),
    Flag("--micro-batch-size", "training.micro_batch_size", _count),
    Flag("--rampup-batch-size", "training.rampup_batch_size", _count, many=True),
    Flag("--recompute-granularity", "training.recompute", note="`full` or `selective`"),
    Flag("--recompute-activations", "training.recompute", lambda text: "selective", note="`selective`"),
    Flag("--recompute-modules", "training.recompute_modules", many=True),
    Flag("--recompute-method", "training.recompute_method"),
    Flag("--recompute-num-layers", "training.recompute_num_layers", _count),
    Flag("--log-interval", "training.log_interval_steps", _count, 100),
    Flag("--save-interval", "training.save_interval_steps", _count),
    Flag("--save-retain-interval", "training.keep_every_steps", _count),
    Flag("--async-save", "training.async_save", _true),
    Flag("--eval-interval", "training.eval_interval_steps", _count, 1000),
    Flag("--exit-duration-in-mins", "training.exit_duration_minutes", float),
    Flag("--pretrained-checkpoint", "training.load_weights", note="first `xalign convert`, or a checkpoint of ours"),
    Flag("--seed", "seed", _count, 1234, "of weights; data.mixture.seed orders the data"),
    Flag("--save", "output_dir", note="the run folder; --load of the same folder is what the same command does"),
    Flag("--wandb-project", "logging.wandb_project"),
    Flag("--wandb-exp-name", "name"),
    Flag("--bf16", "precision", lambda text: "bf16"),
    Flag("--fp16", "precision", lambda text: "fp16"),
    Flag("--fp8-format", "precision.fp8.format", note="`precision: {fp8: {...}}`, which computes the rest in bf16"),
    Flag("--fp8-recipe", "precision.fp8.recipe"),
    Flag("--fp8-margin", "precision.fp8.margin", _count),
    Flag("--fp8-amax-history-len", "precision.fp8.amax_history_len", _count),
    Flag("--fp8-amax-compute-algo", "precision.fp8.amax_compute_algo"),
    Flag("--first-last-layers-bf16", "precision.fp8.first_last_layers_bf16", _true),
    Flag("--num-layers-at-start-in-bf16", "precision.fp8.num_layers_at_start_in_bf16", _count),
    Flag("--num-layers-at-end-in-bf16", "precision.fp8.num_layers_at_end_in_bf16", _count),
    Flag("--fp8-param-gather", "precision.fp8.param_gather", _true),
)

IMPLIED = {
    "--swiglu": "models are SwiGLU",
    "--disable-bias-linear": "no biases but those of add_qkv_bias",
    "--position-embedding-type": "`rope`",
    "--rotary-percent": "`1.0`",
    "--normalization": "`RMSNorm`, the default",
    "--attention-dropout": "`0`: there is no dropout",
    "--hidden-dropout": "`0`: there is no dropout",
    "--group-query-attention": "follows from num_query_groups",
    "--use-rope-scaling": "follows from rope_scaling_factor",
    "--max-position-embeddings": "rotary positions have no table",
    "--use-mcore-models": "Megatron-Core is what is used",
    "--use-rotary-position-embeddings": "positions are rotary",
    "--no-position-embedding": "positions are rotary",
    "--dataloader-type": "`single` or `cyclic`: sample k of a run is a function of the seed",
    "--tensorboard-dir": "`tensorboard/` in the run folder, always",
    "--load": "a run goes on in its own folder by the same command, from another's by training.load_state",
    "--override-opt_param-scheduler": "training.load_state always takes the schedule of the new run",
    "--ckpt-format": "`torch_dist`",
    "--use-dist-ckpt": "checkpoints are torch_dist",
    "--auto-detect-ckpt-format": "checkpoints are torch_dist",
    "--exit-signal-handler": "SIGTERM and SIGUSR1 save and end with code 75, always",
    "--distributed-backend": "NCCL on GPUs, gloo on CPUs",
    "--optimizer": "`adam`, decoupled decay",
    "--log-throughput": "metrics.jsonl has it always",
    "--log-progress": "metrics.jsonl has it always",
    "--log-params-norm": "not logged; changes no number",
    "--log-timers-to-tensorboard": "changes no number",
    "--log-memory-to-tensorboard": "memory is in metrics.jsonl",
    "--log-validation-ppl-to-tensorboard": "changes no number",
    "--tensorboard-log-interval": "as log_interval_steps",
    "--tensorboard-queue-size": "changes no number",
    "--timing-log-level": "changes no number",
    "--distributed-timeout-seconds-after-init": "one timeout for all collectives",
    "--overlap-grad-reduce": "changes no number",
    "--overlap-param-gather": "changes no number",
    "--attention-softmax-in-fp32": "changes nothing that is on by default",
    "--accumulate-allreduce-grads-in-fp32": "gradients are float32",
    "--no-masked-softmax-fusion": "kernels are chosen by what is there",
    "--no-bias-gelu-fusion": "kernels are chosen by what is there",
    "--no-bias-swiglu-fusion": "kernels are chosen by what is there",
    "--no-rope-fusion": "kernels are chosen by what is there",
    "--no-gradient-accumulation-fusion": "kernels are chosen by what is there",
    "--use-flash-attn": "kernels are chosen by what is there",
    "--attention-backend": "kernels are chosen by what is there",
    "--transformer-impl": "kernels are chosen by what is there",
    "--no-create-attention-mask-in-dataloader": "masks are causal and never built",
    "--manual-gc": "changes no number",
    "--manual-gc-interval": "changes no number",
    "--empty-unused-memory-level": "changes no number",
    "--no-load-optim": "training.load_weights takes weights only",
    "--no-load-rng": "training.load_weights takes weights only",
}
"""Flags that need no setting, and why."""

_HERE_ALWAYS = {"--position-embedding-type": ("rope",), "--normalization": ("RMSNorm",), "--optimizer": ("adam",),
                "--ckpt-format": ("torch_dist",), "--rotary-percent": ("1", "1.0"),
                "--dataloader-type": ("single", "cyclic")}
_NOT_HERE = dict.fromkeys(
    ("--use-megatron-fsdp", "--use-custom-fsdp", "--use-torch-fsdp2"),
    "parameters are not sharded here; parallel.use_distributed_optimizer shards optimizer state, tensor and pipeline "
    "parallelism the model",
) | {"--finetune": "training.load_weights names the checkpoint that a run takes its first weights from"}
"""Flags without a counterpart for which there is something else."""
_SWITCHES = {flag.name for flag in FLAGS if flag.convert is _true} | {"--bf16", "--fp16", "--recompute-activations"}
_RECOMPUTED = ("core_attn", "mlp", "layernorm")
_NUMBERS_OF_NOTHING = ("--attention-dropout", "--hidden-dropout")


@dataclass(frozen=True)
class Translation:
    """A launch script as our settings."""

    tree: dict[str, Any]
    """The settings, as ``config.from_tree`` takes them."""
    left: tuple[str, ...]
    """What was not carried over, each with its reason."""
    processes: str
    """What the script starts, where it says so: ``8 x 4``, processes a node times nodes."""

    def to_yaml(self, source: str) -> str:
        """A YAML file; what was left out and what is still to be said stands at its top."""
        lines = [f"# From the Megatron-LM launch script {source}.", "# Needs: token files with their languages; look "
                 "for EDIT below."]
        lines += ["# Run:   xalign train THIS.yaml --nproc-per-node 8"
                  + (f" (the script starts {self.processes})" if self.processes else "")]
        lines += ["# Vary:  data.mixture."] + ([] if not self.left else ["# Not carried over:"])
        lines += [f"#   {line}" for line in self.left]
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True, width=120)


def translate(script: str, given: Mapping[str, str] | None = None) -> Translation:
    """Turn a Megatron-LM launch script into settings; the script is read and never run.

    Args:
        script: its text.
        given: variables that it takes from outside.

    Raises:
        ConfigError: no command in it has Megatron's flags.
    """
    words, launcher = _find_command(commands_of(script, given))
    arguments = dict(_pair(words))
    settings, left = _settings(arguments)
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        node = tree
        *groups, leaf = path.split(".")
        for group in groups:
            inner = node.setdefault(group, {})
            # Before precision was a group of its own it was a word: FP8 says more.
            node[group] = inner = inner if isinstance(inner, dict) else {}
            node = inner
        if not isinstance(node.get(leaf), dict):
            node[leaf] = value
    return Translation(_ordered(tree), tuple(left), launcher)


def flag_table() -> str:
    """Both tables as Markdown, for the docs."""
    rows = ["| Megatron-LM | here | |", "|---|---|---|"]
    for flag in FLAGS:
        notes = [flag.note] if flag.note else []
        if flag.default is not MISSING:
            notes.append(f"Megatron's default {flag.default} is written out")
        rows.append(f"| `{flag.name}` | `{flag.setting}` | {'; '.join(notes)} |")
    rows += ["", "| needs no setting | why |", "|---|---|"]
    rows += [f"| `{name}` | {why} |" for name, why in IMPLIED.items()]
    return "\n".join(rows) + "\n"


def settings_of(kind: Any, path: str = "") -> set[str]:
    """Dotted paths of all settings of a config dataclass; of groups that may be left out or be a word, too."""
    found = set()
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        found.add(f"{path}{item.name}")
        for choice in (hints[item.name], *typing.get_args(hints[item.name])):
            if dataclasses.is_dataclass(choice):
                found |= settings_of(choice, f"{path}{item.name}.")
    return found


def _exists(setting: str, known: set[str]) -> bool:
    return setting in known


def _find_command(commands: Sequence[Sequence[str]]) -> tuple[list[str], str]:
    """The arguments of the command that trains, and what it starts."""
    for command in reversed(commands):
        words = list(command)
        if any(" " in word and "pretrain_" in word for word in words):  # bash -c "torchrun pretrain_gpt.py ..."
            words = [part for word in words for part in word.split()]
        if "--num-layers" not in words and not any(word.startswith("--num-layers=") for word in words):
            continue
        scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
        first = scripts[0] + 1 if scripts else next(i for i, word in enumerate(words) if word.startswith("--"))
        started = dict(_pair(words[:first])) if scripts else {}
        per_node = _last(started, "--nproc-per-node", "--nproc_per_node")
        nodes = _last(started, "--nnodes", "--nnodes")
        return words[first:], f"{per_node or '?'} x {nodes or 1}" if per_node or nodes else ""
    raise ConfigError(
        "no command with --num-layers was found; import-args reads launch scripts of Megatron-LM's pretrain_gpt.py. "
        "Variables that the script takes from outside are given by --env NAME=VALUE."
    )


def _last(started: Mapping[str, Sequence[str]], *names: str) -> str | None:
    return next((values[0] for name in names if (values := started.get(name))), None)


def _pair(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, separator, value = word.partition("=")
            found.append((name, [value] if separator else []))
        elif found:
            found[-1][1].append(word)
    return found


def _settings(arguments: Mapping[str, list[str]]) -> tuple[dict[str, Any], list[str]]:
    known = settings_of(RunConfig)
    by_name = {flag.name: flag for flag in FLAGS}
    settings: dict[str, Any] = {}
    left: list[str] = []
    derived = _derived(arguments, left)
    for name, values in arguments.items():
        text = " ".join([name, *values]).replace("\u00a0", " ")
        if name in _DERIVED:
            continue
        flag = by_name.get(name)
        unknown = next((value for value in values if "$" in value or "`" in value), None)
        if unknown is not None:
            left.append(f"{text}: only a run of the script could tell; --env NAME=VALUE gives a variable.")
        elif flag is not None:
            _carry(flag, values, text, known, settings, left)
        elif name in IMPLIED:
            allowed = _HERE_ALWAYS.get(name)
            is_zero = name not in _NUMBERS_OF_NOTHING or (values and float(values[0]) == 0)
            if not is_zero or (allowed and (not values or values[0] not in allowed)):
                left.append(f"{text}: here it is always {IMPLIED[name]}.")
        elif name in _NOT_HERE:
            left.append(f"{text}: {_NOT_HERE[name]}.")
        else:
            left.append(f"{text}: has no counterpart here.")
    settings |= {path: value for path, value in derived.items() if _exists(path.split(" ")[0], known)}
    for flag in FLAGS:
        if flag.default is not MISSING and flag.setting not in settings and _exists(flag.setting, known):
            settings[flag.setting] = flag.default
    _expect(arguments, left)
    if any(path.startswith("precision.fp8.") for path in settings):
        settings.pop("precision", None)
    return settings, left


def _carry(
    flag: Flag, values: Sequence[str], text: str, known: set[str], settings: dict[str, Any], left: list[str]
) -> None:
    if flag.many and flag.convert is str:
        # Only what the setting has words for.
        allowed = [word for word in values if word in _RECOMPUTED]
        for word in sorted(set(values) - set(allowed)):
            left.append(f"{flag.name} {word}: here it is {', '.join(_RECOMPUTED)}.")
        settings |= {flag.setting: allowed} if allowed else {}
        return
    if not flag.many and flag.name not in _SWITCHES and len(values) != 1:
        left.append(f"{text}: one value was expected.")
        return
    try:
        value = [flag.convert(item) for item in values] if flag.many else flag.convert(values[0] if values else "")
    except ValueError:
        left.append(f"{text}: {', '.join(map(repr, values))} is not a number.")
        return
    setting = flag.setting
    if setting == "precision" and setting not in known:
        setting = "training.params_dtype"
    if _exists(setting, known):
        settings[setting] = value
    else:
        left.append(f"{text}: this version has no {flag.setting}.")


_DERIVED = (
    "--train-samples", "--lr-warmup-samples", "--lr-warmup-fraction", "--lr-decay-iters", "--lr-decay-samples",
    "--lr-wsd-decay-samples", "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path",
    "--tokenizer-model", "--tokenizer-type", "--vocab-file", "--merge-file", "--num-layers-per-virtual-pipeline-stage",
    "--eval-iters",
)


def _derived(arguments: Mapping[str, list[str]], left: list[str]) -> dict[str, Any]:
    """Settings that several flags make together."""
    found: dict[str, Any] = {}

    def number(name: str) -> float | None:
        values = arguments.get(name)
        try:
            return float(values[0]) if values else None
        except ValueError:
            left.append(f"{name} {values[0] if values else ''}: not a number.")
            return None

    def steps(name: str) -> int | None:
        samples, batch = number(name), number("--global-batch-size")
        if samples is None:
            return None
        if not batch:
            left.append(f"{name} {samples:g}: needs --global-batch-size to become steps.")
            return None
        if samples % batch:
            left.append(f"{name} {samples:g}: {samples / batch:g} steps, cut to {int(samples // batch)}.")
        return int(samples // batch)

    iterations = number("--train-iters")
    train_steps = int(iterations) if iterations is not None else steps("--train-samples")
    if train_steps is not None:
        found["training.train_steps"] = train_steps
    warm_up = steps("--lr-warmup-samples")
    fraction = number("--lr-warmup-fraction")
    decay = number("--lr-decay-iters")
    decay_steps = int(decay) if decay is not None else steps("--lr-decay-samples")
    if fraction is not None and (decay_steps or train_steps) is not None:
        warm_up = round(fraction * (decay_steps or train_steps or 0))
    if warm_up is not None:
        found["optimizer.lr_warmup_steps"] = warm_up
    wsd = steps("--lr-wsd-decay-samples")
    if wsd is not None:
        found["optimizer.lr_wsd_decay_steps"] = wsd
    if decay_steps is not None and decay_steps != train_steps:
        left.append(f"the learning rate decays over {decay_steps} steps there; here over all {train_steps} of the run.")
    layers, stages = number("--num-layers"), number("--pipeline-model-parallel-size")
    per_stage = number("--num-layers-per-virtual-pipeline-stage")
    if layers and stages and per_stage:
        if layers % (stages * per_stage):
            left.append(f"--num-layers-per-virtual-pipeline-stage {per_stage:g} does not divide {layers:g} layers.")
        else:
            found["parallel.virtual_pipeline_model_parallel_size"] = int(layers // (stages * per_stage))
    hidden = number("--hidden-size")
    if hidden and "--ffn-hidden-size" not in arguments:
        swiglu = "--swiglu" in arguments
        found["model.ffn_hidden_size"] = int((4 * int(hidden) * 2 / 3) / 64) * 64 if swiglu else 4 * int(hidden)
    if "--global-batch-size" not in arguments:
        left.append("--global-batch-size is not given; there it is micro-batch x data-parallel size. Set it.")
    _data(arguments, found, left)
    return found


def _data(arguments: Mapping[str, list[str]], found: dict[str, Any], left: list[str]) -> None:
    words = arguments.get("--data-path") or arguments.get("--train-data-path") or []
    prefixes = [word for word in words if not re.fullmatch(r"[\d.eE+-]+", word)]
    weights = [word for word in words if re.fullmatch(r"[\d.eE+-]+", word)]
    found["data.sources"] = [{"prefix": prefix, "language": "EDIT"} for prefix in prefixes] or [
        {"prefix": "EDIT", "language": "EDIT"}
    ]
    if weights:
        left.append(
            f"weights {' '.join(weights)} of {' '.join(prefixes)}: here data.mixture.languages has the share of each "
            "language and data.mixture.parallel_fraction that of parallel text."
        )
    for name in ("--valid-data-path", "--test-data-path"):
        if name in arguments:
            left.append(f"{' '.join([name, *arguments[name]])}: documents are held out by data.split.")
    tokenizer = arguments.get("--tokenizer-model") or arguments.get("--vocab-file") or ["EDIT"]
    found["data.tokenizer"] = tokenizer[0]
    kind = " ".join(arguments.get("--tokenizer-type", ["tokenizer"]))
    left.append(f"{kind}: data.tokenizer is a folder that `xalign tokenizer` makes, of others' files too.")
    if "--eval-iters" in arguments:
        left.append(
            f"--eval-iters {' '.join(arguments['--eval-iters'])}: training.eval_samples_per_source says how much is "
            "measured, of every source."
        )


def _expect(arguments: Mapping[str, list[str]], left: list[str]) -> None:
    """Name what Megatron does where a flag is absent and we do not."""
    if "--swiglu" not in arguments:
        left.append("--swiglu is not given: that model has a GELU MLP; ours is SwiGLU.")
    if "--disable-bias-linear" not in arguments:
        left.append("--disable-bias-linear is not given: that model has biases; ours has none.")
    if arguments.get("--position-embedding-type", ["learned_absolute"])[:1] != ["rope"] and (
        "--use-rotary-position-embeddings" not in arguments
    ):
        left.append("--position-embedding-type is not rope: that model learns positions; ours are rotary.")
    if "--normalization" not in arguments:
        left.append("--normalization is not given: that model's LayerNorm has weights and biases; ours is RMSNorm.")
    for name in _NUMBERS_OF_NOTHING:
        if name not in arguments:
            left.append(f"{name} is not given: there it is 0.1; here there is no dropout.")


def _ordered(tree: dict[str, Any]) -> dict[str, Any]:
    """Groups in the order of our own files."""
    order = [item.name for item in dataclasses.fields(RunConfig)]
    return dict(sorted(tree.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def read_script(path: Path) -> str:
    """A launch script's text.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None

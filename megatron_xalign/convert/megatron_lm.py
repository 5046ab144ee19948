"""Checkpoints that Megatron-LM wrote: what model they hold, by what they record, what their tensors show and what the
person converting them says.

Megatron-LM keeps its command line (``args``) beside the tensors. What it records is believed, what the tensors' shapes
show is compared, and where both are silent the setting must be given: nothing is guessed. A setting that changes what
the model computes and has no counterpart here is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xalign import names
from megatron_xalign.config import ModelConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.checkpoint import METADATA, CheckpointReader
from megatron_xalign.formats.torch_archive import plain_attributes

TRACKER = "latest_checkpointed_iteration.txt"
"""Beside Megatron-LM's ``iter_0000100`` folders: the newest of them."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,), "add_bias_linear": (False,), "position_embedding_type": ("rope",), "rotary_percent": (1, None),
    "rotary_interleaved": (False, None), "rotary_seq_len_interpolation_factor": (None, 1), "num_experts": (None, 0),
    "multi_latent_attention": (False, None), "apply_layernorm_1p": (False, None),
    "layernorm_zero_centered_gamma": (False, None), "squared_relu": (False, None), "openai_gelu": (False, None),
    "quick_geglu": (False, None), "window_size": (None,), "softmax_type": ("vanilla", None),
    "qk_l2_norm": (False, None), "attention_output_gate": (False, None), "no_rope_freq": (None,),
    "mtp_num_layers": (None, 0), "apply_residual_connection_post_layernorm": (False, None), "use_mup": (False, None),
    "hybrid_override_pattern": (None,), "hybrid_layer_pattern": (None,), "is_hybrid_model": (False, None),
    "heterogeneous_layers_config_path": (None,), "experimental_attention_variant": (None,),
    "linear_attention_type": (None,), "glu_linear_offset": (0, None), "activation_func_clamp_value": (None,),
    "normalization": ("RMSNorm", "LayerNorm"), "softmax_scale": (None,),
}
"""Arguments that change what a model computes, and what they must be. Anything else a checkpoint says of itself either
is read below, or is seen in its tensors, or changes how a model is trained and not what it computes."""

_INVISIBLE = ("num_attention_heads", "layernorm_epsilon", "rotary_base")
"""Settings that no tensor shows; defaults of ours would be a guess."""


@dataclass(frozen=True)
class Described:
    """The model of a checkpoint that is not one of ours."""

    model: ModelConfig
    vocab_size: int | None
    """Ids before padding; None if nothing says."""
    seq_length: int
    step: int
    consumed_samples: int
    global_batch_size: int
    tokenizer: str
    """Where the run's tokenizer was; "" if nothing says."""
    name: str


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of Megatron-LM's, or the folder itself if it is one; None if neither."""
    if (folder / METADATA).is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if newest != "release" and not newest.isdecimal():
        raise CheckpointError(f"{tracker} says {newest[:40]!r}, which is no iteration.")
    found = folder / ("release" if newest == "release" else f"iter_{int(newest):07d}")
    if not (found / METADATA).is_file():
        raise CheckpointError(
            f"{tracker} says {newest}, and {found} holds no {METADATA}: it is not there, was not written to its end, "
            "or is of Megatron-LM's older format (--ckpt-format torch); convert that to torch_dist with Megatron-LM "
            "first."
        )
    return found


def describe(reader: CheckpointReader, stated: Mapping[str, Any]) -> Described:
    """Work out the model.

    Args:
        reader: of the checkpoint.
        stated: settings the person gives: fields of ``ModelConfig``, ``seq_length``.

    Raises:
        CheckpointError: it holds a model that has no counterpart here, or contradicts itself.
        ConfigError: a setting is missing, unknown, or contradicts what the checkpoint records.
    """
    settings = reader.read_settings() or {}
    recorded = plain_attributes(settings.get("args"))
    for name, allowed in _MUST_BE.items():
        if name in recorded and recorded[name] not in allowed:
            raise CheckpointError(
                f"{reader.folder} was trained with {name}={recorded[name]!r}, which has no counterpart here; models "
                f"with {name}={allowed[0]!r} can be converted."
            )
    known = {item.name for item in dataclasses.fields(ModelConfig)} | {"seq_length"}
    unknown = sorted(set(stated) - known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]} of the model; known: {', '.join(sorted(known))}.")
    values = _recorded_model(recorded) | {
        name: recorded[name] for name in ("seq_length",) if isinstance(recorded.get(name), int)
    }
    for source, found in (("its tensors", _shown(reader)), ("--model-config", stated)):
        for name, value in found.items():
            if name in values and values[name] != value and not (name == "vocab_size" and source != "its tensors"):
                raise ConfigError(
                    f"{reader.folder}: {name} is {value!r} by {source} and {values[name]!r} by what the checkpoint "
                    "records; one of them is wrong."
                )
            values[name] = value
    _require(reader, values)
    seq_length = int(values.pop("seq_length"))
    model = from_tree(ModelConfig, values, "model.")
    return Described(
        model=dataclasses.replace(model, vocab_size=None), vocab_size=model.vocab_size, seq_length=seq_length,
        step=_whole(settings.get("iteration"), recorded.get("iteration")),
        consumed_samples=_whole(recorded.get("consumed_train_samples")),
        global_batch_size=_whole(recorded.get("global_batch_size")) or 1,
        tokenizer=str(recorded.get("tokenizer_model") or ""), name=reader.folder.parent.name or "imported",
    )


def _recorded_model(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings from Megatron-LM's arguments."""
    values: dict[str, Any] = {}
    for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "qk_layernorm",
        "add_qkv_bias", "normalization", "rotary_base", "untie_embeddings_and_output_weights", "init_method_std",
        "vocab_size", "make_vocab_size_divisible_by",
    ):
        if recorded.get(name) is not None:
            values[name] = recorded[name]
    epsilon = recorded.get("norm_epsilon", recorded.get("layernorm_epsilon"))
    if epsilon is not None:
        values["layernorm_epsilon"] = epsilon
    if recorded.get("num_attention_heads") is not None:
        grouped = recorded.get("group_query_attention", recorded.get("num_query_groups") is not None)
        groups = recorded.get("num_query_groups") if grouped else None
        values["num_query_groups"] = groups or recorded["num_attention_heads"]
    if recorded.get("use_rope_scaling"):
        values["rope_scaling_factor"] = float(recorded.get("rope_scaling_factor") or 8.0)
    if isinstance(values.get("rotary_base"), float) and values["rotary_base"].is_integer():
        values["rotary_base"] = int(values["rotary_base"])
    return values


def _shown(reader: CheckpointReader) -> dict[str, Any]:
    """What the tensors tell of the model."""
    def first(*candidates: str) -> tuple[int, ...] | None:
        return next((reader.shape(name) for name in candidates if name in reader), None)

    fc1, fc2 = first("decoder.layers.mlp.linear_fc1.weight"), first("decoder.layers.mlp.linear_fc2.weight")
    if fc1 is None or fc2 is None or len(fc1) != 3 or len(fc2) != 3:
        raise CheckpointError(
            f"{reader.folder} holds no decoder.layers.mlp.linear_fc1 and linear_fc2 weights; it is not a dense GPT "
            f"model of Megatron-Core. It holds: {', '.join(reader.names()[:8]) or 'no tensors'}."
        )
    weighted = {item.when: item for item in names.WEIGHTS if item.when in ("weighted_norm", "qk_norm", "qkv_bias")}
    return {
        "num_layers": fc1[0], "hidden_size": fc1[2], "ffn_hidden_size": fc2[2],
        "untie_embeddings_and_output_weights": "output_layer.weight" in reader,
        "normalization": "RMSNorm" if "decoder.final_layernorm.weight" in reader else "LayerNorm",
        "qk_layernorm": any(name in reader for name in weighted["qk_norm"].megatron),
        "add_qkv_bias": any(name in reader for name in weighted["qkv_bias"].megatron),
    }


def _require(reader: CheckpointReader, values: Mapping[str, Any]) -> None:
    missing = [name for name in (*_INVISIBLE, "seq_length") if name not in values]
    if missing:
        raise ConfigError(
            f"{reader.folder} does not record {', '.join(missing)}; write them into a YAML file "
            f"({missing[0]}: ...) and name it with --model-config."
        )


def _whole(*candidates: Any) -> int:
    return next((int(value) for value in candidates if isinstance(value, int) and not isinstance(value, bool)), 0)

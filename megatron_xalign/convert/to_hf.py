"""Turn a checkpoint into a Hugging Face folder, on the CPU, one tensor at a time, without transformers.

The model class is the one of transformers that computes the same function (``names.architecture``). Every tensor of
the model in the checkpoint is used, every tensor that class expects is written exactly once, and padded rows of the
vocabulary are left behind; anything that does not fit this is refused by name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import names
from megatron_xalign.config import ModelConfig, RunConfig, from_tree, to_yaml
from megatron_xalign.convert.model_card import model_card
from megatron_xalign.convert.stream import Announced, open_stream, plan_shards, shard_index
from megatron_xalign.errors import CheckpointError, ConfigError, FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, whole_folder, write_json, write_text
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.formats.checkpoint_folder import MANIFEST, check_whole
from megatron_xalign.names import RowView, Weight
from megatron_xalign.progress import progress_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NOT_OF_THE_MODEL = ("optimizer.", "observers.")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class _Move:
    """One Megatron tensor (of one layer) and the Hugging Face tensors cut from it."""

    source: str
    layer: int | None
    views: tuple[RowView, ...]
    targets: tuple[Announced, ...]


def to_hf(
    checkpoint: str | Path, out: str | Path, tokenizer: str | Path | None = None, dtype: str | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write the Hugging Face folder of a checkpoint; it appears whole or not at all.

    Args:
        checkpoint: ``checkpoints/step-NNNNNN`` of a run.
        out: folder to write; a Hugging Face folder already there is replaced.
        tokenizer: folder with ``tokenizer.json``; default: the one the run's config names, none if it names none.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: what the checkpoint's weights are stored in.
        max_shard_size: largest ``*.safetensors`` file, a number of bytes or text such as ``500MB``.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or holds something unknown; or ``out`` cannot be
            written.
        ConfigError: transformers has no class for this model, or ``out``, ``dtype`` or ``max_shard_size`` cannot be.
        FormatError: the tokenizer is missing or not the one the run was trained with.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    max_shard_bytes = parse_size(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not one of {', '.join(DTYPES)}.")
    if out.exists() and not ((out / "config.json").is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"{out} exists and is no Hugging Face folder; it would be replaced. Name another one.")
    manifest = check_whole(checkpoint)
    extra = manifest["extra"]
    for key in ("config", "vocab_size"):
        if not extra.get(key):
            raise CheckpointError(f"{checkpoint / MANIFEST} lacks {key} in extra; the model cannot be rebuilt from it.")
    config, vocab_size = from_tree(RunConfig, extra["config"]), int(extra["vocab_size"])
    architecture = read_architecture(extra, config.model)
    reader = CheckpointReader(checkpoint)
    moves = plan_moves(reader, config, vocab_size, None if dtype is None else DTYPES[dtype])
    tokenizer = tokenizer if tokenizer is not None else config.data.tokenizer or None
    tokenizer_files = None if tokenizer is None else _read_tokenizer(Path(tokenizer), extra.get("tokenizer_sha256"))
    eod = None if tokenizer_files is None else tokenizer_files.eod
    try:
        with whole_folder(out) as folder:
            _write_weights(folder, reader, moves, max_shard_bytes)
            stored = next(name for name, value in DTYPES.items() if value == moves[0].targets[0].dtype)
            write_json(folder / "config.json", hf_config(config, architecture, vocab_size, eod, stored))
            write_json(
                folder / "generation_config.json",
                {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": eod},
            )
            if tokenizer_files is not None:
                tokenizer_files.write(folder, config.data.seq_length)
            write_text(folder / "xalign-config.yaml", to_yaml(config))
            write_text(folder / "README.md", model_card(checkpoint, manifest, config, architecture, stored))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Nothing is left of it.") from None
    return out


def read_architecture(extra: Mapping[str, Any], model: ModelConfig) -> str:
    """The transformers class of a checkpoint: the one it was imported from where that computes the same.

    Raises:
        FormatError: the checkpoint names a class that this model is not.
    """
    computed = names.architecture(model)
    stated = extra.get("architecture", computed)
    if stated != computed and (stated, computed) != ("MistralForCausalLM", "LlamaForCausalLM"):
        raise FormatError(f"the checkpoint names {stated}; its model is a {computed}.")
    return str(stated)


def parse_size(size: str | int) -> int:
    """Bytes of ``"500MB"``, ``"2GiB"`` or a number.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or int(float(match[1]) * unit) <= 0:
        raise ConfigError(f"max_shard_size={size} is not a size such as 500MB, 5GB or 2GiB.")
    return int(float(match[1]) * unit)


def plan_moves(
    reader: CheckpointReader, config: RunConfig, vocab_size: int, dtype: torch.dtype | None
) -> list[_Move]:
    """Which checkpoint tensor goes where, before anything is read or written.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of this model, has one in another shape, or holds one that this
            model does not have.
    """
    model = config.model
    in_fp8 = config.fp8 is not None and config.fp8.param_gather
    moves, used = [], set()
    for weight in names.weights_of(model):
        source = next((name for name in weight.megatron if name in reader), None)
        if source is not None and in_fp8 and names.MAIN_WEIGHT + source in reader:
            # Weights that a run kept in FP8 are stored rounded to FP8.
            used.add(source)
            source = names.MAIN_WEIGHT + source
        if source is None:
            raise CheckpointError(
                f"{reader.folder} holds no {' or '.join(weight.megatron)}, which a model with "
                f"normalization={model.normalization} and untie_embeddings_and_output_weights="
                f"{str(model.untie_embeddings_and_output_weights).lower()} needs."
            )
        used.add(source)
        padded = _check_shape(reader, source, weight, config, vocab_size)
        views = names.row_views(weight, model, vocab_size, padded)
        target_dtype = dtype or (torch.bfloat16 if source.startswith(names.MAIN_WEIGHT) else reader.dtype(source))
        if target_dtype not in DTYPES.values():
            raise CheckpointError(f"{source} in {reader.folder} is stored as {target_dtype}, which cannot be exported.")
        columns = names.megatron_shape(weight, model, padded)[1:]
        for layer in range(model.num_layers) if weight.per_layer else [None]:
            targets = tuple(
                Announced(name, (view.rows, *columns), target_dtype)
                for name, view in zip(names.hugging_face_names(weight, layer), views, strict=True)
            )
            moves.append(_Move(source, layer, views, targets))
    unknown = [
        name
        for name in reader.names()
        if name not in used and not name.startswith(_NOT_OF_THE_MODEL) and not name.endswith(names.FP8_STATE)
    ]
    if unknown:
        raise CheckpointError(
            f"{reader.folder} holds {', '.join(unknown)}, which {names.architecture(model)} with these settings does "
            "not have. Nothing was written: a model without it would compute something else."
        )
    # By layer, as the forward pass goes; each tensor of all layers is one entry of the table.
    last = model.num_layers
    first = "embedding.word_embeddings.weight"

    def place(move: _Move) -> int:
        if move.layer is not None:
            return move.layer
        return -1 if move.source.removeprefix(names.MAIN_WEIGHT) == first else last

    return sorted(moves, key=place)


def hf_config(config: RunConfig, architecture: str, vocab_size: int, eod: int | None, dtype: str) -> dict[str, Any]:
    """Contents of ``config.json``."""
    model = config.model
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling_factor is not None:
        # The other three numbers are fixed in Megatron-Core's RotaryEmbedding.
        rope |= {
            "rope_type": "llama3", "factor": model.rope_scaling_factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }
    common: dict[str, Any] = {
        "architectures": [architecture],
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.data.seq_length,
        # The second is how transformers 5 writes it, the first how everybody reads it.
        "rope_theta": float(model.rotary_base),
        "rope_parameters": rope,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": vocab_size,
        # null, not left out: the classes have other ids as defaults. Padding has none, because transformers freezes
        # the embedding of the id it has, and the only candidate is the end of a document.
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if model.rope_scaling_factor is not None:
        common["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if architecture == "OlmoForCausalLM":
        return {"model_type": "olmo", "clip_qkv": None, **common}
    common |= {"rms_norm_eps": model.layernorm_epsilon, "head_dim": model.head_size}
    if architecture == "Qwen2ForCausalLM":
        return {"model_type": "qwen2", "use_sliding_window": False, **common}
    if architecture == "Qwen3ForCausalLM":
        return {"model_type": "qwen3", "use_sliding_window": False, **common}
    if architecture == "MistralForCausalLM":
        return {"model_type": "mistral", "sliding_window": None, **common}
    return {"model_type": "llama", "mlp_bias": False, **common}


def _check_shape(reader: CheckpointReader, source: str, weight: Weight, config: RunConfig, vocab_size: int) -> int:
    """Compare a stored shape with the config's; the padded vocabulary size where it has one, else ``vocab_size``."""
    shape = reader.shape(source)
    padded = shape[0] if weight.layout == "vocab" and shape else vocab_size
    expected = names.megatron_shape(weight, config.model, padded)
    if weight.per_layer:
        expected = (config.model.num_layers, *expected)
    if shape != expected:
        raise CheckpointError(
            f"{source} in {reader.folder} has shape {list(shape)}; the run's config asks for {list(expected)}."
        )
    if padded < vocab_size:
        raise CheckpointError(
            f"{source} in {reader.folder} has {padded} rows, fewer than the vocabulary's {vocab_size}."
        )
    return padded


def _write_weights(folder: Path, reader: CheckpointReader, moves: list[_Move], max_shard_bytes: int) -> None:
    shards = plan_shards([move.targets for move in moves], max_shard_bytes)
    file_of: dict[str, str] = {}
    with progress_bar(len(moves), "converting", " tensors") as bar:
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with open_stream(folder / file, [target for i in shard for target in moves[i].targets]) as stream:
                for move in (moves[i] for i in shard):
                    tensor = reader.tensor(move.source, move.layer)
                    for view, target in zip(move.views, move.targets, strict=True):
                        stream.write(target.name, _cast(_cut(tensor, view), target))
                        file_of[target.name] = file
                    bar.update(1)
    if len(shards) > 1:
        total = sum(target.num_bytes for move in moves for target in move.targets)
        write_json(folder / "model.safetensors.index.json", shard_index(file_of, total))


def _cut(tensor: torch.Tensor, view: RowView) -> torch.Tensor:
    rest = tensor.shape[1:]
    blocks = tensor.reshape(view.blocks, view.width, *rest)
    return blocks[:, view.start : view.stop].reshape(view.rows, *rest)


def _cast(tensor: torch.Tensor, target: Announced) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{target.name} holds values that are not finite; this model has diverged.")
    cast = tensor.to(target.dtype)
    if not torch.isfinite(cast).all():
        raise ConfigError(
            f"dtype={str(target.dtype).removeprefix('torch.')} cannot hold {target.name}, whose largest value is "
            f"{float(tensor.abs().max()):g}; use bfloat16 or float32."
        )
    return cast


@dataclass(frozen=True)
class _TokenizerFiles:
    folder: Path
    eod: int
    eod_token: str

    def write(self, out: Path, seq_length: int) -> None:
        shutil.copyfile(self.folder / "tokenizer.json", out / "tokenizer.json")
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if (self.folder / "tokenizer_config.json").is_file():
            settings = read_json(self.folder / "tokenizer_config.json")
        settings |= {"eos_token": self.eod_token, "model_max_length": seq_length}
        settings.setdefault("pad_token", self.eod_token)
        write_json(out / "tokenizer_config.json", settings)
        special: dict[str, Any] = {}
        if (self.folder / "special_tokens_map.json").is_file():
            special = read_json(self.folder / "special_tokens_map.json")
        special = {"pad_token": self.eod_token} | special | {"eos_token": self.eod_token}
        write_json(out / "special_tokens_map.json", special)


def _read_tokenizer(folder: Path, expected_sha256: str | None) -> _TokenizerFiles:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError(f"{file} does not exist; name the folder of the run's tokenizer.")
    if expected_sha256 and sha256_of(file) != expected_sha256:
        raise FormatError(
            f"{file} has SHA-256 {sha256_of(file)}; the checkpoint was trained with a tokenizer of {expected_sha256}. "
            "Name the one the run used."
        )
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest.get("eod"), int) or not isinstance(manifest.get("eod_token"), str):
        raise FormatError(f"{folder / 'manifest.json'} does not say which token ends a document (eod, eod_token).")
    return _TokenizerFiles(folder, manifest["eod"], manifest["eod_token"])

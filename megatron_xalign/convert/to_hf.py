"""Turn a checkpoint into a Hugging Face folder, on the CPU, one tensor at a time, without transformers.

The model class is the one of transformers that computes the same function (``names.architecture``). Every tensor of
the model in the checkpoint is used, every tensor that class expects is written exactly once, and padded rows of the
vocabulary are left behind; anything that does not fit this is refused by name.

One Megatron tensor (of one layer) is in memory, and some megabytes of what is cut from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import __version__, names
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.convert.model_card import model_card, run_files
from megatron_xalign.convert.source import Source, read_source
from megatron_xalign.convert.stream import Announced, is_written, open_stream, plan_shards, shard_index
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.atomic import write_json, write_text
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.formats.resumable import resumable_folder
from megatron_xalign.names import RowView, Weight
from megatron_xalign.progress import progress_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NOT_OF_THE_MODEL = ("optimizer.", "chained_", "observers.", "rng_state", "rerun_state_machine_state")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PART_NUMBERS = 2 << 20
"""Numbers that are cut, cast and written at once."""


@dataclass(frozen=True)
class _Move:
    """One Megatron tensor (of one layer) and the Hugging Face tensors cut from it."""

    source: str
    layer: int | None
    views: tuple[RowView, ...]
    targets: tuple[Announced, ...]


def to_hf(
    checkpoint: str | Path, out: str | Path, tokenizer: str | Path | None = None, dtype: str | None = None,
    max_shard_size: str | int = "5GB", stated: Mapping[str, Any] | None = None, architecture: str | None = None,
) -> Path:
    """Write the Hugging Face folder of a checkpoint; it appears whole or not at all.

    A call that was killed is continued by the same call: files that were whole are kept.

    Args:
        checkpoint: ``checkpoints/step-NNNNNN`` of a run, or ``iter_NNNNNNN`` of Megatron-LM.
        out: folder to write; a Hugging Face folder already there is replaced.
        tokenizer: folder with ``tokenizer.json``; default: the one the run's config names, none if it names none.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: what the checkpoint's weights are stored in.
        max_shard_size: largest ``*.safetensors`` file, a number of bytes or text such as ``500MB``.
        stated: settings that a checkpoint of Megatron-LM's does not record (``megatron_lm.describe``).
        architecture: class to write in place of the model's own, where it computes the same.

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
    source = read_source(
        checkpoint, tokenizer=None if tokenizer is None else Path(tokenizer), stated=stated, architecture=architecture
    )
    moves = plan_moves(source.reader, source.config, source.vocab_size, None if dtype is None else DTYPES[dtype])
    shards = _plan_files(moves, max_shard_bytes)
    stored = next(name for name, value in DTYPES.items() if value == moves[0].targets[0].dtype)
    try:
        with resumable_folder(out, _identity(source, shards)) as folder:
            _write_weights(folder, source.reader, shards)
            write_json(folder / "config.json", hf_config(source, stored))
            write_json(folder / "generation_config.json", generation_config(source.special_ids))
            if source.tokenizer is not None:
                source.tokenizer.write(folder, source.config.data.seq_length)
            write_text(folder / "xalign-config.yaml", to_yaml(source.config))
            for name, content in run_files(source).items():
                write_json(folder / name, content)
            write_text(folder / "README.md", model_card(source, stored))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Nothing is left of it.") from None
    return out


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


def hf_config(source: Source, dtype: str) -> dict[str, Any]:
    """Contents of ``config.json``."""
    config, architecture, special = source.config, source.architecture, source.special_ids
    model = config.model
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **names.LLAMA3_ROPE}
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
        "vocab_size": source.vocab_size,
        # null, not left out: the classes have other ids as defaults. Padding has none of its own making, because
        # transformers freezes the embedding of the id it has, and the only candidate is the end of a document.
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("pad"),
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


def generation_config(special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of ``generation_config.json``: where to stop, and what to fill batches with."""
    end = special_ids.get("eos")
    fill = special_ids.get("pad")
    if fill is None:
        fill = end[0] if isinstance(end, list) and end else end
    return {"bos_token_id": special_ids.get("bos"), "eos_token_id": end, "pad_token_id": fill}


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


def _plan_files(moves: Sequence[_Move], max_shard_bytes: int) -> dict[str, list[_Move]]:
    """File names and what goes into each."""
    shards = plan_shards([move.targets for move in moves], max_shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": list(moves)}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": [moves[i] for i in shard]
        for number, shard in enumerate(shards, start=1)
    }


def _identity(source: Source, shards: Mapping[str, Sequence[_Move]]) -> str:
    """What files from a call that was killed must have been made for, to be kept."""
    plan = [
        [file, [[move.source, move.layer, [[t.name, t.shape, str(t.dtype)] for t in move.targets]] for move in moves]]
        for file, moves in shards.items()
    ]
    return hashlib.sha256(json.dumps([__version__, source.identity, plan]).encode()).hexdigest()


def _write_weights(folder: Path, reader: CheckpointReader, shards: Mapping[str, Sequence[_Move]]) -> None:
    with progress_bar(sum(map(len, shards.values())), "converting", " tensors") as bar:
        for file, moves in shards.items():
            announced = [target for move in moves for target in move.targets]
            if is_written(folder / file, announced):
                bar.update(len(moves))
                continue
            with open_stream(folder / file, announced) as stream:
                for move in moves:
                    tensor = reader.tensor(move.source, move.layer)
                    for view, target in zip(move.views, move.targets, strict=True):
                        stream.write(target.name, _cast(_cut(tensor, view), target))
                    del tensor  # before the next one is read
                    bar.update(1)
    if len(shards) > 1:
        files = {target.name: file for file, moves in shards.items() for move in moves for target in move.targets}
        total = sum(target.num_bytes for moves in shards.values() for move in moves for target in move.targets)
        write_json(folder / "model.safetensors.index.json", shard_index(files, total))


def _cut(tensor: torch.Tensor, view: RowView) -> Iterator[torch.Tensor]:
    """The rows of a view in order, some at a time."""
    rest = tensor.shape[1:]
    blocks = tensor.view(view.blocks, view.width, *rest)
    step = max(1, _PART_NUMBERS // max(1, rest.numel()))
    for block in blocks:
        for first in range(view.start, view.stop, step):
            yield block[first : min(first + step, view.stop)]


def _cast(parts: Iterator[torch.Tensor], target: Announced) -> Iterator[torch.Tensor]:
    for part in parts:
        if not _is_finite(part):
            raise CheckpointError(f"{target.name} holds values that are not finite; this model has diverged.")
        cast = part.to(target.dtype)
        if cast.dtype != part.dtype and not _is_finite(cast):
            raise ConfigError(
                f"dtype={str(target.dtype).removeprefix('torch.')} cannot hold {target.name}, whose largest value is "
                f"{float(part.abs().max()):g}; use bfloat16 or float32."
            )
        yield cast


def _is_finite(tensor: torch.Tensor) -> bool:
    # Ten times as fast as torch.isfinite: NaN is the least and the greatest of everything.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)) if tensor.numel() else True

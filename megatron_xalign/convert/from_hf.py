"""Turn a Hugging Face folder into a checkpoint that training starts from, on the CPU, one tensor at a time.

Only ``*.safetensors`` are read: nothing is unpickled and no code of the folder is run. Every tensor of the folder is
used and every tensor of the model is filled; what does not fit is refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import __version__, names
from megatron_xalign.config import DataConfig, ModelConfig, RunConfig
from megatron_xalign.config.tree import to_tree
from megatron_xalign.convert.safetensors_files import FolderTensors
from megatron_xalign.convert.to_hf import DTYPES
from megatron_xalign.convert.tokenizer_files import ROLES, special_ids_of_config
from megatron_xalign.errors import CheckpointError, ConfigError, XAlignError
from megatron_xalign.formats.atomic import sha256_of, write_json
from megatron_xalign.formats.checkpoint_folder import FORMAT, MANIFEST, VERSION
from megatron_xalign.formats.checkpoint_writer import FILE_BYTES, CheckpointWriter
from megatron_xalign.formats.resumable import resumable_folder
from megatron_xalign.progress import progress_bar


def from_hf(
    folder: str | Path, out: str | Path, *, dtype: str | None = None, make_vocab_size_divisible_by: int = 128,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint with the weights of a Hugging Face folder; it appears whole or not at all.

    A call that was killed is continued by the same call: files that were whole are kept.

    Args:
        folder: ``config.json`` and ``*.safetensors`` of a Llama, Mistral, Qwen2, Qwen3 or OLMo model.
        out: folder to write; must not exist, or be a checkpoint written by this function before.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: what each tensor is stored in.
        make_vocab_size_divisible_by: the vocabulary gets rows of zeros up to a multiple of this; a run on more
            tensor-parallel ranks pads further by itself.
        file_bytes: a new file of the checkpoint is begun once one has grown past this.

    Returns:
        ``out``.

    Raises:
        ConfigError: a setting of the model has no counterpart here, or transformers is not installed.
        CheckpointError: tensors are missing, unknown, of a wrong shape or not finite; a file is damaged; ``out``
            cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not one of {', '.join(DTYPES)}.")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is no checkpoint; it would be replaced. Name another one.")
    settings = _read_config(folder)
    model, architecture = model_config(settings, folder)
    config = _run_config(model, settings, folder)
    padded = -(-settings.vocab_size // make_vocab_size_divisible_by) * make_vocab_size_divisible_by
    special = special_ids_of_config({f"{role}_token_id": getattr(settings, f"{role}_token_id", None) for role in ROLES})
    try:
        with ExitStack() as stack:
            tensors = FolderTensors(folder, stack)
            plan = list(_plan(model, settings.vocab_size, padded, tensors))
            identity = json.dumps([__version__, str(folder.resolve()), tensors.identity(), dtype, padded])
            partial = stack.enter_context(resumable_folder(out, hashlib.sha256(identity.encode()).hexdigest()))
            files = _write(partial, plan, tensors, None if dtype is None else DTYPES[dtype], file_bytes)
            _write_manifest(partial, config, settings.vocab_size, architecture, special, folder, files)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Nothing is left of it.") from None
    return out


def model_config(settings: Any, folder: Path) -> tuple[ModelConfig, str]:
    """Our settings of a transformers model, and the name of its class.

    Args:
        settings: the transformers config object.
        folder: named in errors.

    Raises:
        ConfigError: the model computes something that this package's models do not; the setting is named.
    """
    kind = settings.model_type
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "olmo"):
        raise ConfigError(
            f"{folder / 'config.json'} has model_type {kind!r}; llama, mistral, qwen2, qwen3 and olmo can be imported."
        )

    def refuse_unless(name: str, *allowed: Any) -> None:
        value = getattr(settings, name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{folder / 'config.json'} has {name}={value!r}, which has no counterpart here; {kind} models with "
                f"{name}={allowed[0]!r} can be imported."
            )

    refuse_unless("hidden_act", "silu")
    refuse_unless("attention_bias", False, None)
    refuse_unless("mlp_bias", False, None)
    refuse_unless("clip_qkv", None)
    refuse_unless("use_sliding_window", False, None)
    if kind == "mistral":
        refuse_unless("sliding_window", None)
    layers = set(getattr(settings, "layer_types", None) or ["full_attention"])
    if layers - {"full_attention"}:
        raise ConfigError(f"{folder / 'config.json'} has layers of {', '.join(sorted(layers))}; only full attention.")
    base, factor = _rotary(settings, folder)
    heads = settings.num_attention_heads
    head = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    olmo = kind == "olmo"
    model = ModelConfig(
        num_layers=settings.num_hidden_layers, hidden_size=settings.hidden_size,
        ffn_hidden_size=settings.intermediate_size, num_attention_heads=heads,
        num_query_groups=getattr(settings, "num_key_value_heads", None) or heads,
        kv_channels=None if head * heads == settings.hidden_size else head, qk_layernorm=kind == "qwen3",
        add_qkv_bias=kind == "qwen2", normalization="LayerNorm" if olmo else "RMSNorm",
        layernorm_epsilon=names.OLMO_LAYERNORM_EPSILON if olmo else settings.rms_norm_eps, rotary_base=base,
        rope_scaling_factor=factor, untie_embeddings_and_output_weights=not settings.tie_word_embeddings,
        init_method_std=settings.initializer_range, vocab_size=settings.vocab_size,
    )
    computes = names.architecture(model)
    return model, "MistralForCausalLM" if kind == "mistral" else computes


def _rotary(settings: Any, folder: Path) -> tuple[int, float | None]:
    rope: Mapping[str, Any] = (
        getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None) or {}
    )
    base = float(rope.get("rope_theta", getattr(settings, "rope_theta", None) or 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if base != int(base) or float(rope.get("partial_rotary_factor", 1.0) or 1.0) != 1.0:
        raise ConfigError(
            f"{folder / 'config.json'} has rotary positions of {dict(rope)}, which have no counterpart here."
        )
    if kind == "default":
        return int(base), None
    fixed = {name: float(rope.get(name, 0)) for name in names.LLAMA3_ROPE}
    if kind != "llama3" or fixed != {name: float(value) for name, value in names.LLAMA3_ROPE.items()}:
        raise ConfigError(
            f"{folder / 'config.json'} scales rotary positions by {dict(rope)}; Megatron-Core has rope_type llama3 "
            f"with {names.LLAMA3_ROPE} only."
        )
    return int(base), float(rope["factor"])


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; it is not a Hugging Face folder.")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(
            f"defaults of a Hugging Face config come from transformers ({error}): "
            "pip install 'megatron-xalign[convert]'."
        ) from None
    try:
        # Files leave out what is a class's default; only the class knows it.
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not a config transformers can read: {error}.") from None


def _run_config(model: ModelConfig, settings: Any, folder: Path) -> RunConfig:
    tokenizer = str(folder.resolve()) if (folder / "tokenizer.json").is_file() else ""
    try:
        return RunConfig(
            name=folder.name or "imported", model=model,
            data=DataConfig(seq_length=settings.max_position_embeddings, tokenizer=tokenizer),
        )
    except XAlignError as error:
        raise ConfigError(f"{folder}: {error}") from None


@dataclass(frozen=True)
class _Move:
    target: str
    shape: tuple[int, ...]
    layer: int | None
    views: tuple[names.RowView, ...]
    sources: tuple[str, ...]


def _plan(model: ModelConfig, vocab_size: int, padded: int, tensors: FolderTensors) -> Iterator[_Move]:
    """Which tensors make which, before anything is written."""
    used: set[str] = set()
    for weight in names.weights_of(model):
        whole = names.megatron_shape(weight, model, padded)
        views = names.row_views(weight, model, vocab_size, padded)
        for layer in range(model.num_layers) if weight.per_layer else [None]:
            sources = names.hugging_face_names(weight, layer)
            for source, view in zip(sources, views, strict=True):
                if source not in tensors:
                    raise CheckpointError(f"{tensors.folder} holds no {source}, which its config.json asks for.")
                expected = (view.rows, *whole[1:])
                if tensors.shape(source) != expected:
                    raise CheckpointError(
                        f"{source} in {tensors.folder} has shape {list(tensors.shape(source))}; its config.json asks "
                        f"for {list(expected)}."
                    )
            used.update(sources)
            # Transformer Engine's names come first; the local layers are saved under them too.
            yield _Move(
                weight.megatron[0], (model.num_layers, *whole) if weight.per_layer else whole, layer, views, sources
            )
    # A tied model's output matrix may be stored a second time; some files carry the rotary frequencies.
    spare = {name for name in tensors.names() - used if name.endswith("rotary_emb.inv_freq")}
    if not model.untie_embeddings_and_output_weights:
        spare.add("lm_head.weight")
    unknown = sorted(tensors.names() - used - spare)
    if unknown:
        raise CheckpointError(
            f"{tensors.folder} holds {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}, which a model with "
            "its config.json does not have."
        )


def _write(
    folder: Path, plan: list[_Move], tensors: FolderTensors, dtype: torch.dtype | None, file_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write all tensors; sizes and hashes of the files."""
    with CheckpointWriter(folder, file_bytes) as writer, progress_bar(len(plan), "converting", " tensors") as bar:
        for move in plan:
            layered = move.layer is not None
            offsets = [0] * len(move.shape) if move.layer is None else [move.layer, *[0] * (len(move.shape) - 1)]
            if not writer.has(move.target, offsets):
                chunk = _join(move, tensors, dtype)
                writer.add(move.target, move.shape, offsets, chunk[None] if layered else chunk)
                del chunk  # before the next one is read
            bar.update(1)
        writer.finish()
        return writer.files


def _join(move: _Move, tensors: FolderTensors, dtype: torch.dtype | None) -> torch.Tensor:
    """Put the Hugging Face matrices into their ranges of the Megatron matrix; other rows (padding) are zero."""
    stored = {tensors.dtype(source) for source in move.sources}
    if dtype is None and len(stored) > 1:
        raise CheckpointError(
            f"{', '.join(move.sources)} in {tensors.folder} are stored as {', '.join(sorted(map(str, stored)))}; name "
            "one type with --dtype."
        )
    target = dtype or next(iter(stored))
    if target not in DTYPES.values():
        raise CheckpointError(f"{move.sources[0]} in {tensors.folder} is stored as {target}; name a type with --dtype.")
    first = move.views[0]
    rest = move.shape[1:] if move.layer is None else move.shape[2:]
    # Ranges do not overlap: if they add up to the width, nothing is left to be zero.
    begin = torch.empty if sum(view.stop - view.start for view in move.views) == first.width else torch.zeros
    joined = begin(first.blocks, first.width, *rest, dtype=target)
    for view, source in zip(move.views, move.sources, strict=True):
        rows = joined[:, view.start : view.stop]
        if view.blocks == 1 and tensors.dtype(source) == target:
            tensors.read(source, rows[0])
            continue
        part = tensors.read(source)
        cast = part.to(target)
        if cast.dtype != part.dtype and not all(bool(torch.isfinite(end)) for end in torch.aminmax(cast)):
            raise ConfigError(
                f"dtype={str(target).removeprefix('torch.')} cannot hold {source}; use bfloat16 or float32."
            )
        rows.copy_(cast.view(rows.shape))
    return joined.flatten(0, 1)


def _write_manifest(
    folder: Path, config: RunConfig, vocab_size: int, architecture: str, special_ids: dict[str, Any], source: Path,
    files: dict[str, dict[str, Any]],
) -> None:
    tokenizer = source / "tokenizer.json"
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT, "version": VERSION, "step": 0,
            "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "megatron_xalign": __version__, "megatron_core": importlib.metadata.version("megatron-core"),
                "torch": torch.__version__,
            },
            "layout": None, "use_distributed_optimizer": False, "weights_only": True,
            "extra": {
                "config": to_tree(config), "vocab_size": vocab_size, "consumed_samples": 0,
                "tokenizer_sha256": sha256_of(tokenizer) if tokenizer.is_file() else "",
                "architecture": architecture, "special_ids": special_ids, "imported_from": str(source),
            },
            "files": files,
        },
    )

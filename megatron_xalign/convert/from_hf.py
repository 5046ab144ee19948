"""Turn a Hugging Face folder into a checkpoint that training starts from, on the CPU, one tensor at a time.

Only ``*.safetensors`` are read: nothing is unpickled and no code of the folder is run. Every tensor of the folder is
used and every tensor of the model is filled; what does not fit is refused by name.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_xalign import __version__, names
from megatron_xalign.config import DataConfig, ModelConfig, RunConfig, to_tree
from megatron_xalign.convert.to_hf import DTYPES
from megatron_xalign.errors import CheckpointError, ConfigError, XAlignError
from megatron_xalign.formats.atomic import read_json, sha256_of, whole_folder, write_json
from megatron_xalign.formats.checkpoint_folder import FORMAT, MANIFEST, VERSION, describe_file
from megatron_xalign.formats.checkpoint_writer import CheckpointWriter
from megatron_xalign.progress import progress_bar

_ROPE_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def from_hf(
    folder: str | Path, out: str | Path, *, dtype: str | None = None, make_vocab_size_divisible_by: int = 128
) -> Path:
    """Write a checkpoint with the weights of a Hugging Face folder; it appears whole or not at all.

    Args:
        folder: ``config.json`` and ``*.safetensors`` of a Llama, Mistral, Qwen2, Qwen3 or OLMo model.
        out: folder to write; must not exist, or be a checkpoint written by this function before.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: what each tensor is stored in.
        make_vocab_size_divisible_by: the vocabulary gets rows of zeros up to a multiple of this; a run on more
            tensor-parallel ranks pads further by itself.

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
    try:
        with ExitStack() as stack:
            tensors = _Tensors(folder, stack)
            plan = list(_plan(model, settings.vocab_size, padded, tensors))
            partial = stack.enter_context(whole_folder(out))
            _write(partial, plan, tensors, None if dtype is None else DTYPES[dtype])
            _write_manifest(partial, config, settings.vocab_size, architecture, folder)
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
    fixed = {name: float(rope.get(name, 0)) for name in _ROPE_LLAMA3}
    if kind != "llama3" or fixed != {name: float(value) for name, value in _ROPE_LLAMA3.items()}:
        raise ConfigError(
            f"{folder / 'config.json'} scales rotary positions by {dict(rope)}; Megatron-Core has rope_type llama3 "
            f"with {_ROPE_LLAMA3} only."
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


class _Tensors:
    """The tensors of a folder by name, whatever files they lie in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            stated: Any = read_json(index)
            files = stated.get("weight_map") if isinstance(stated, dict) else None
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise CheckpointError(f"{index} has no weight_map from tensors to files.")
        elif (folder / "model.safetensors").is_file():
            files = None
        else:
            raise CheckpointError(
                f"{folder} holds no model.safetensors and no index of several; pickled weights (*.bin) are not read. "
                "Save the model again with save_pretrained(..., safe_serialization=True)."
            )
        paths = {"model.safetensors"} if files is None else set(files.values())
        for name in sorted(paths):
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is not a file inside the folder.")
        opened = {name: self._open(name, stack) for name in sorted(paths)}
        self._file_of: dict[str, Any] = {}
        for name, file in opened.items():
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                if files is not None and files.get(tensor) != name:
                    raise CheckpointError(f"{index} and {folder / name} disagree about {tensor}.")
                self._file_of[tensor] = file
        missing = sorted(set(files or {}) - set(self._file_of))
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}, which {index.name} promises.")

    def _open(self, name: str, stack: ExitStack) -> Any:
        try:
            return stack.enter_context(safe_open(self.folder / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / name} is missing or damaged: {error}.") from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            CheckpointError: its numbers are not finite.
        """
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} in {self.folder} holds values that are not finite.")
        return tensor


@dataclass(frozen=True)
class _Move:
    target: str
    shape: tuple[int, ...]
    layer: int | None
    views: tuple[names.RowView, ...]
    sources: tuple[str, ...]


def _plan(model: ModelConfig, vocab_size: int, padded: int, tensors: _Tensors) -> Iterator[_Move]:
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


def _write(folder: Path, plan: list[_Move], tensors: _Tensors, dtype: torch.dtype | None) -> None:
    with CheckpointWriter(folder) as writer, progress_bar(len(plan), "converting", " tensors") as bar:
        for move in plan:
            chunk = _join(move, tensors, dtype)
            if move.layer is None:
                writer.add(move.target, move.shape, [0] * chunk.dim(), chunk)
            else:
                writer.add(move.target, move.shape, [move.layer, *[0] * chunk.dim()], chunk[None])
            bar.update(1)
        writer.finish()


def _join(move: _Move, tensors: _Tensors, dtype: torch.dtype | None) -> torch.Tensor:
    """Put the Hugging Face matrices into their ranges of the Megatron matrix; other rows (padding) are zero."""
    joined: torch.Tensor | None = None
    for view, source in zip(move.views, move.sources, strict=True):
        part = tensors.read(source)
        part = part if dtype is None else part.to(dtype)
        if not torch.isfinite(part).all():
            raise ConfigError(
                f"dtype={str(dtype).removeprefix('torch.')} cannot hold {source}; use bfloat16 or float32."
            )
        if joined is None:
            joined = torch.zeros(view.blocks, view.width, *part.shape[1:], dtype=part.dtype)
        joined[:, view.start : view.stop] = part.reshape(view.blocks, view.stop - view.start, *part.shape[1:])
    assert joined is not None
    return joined.flatten(0, 1)


def _write_manifest(folder: Path, config: RunConfig, vocab_size: int, architecture: str, source: Path) -> None:
    tokenizer = source / "tokenizer.json"
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
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
                "architecture": architecture, "imported_from": str(source),
            },
            "files": files,
        },
    )

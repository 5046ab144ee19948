"""A checkpoint as something to convert: which model it holds, of which run, whoever wrote it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xalign import names
from megatron_xalign.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.convert import megatron_lm
from megatron_xalign.convert.tokenizer_files import TokenizerFiles, read_tokenizer
from megatron_xalign.errors import CheckpointError, ConfigError, FormatError
from megatron_xalign.formats.checkpoint import METADATA, CheckpointReader
from megatron_xalign.formats.checkpoint_folder import MANIFEST, check_whole

_HASHED_BYTES = 16 << 20
"""Larger files hold numbers, which have checksums of their own that are compared as they are read."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that was looked at: whole as far as its index and sizes tell, and of a model that is known here."""

    folder: Path
    reader: CheckpointReader
    config: RunConfig
    vocab_size: int
    """Ids before padding."""
    architecture: str
    """The transformers class that computes what it computes."""
    tokenizer: TokenizerFiles | None
    special_ids: dict[str, Any]
    """``bos``, ``eos``, ``pad``."""
    step: int
    consumed_tokens: int
    trained_with: str
    """Megatron-Core's version, or that it is not known."""
    identity: str
    """Changes when any file of the checkpoint does."""


def read_source(
    folder: Path, *, tokenizer: Path | None = None, stated: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> Source:
    """Look at a checkpoint of ours or of Megatron-LM's.

    Args:
        folder: holds ``.metadata``.
        tokenizer: folder with ``tokenizer.json``; default: the one the run's config names, none if it names none.
        stated: of a checkpoint of Megatron-LM's: fields of ``ModelConfig`` and ``seq_length`` that it does not record.
        architecture: a transformers class that computes the same as the model's own, to write in its place.

    Raises:
        CheckpointError: it is damaged, incomplete, foreign, or of a model that has no counterpart.
        ConfigError: transformers has no class for this model, or a setting is missing or wrong.
        FormatError: the tokenizer is missing or not the one the run was trained with.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist.")
    if (folder / MANIFEST).is_file():
        if stated:
            raise ConfigError(
                f"{folder} records its model in {MANIFEST}; --model-config is for checkpoints that do not."
            )
        return _own(folder, tokenizer, architecture)
    return _plain(folder, tokenizer, dict(stated or {}), architecture)


def _own(folder: Path, tokenizer: Path | None, architecture: str | None) -> Source:
    manifest = check_whole(folder, _HASHED_BYTES)
    extra = manifest["extra"]
    for key in ("config", "vocab_size"):
        if not extra.get(key):
            raise CheckpointError(f"{folder / MANIFEST} lacks {key} in extra; the model cannot be rebuilt from it.")
    config, vocab_size = from_tree(RunConfig, extra["config"]), int(extra["vocab_size"])
    named = tokenizer if tokenizer is not None else Path(config.data.tokenizer) if config.data.tokenizer else None
    files = None if named is None else read_tokenizer(named, extra.get("tokenizer_sha256"))
    special = extra.get("special_ids") or _special_ids(files)
    return Source(
        folder, _reader(folder), config, vocab_size,
        _architecture(config.model, extra.get("architecture"), architecture), files, special, manifest["step"],
        manifest["step"] * config.training.global_batch_size * config.data.seq_length,
        manifest.get("versions", {}).get("megatron_core", "unknown"), _identity(folder),
    )


def _plain(folder: Path, tokenizer: Path | None, stated: dict[str, Any], architecture: str | None) -> Source:
    reader = _reader(folder)
    found = megatron_lm.describe(reader, stated)
    files = None
    if tokenizer is not None:
        files = read_tokenizer(tokenizer, None)
    vocab_size = found.vocab_size if found.vocab_size is not None else None if files is None else files.num_ids
    if vocab_size is None:
        raise ConfigError(
            f"{folder} does not record how many ids its tokenizer has; its embedding has "
            f"{reader.shape('embedding.word_embeddings.weight')[0]} rows, padding included. Name the tokenizer "
            "(--tokenizer FOLDER), or the number (--vocab-size N)."
        )
    if files is not None and files.num_ids > vocab_size:
        raise FormatError(
            f"{files.folder} has {files.num_ids} ids, more than the model's {vocab_size}; it is another model's "
            "tokenizer."
        )
    config = RunConfig(
        name=found.name, model=dataclasses.replace(found.model, vocab_size=vocab_size),
        data=DataConfig(seq_length=found.seq_length, tokenizer="" if files is None else str(files.folder)),
        training=TrainingConfig(global_batch_size=found.global_batch_size, micro_batch_size=1),
    )
    return Source(
        folder, reader, config, vocab_size, _architecture(config.model, None, architecture), files, _special_ids(files),
        found.step, found.consumed_samples * found.seq_length, "unknown", _identity(folder),
    )


def _reader(folder: Path) -> CheckpointReader:
    reader = CheckpointReader(folder)
    for file, least in sorted(reader.file_sizes().items()):
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing from the checkpoint.")
        if path.stat().st_size < least:
            raise CheckpointError(
                f"{path} is truncated: it has {path.stat().st_size} bytes, {least} are needed by {METADATA}."
            )
    return reader


def _architecture(model: ModelConfig, recorded: str | None, asked: str | None) -> str:
    computed = names.architecture(model)
    for stated, error in ((recorded, FormatError), (asked, ConfigError)):
        if stated is not None and stated != computed and (stated, computed) not in names.SAME_FUNCTION:
            raise error(f"{stated} was named as the model's class; with these settings it is a {computed}.")
    return asked or recorded or computed


def _special_ids(files: TokenizerFiles | None) -> dict[str, Any]:
    return {"bos": None, "eos": None, "pad": None} if files is None else dict(files.special_ids)


def _identity(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    for name in (METADATA, MANIFEST):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()

"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from megatron_xalign.config import RunConfig, from_tree
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.atomic import read_json, sha256_of, write_json
from megatron_xalign.formats.run_folder import RunFolder

CHECK_FILE = "xalign-check.json"
"""In a Hugging Face folder: the comparison with the checkpoint it was made from."""


def convert_to_hf(source: Path, out: Path, *, dtype: str = "float32", tokenizer: Path | None = None) -> Path:
    """Write a checkpoint (or a run's newest) as a Hugging Face folder; return it."""
    from megatron_xalign.convert.to_hf import to_hf

    checkpoint = _checkpoint_of(source)
    return to_hf(checkpoint, out, tokenizer=tokenizer, dtype=dtype)


def convert_from_hf(folder: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint with the weights of a Hugging Face folder, to start training from; return it."""
    from megatron_xalign.convert.from_hf import from_hf

    return from_hf(folder, out, dtype=dtype)


def check_hf(source: Path, hf: Path, *, record: bool = True) -> dict[str, Any]:
    """Compare a Hugging Face folder's logits with Megatron's on text of the run; return the comparison.

    With ``record`` it is written into the Hugging Face folder.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    from megatron_xalign.convert.check import check
    from megatron_xalign.formats.checkpoint_folder import read_manifest
    from megatron_xalign.training.inference import load_for_inference

    checkpoint = _checkpoint_of(source)
    config = from_tree(RunConfig, read_manifest(checkpoint)["extra"]["config"])
    with load_for_inference(checkpoint) as megatron_logits:
        report = check(checkpoint, hf, _check_texts(config, hf), megatron_logits)
    report.require()
    if record:
        write_json(hf / CHECK_FILE, {"checkpoint_manifest_sha256": _manifest_hash(checkpoint), **report.to_json()})
    return report.to_json()


def is_converted(source: Path, hf: Path) -> bool:
    """Whether a Hugging Face folder was made from this checkpoint and passed its check."""
    path = hf / CHECK_FILE
    return path.is_file() and read_json(path)["checkpoint_manifest_sha256"] == _manifest_hash(_checkpoint_of(source))


def _check_texts(config: RunConfig, hf: Path, most: int = 32) -> list[Any]:
    """What to compare logits on: real text of every language, the run's probe; or, of a model without, token ids."""
    from megatron_xalign.data.documents import read_probe

    if config.data.probe is not None:
        pairs = list(itertools.islice(read_probe(config.data.probe), most // 2))
        return [text for pair in pairs for text in pair.texts.values()]
    import numpy as np

    # Every id as likely as any other: more of the embedding is looked at than by text.
    settings = read_json(hf / "config.json")
    length = min(settings["max_position_embeddings"], 256)
    return list(np.random.default_rng(0).integers(0, settings["vocab_size"], (most // 4, length)).tolist())


def _manifest_hash(checkpoint: Path) -> str:
    from megatron_xalign.formats.checkpoint_folder import MANIFEST

    return sha256_of(checkpoint / MANIFEST)


def _checkpoint_of(source: Path) -> Path:
    """A checkpoint folder itself, or the newest whole one of a run folder."""
    from megatron_xalign.formats import checkpoint_folder

    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; give a checkpoint folder or a run folder.")
    if (source / checkpoint_folder.MANIFEST).is_file():
        return source
    newest = checkpoint_folder.latest_checkpoint(RunFolder(source).checkpoints)
    if newest is None:
        raise CheckpointError(f"{source} holds no whole checkpoint; `xalign train` writes them into checkpoints/.")
    return newest

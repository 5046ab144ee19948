"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import read_yaml
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.atomic import read_json, sha256_of, write_json
from megatron_xalign.formats.run_folder import RunFolder

CHECK_FILE = "xalign-check.json"
"""In a Hugging Face folder: the comparison with the checkpoint it was made from."""


def convert_to_hf(
    source: Path, out: Path, *, dtype: str | None = "float32", tokenizer: Path | None = None,
    stated: Mapping[str, Any] | None = None, architecture: str | None = None, max_shard_size: str = "5GB",
) -> Path:
    """Write a checkpoint (or a run's newest) as a Hugging Face folder; return it.

    ``stated`` are settings that a checkpoint of Megatron-LM's does not record (:func:`stated_model`).
    """
    from megatron_xalign.convert.to_hf import to_hf

    return to_hf(
        checkpoint_of(source), out, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size, stated=stated,
        architecture=architecture,
    )


def convert_from_hf(folder: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint with the weights of a Hugging Face folder, to start training from; return it."""
    from megatron_xalign.convert.from_hf import from_hf

    return from_hf(folder, out, dtype=dtype)


def stated_model(path: Path | None, vocab_size: int | None = None, seq_length: int | None = None) -> dict[str, Any]:
    """Settings of a model from a YAML file and from the command line.

    The file holds fields of ``ModelConfig`` and ``seq_length``, or is the YAML of a run.

    Raises:
        ConfigError: it is missing, not YAML, or not a mapping.
    """
    tree = {} if path is None else read_yaml(path)
    if isinstance(tree.get("model"), dict):
        data = tree.get("data")
        length = {"seq_length": data["seq_length"]} if isinstance(data, dict) and "seq_length" in data else {}
        tree = {**tree["model"], **length}
    given = {"vocab_size": vocab_size, "seq_length": seq_length}
    return tree | {name: value for name, value in given.items() if value is not None}


def check_hf(
    source: Path, hf: Path, *, record: bool = True, tokenizer: Path | None = None,
    stated: Mapping[str, Any] | None = None, probe: Path | None = None, layer_by_layer: bool | None = None,
) -> dict[str, Any]:
    """Compare a Hugging Face folder with Megatron's model on text of the run; return the comparison.

    With ``record`` it is written into the Hugging Face folder. ``layer_by_layer`` holds one layer of each model in
    memory; by default that is done where both would not fit.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    from megatron_xalign.convert.check import check, check_layerwise
    from megatron_xalign.convert.source import read_source
    from megatron_xalign.training.layerwise import load_layerwise
    from megatron_xalign.training.listening import load_listened

    checkpoint = checkpoint_of(source)
    found = read_source(checkpoint, tokenizer=tokenizer, stated=stated)
    texts = _check_texts(found.config, hf, probe)
    if layer_by_layer is None:
        layer_by_layer = not _both_fit(found)
    if layer_by_layer:
        with load_layerwise(checkpoint, found.config, found.vocab_size) as stages:
            report = check_layerwise(checkpoint, hf, texts, stages)
    else:
        own = is_own(checkpoint)
        model = load_listened(
            checkpoint, None if own else found.config, None if own else found.vocab_size
        )
        with model as megatron:
            report = check(checkpoint, hf, texts, megatron)
    report.require()
    if record:
        write_json(hf / CHECK_FILE, {"checkpoint_manifest_sha256": _manifest_hash(checkpoint), **report.to_json()})
    return report.to_json()


def _both_fit(source: Any) -> bool:
    """Whether two models in float32 take less than two thirds of the memory that is free."""
    import math

    import psutil

    reader = source.reader
    numbers = sum(math.prod(reader.shape(name)) for name in reader.names() if not name.startswith("optimizer."))
    return 2 * 4 * numbers < psutil.virtual_memory().available * 2 / 3


def is_converted(source: Path, hf: Path) -> bool:
    """Whether a Hugging Face folder was made from this checkpoint and passed its check."""
    path = hf / CHECK_FILE
    return path.is_file() and read_json(path)["checkpoint_manifest_sha256"] == _manifest_hash(checkpoint_of(source))


def _check_texts(config: RunConfig, hf: Path, probe: Path | None, most: int = 32) -> list[Any]:
    """What to compare on: real text of every language, the run's probe; or, of a model without, token ids."""
    from megatron_xalign.data.documents import read_probe

    path = probe if probe is not None else config.data.probe
    if path is not None and (hf / "tokenizer.json").is_file():
        pairs = list(itertools.islice(read_probe(path), most // 2))
        return [text for pair in pairs for text in pair.texts.values()]
    import numpy as np

    # Every id as likely as any other: more of the embedding is looked at than by text.
    settings = read_json(hf / "config.json")
    length = min(settings["max_position_embeddings"], 256)
    return list(np.random.default_rng(0).integers(0, settings["vocab_size"], (most // 4, length)).tolist())


def _manifest_hash(checkpoint: Path) -> str:
    from megatron_xalign.formats.checkpoint import METADATA
    from megatron_xalign.formats.checkpoint_folder import MANIFEST

    return sha256_of(checkpoint / (MANIFEST if is_own(checkpoint) else METADATA))


def is_own(checkpoint: Path) -> bool:
    """Whether this package wrote a checkpoint."""
    from megatron_xalign.formats.checkpoint_folder import MANIFEST

    return (checkpoint / MANIFEST).is_file()


def checkpoint_of(source: Path) -> Path:
    """A checkpoint folder itself, or the newest whole one of a run folder, ours or Megatron-LM's."""
    from megatron_xalign.convert.megatron_lm import find_checkpoint
    from megatron_xalign.formats import checkpoint_folder

    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; give a checkpoint folder or a run folder.")
    if is_own(source):
        return source
    foreign = find_checkpoint(source)
    if foreign is not None:
        return foreign
    newest = checkpoint_folder.latest_checkpoint(RunFolder(source).checkpoints)
    if newest is None:
        raise CheckpointError(
            f"{source} holds no whole checkpoint; `xalign train` writes them into checkpoints/, Megatron-LM into "
            "iter_NNNNNNN/ (--ckpt-format torch_dist)."
        )
    return newest

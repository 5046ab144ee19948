"""Checkpoint folders of a run: which are whole, which is the newest, and what is left of a killed save.

``checkpoints/step-000100/`` holds a torch_dist checkpoint and ``xalign.json``. The folder gets its name only when
everything in it is written, so a folder under such a name is complete, unless its disk lost something afterwards:
``xalign.json`` lists every other file with its size and SHA-256.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.errors import CheckpointError, FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of

log = logging.getLogger(__name__)

MANIFEST = "xalign.json"
"""Describes the checkpoint and lists its files; written last."""

FORMAT = "megatron_xalign checkpoint"
VERSION = 1

_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d{6,}\.(partial|old-\d+|removed)")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return folder / f"step-{step:06d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where that checkpoint is being written; the same on every process, so it carries no process id."""
    return folder / f".step-{step:06d}.partial"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints of a run by step, oldest first; whole or not."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read ``xalign.json`` of one checkpoint.

    Raises:
        CheckpointError: there is none, it cannot be read, or another version of this program wrote it.
    """
    path = checkpoint / MANIFEST
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint {checkpoint} does not exist.")
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} holds no {MANIFEST}: it is not a complete checkpoint of this program. Name a folder "
            "checkpoints/step-NNNNNN of a run."
        )
    try:
        manifest = read_json(path)
    except FormatError as error:
        raise CheckpointError(f"{error} The checkpoint cannot be used; take an older one.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a checkpoint of this program.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {manifest.get('version')!r}; this program reads version {VERSION}."
        )
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("step"), int):
        raise CheckpointError(f"{path} lacks its step or its list of files.")
    return manifest


def describe_file(path: Path, with_hash: bool = True) -> dict[str, Any]:
    """Size and, if wanted, hash of a file, as ``xalign.json`` lists them."""
    return {"bytes": path.stat().st_size} | ({"sha256": sha256_of(path)} if with_hash else {})


def find_damage(
    checkpoint: Path, manifest: dict[str, Any], share: tuple[int, int] = (0, 1), most_hashed_bytes: int | None = None
) -> list[str]:
    """Compare a checkpoint's files with its manifest.

    Args:
        checkpoint: the folder.
        manifest: its ``xalign.json``.
        share: (number, total) of this process, where several divide the work.
        most_hashed_bytes: of larger files only the size is compared, for readers that compare checksums themselves.

    Returns:
        One line for each file that is missing, of another size or of another content.
    """
    damage = []
    number, total = share
    for name in sorted(manifest["files"])[number::total]:
        path, expected = checkpoint / name, manifest["files"][name]
        if Path(name).name != name:
            damage.append(f"{name!r} in {MANIFEST} is not a plain file name")
        elif not path.is_file():
            damage.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            damage.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif most_hashed_bytes is not None and expected["bytes"] > most_hashed_bytes:
            continue
        elif "sha256" in expected and sha256_of(path) != expected["sha256"]:
            damage.append(f"{name} has another content than was written (SHA-256 differs)")
    return damage


def check_whole(checkpoint: Path, most_hashed_bytes: int | None = None) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare every file with it; for ``most_hashed_bytes`` see ``find_damage``.

    Raises:
        CheckpointError: something is missing, truncated or changed; every such file is named.
    """
    manifest = read_manifest(checkpoint)
    damage = find_damage(checkpoint, manifest, most_hashed_bytes=most_hashed_bytes)
    if damage:
        raise damaged(checkpoint, damage)
    return manifest


def damaged(checkpoint: Path, damage: Sequence[str]) -> CheckpointError:
    """The error that names what ``find_damage`` found."""
    return CheckpointError(
        f"checkpoint {checkpoint} is damaged: {'; '.join(damage)}. Restore the files from a copy, or delete the folder "
        "to go on from the checkpoint before it."
    )


def latest_checkpoint(
    folder: str | Path, check: Callable[[Path], dict[str, Any]] = check_whole
) -> Path | None:
    """The newest checkpoint of a run that is whole; None if there is no checkpoint.

    A damaged one is passed over with a warning that says what is wrong with it.

    Args:
        folder: ``checkpoints/`` of a run.
        check: raises ``CheckpointError`` for a checkpoint not to be used. ``read_manifest`` in place of the default
            looks no further than ``xalign.json``, which takes no time.

    Raises:
        CheckpointError: there are checkpoints, and none can be used. That is for a person to decide: the run would
            start from its first step and write over what is left of it.
    """
    checkpoints = checkpoint_folders(Path(folder))
    for checkpoint in reversed(checkpoints):
        try:
            check(checkpoint)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            continue
        return checkpoint
    if checkpoints:
        raise CheckpointError(
            f"{folder} holds {len(checkpoints)} checkpoint(s), and none can be used: see the warnings before. Restore "
            "one from a copy; or move that folder away, and the run starts from its first step."
        )
    return None


def prune(folder: str | Path, keep: int, keep_every_steps: int = 0, newest_step: int | None = None) -> list[Path]:
    """Remove all but the newest ``keep`` complete checkpoints; 0 keeps all. Call it on one process.

    Args:
        folder: ``checkpoints/`` of a run.
        keep: how many.
        keep_every_steps: those of steps that are a multiple of this stay as well; 0: none.
        newest_step: later ones are neither counted nor removed. They are there where a run passed over damaged ones,
            which must not take the places of good ones.

    Returns:
        The folders removed, oldest first.

    Raises:
        ValueError: ``keep`` or ``keep_every_steps`` is negative.
    """
    if keep < 0 or keep_every_steps < 0:
        raise ValueError(f"keep={keep}, keep_every_steps={keep_every_steps}: neither may be negative.")
    if keep == 0:
        return []
    complete = [
        path for path in checkpoint_folders(Path(folder))
        if (path / MANIFEST).is_file() and (newest_step is None or _step_of(path) <= newest_step)
    ]
    removed = [path for path in complete[:-keep] if not keep_every_steps or _step_of(path) % keep_every_steps]
    for path in removed:
        # Out of sight first: a kill in the middle of the removal must not leave half a checkpoint under its name.
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)
    return removed


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed saves and removals left behind. Call it on one process, while no other is saving.

    A checkpoint that had been moved aside for a rewrite of the same step, and whose rewrite was killed before it took
    the name, gets its name back.
    """
    if not folder.is_dir():
        return []
    leftovers = [path for path in sorted(folder.iterdir()) if _LEFTOVER.fullmatch(path.name)]
    for path in leftovers:
        name, kind = path.name[1:].split(".", 1)
        if kind.startswith("old") and not (folder / name).exists() and (path / MANIFEST).is_file():
            path.rename(folder / name)
        else:
            shutil.rmtree(path)
    return leftovers

"""Which checkpoint of a run is the newest whole one, pruning, and what killed saves leave behind."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.checkpoint_folder import (
    FORMAT,
    check_whole,
    checkpoint_folders,
    describe_file,
    latest_checkpoint,
    prune,
    read_manifest,
    remove_leftovers,
)


def write(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "a.distcp").write_bytes(bytes([step % 256]) * 100)
    files = {"a.distcp": describe_file(path / "a.distcp")}
    manifest = {"format": FORMAT, "version": 1, "step": step, "files": files}
    (path / "xalign.json").write_text(json.dumps(manifest))
    return path


def test_the_newest_is_by_step_and_not_by_name(tmp_path: Path) -> None:
    for step in (1_000_000, 999_999, 50):
        write(tmp_path, step)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000050", "step-999999", "step-1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def damage_content(path: Path) -> None:
    (path / "a.distcp").write_bytes(b"x" * 100)


def damage_size(path: Path) -> None:
    os.truncate(path / "a.distcp", 99)


def damage_file(path: Path) -> None:
    (path / "a.distcp").unlink()


def damage_manifest(path: Path) -> None:
    os.truncate(path / "xalign.json", 30)


def damage_by_loss(path: Path) -> None:
    (path / "xalign.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_content, "a.distcp has another content"), (damage_size, "a.distcp has 99 bytes instead of 100"),
        (damage_file, "a.distcp is missing"), (damage_manifest, "xalign.json"), (damage_by_loss, "no xalign.json"),
    ],
)
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, said: str
) -> None:
    older, newest = write(tmp_path, 50), write(tmp_path, 100)
    damage(newest)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == older
    assert said in caplog.text
    with pytest.raises(CheckpointError, match=said):
        check_whole(newest)


def test_where_none_can_be_used_a_person_decides(tmp_path: Path) -> None:
    for path in (write(tmp_path, 50), write(tmp_path, 100)):
        damage_size(path)
    with pytest.raises(CheckpointError, match=r"2 checkpoint\(s\), and none can be used.*move that folder away"):
        latest_checkpoint(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "xalign.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (path / "xalign.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        check_whole(path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "xalign.json").write_text(json.dumps({"format": FORMAT, "version": 2, "step": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="version 2"):
        read_manifest(path)


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    (paths[3] / "xalign.json").unlink()
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 2) == [paths[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000030", "step-000040"]
    with pytest.raises(ValueError, match="negative"):
        prune(tmp_path, -1)


def test_pruning_leaves_later_steps_alone_and_does_not_count_them(tmp_path: Path) -> None:
    """A run that passed over a damaged newest one must not keep that in place of what it writes."""
    paths = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    assert prune(tmp_path, 1, newest_step=30) == paths[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000030", "step-000040"]


def test_leftovers_of_killed_saves_go_and_nothing_else_does(tmp_path: Path) -> None:
    kept = write(tmp_path, 10)
    (tmp_path / ".step-000020.partial").mkdir()
    (tmp_path / ".step-000020.partial" / "__0_0.distcp").write_bytes(b"half")
    write(tmp_path, 5).rename(tmp_path / ".step-000005.removed")
    write(tmp_path, 99).rename(tmp_path / ".step-000010.old-77")  # its rewrite took the name already
    (tmp_path / ".notes").mkdir()
    assert len(remove_leftovers(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes", kept.name]


def test_a_checkpoint_moved_aside_for_a_rewrite_that_was_killed_gets_its_name_back(tmp_path: Path) -> None:
    write(tmp_path, 10).rename(tmp_path / ".step-000010.old-77")
    remove_leftovers(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000010"

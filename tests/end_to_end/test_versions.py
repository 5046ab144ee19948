"""A run goes on with another version of Megatron-Core, older or newer, than the one that wrote its checkpoint.

The other version is not here: what it would have written is made of what this one wrote.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from test_faults import EXAMPLE, lines, settings
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from xalign_process import Xalign

from megatron_xalign.formats.checkpoint import COMMON, COMMON_STATE, CheckpointReader
from megatron_xalign.formats.checkpoint_folder import MANIFEST, check_whole, describe_file


def move_common_state(folder: Path) -> None:
    """From ``common.pt`` (core 0.16) to among the tensors (0.19), or back."""
    if (folder / COMMON).is_file():
        common = torch.load(folder / COMMON, weights_only=True)
        stored = io.BytesIO()
        torch.save([common], stored)
        (folder / "__9_9.distcp").write_bytes(stored.getvalue())
        index = pickle.loads((folder / ".metadata").read_bytes())
        name = f"{COMMON_STATE}/shard_0_1"
        index.state_dict_metadata[name] = BytesStorageMetadata()
        index.storage_data[MetadataIndex(name)] = _StorageInfo("__9_9.distcp", 0, len(stored.getvalue()))
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        (folder / COMMON).unlink()
    else:
        torch.save(CheckpointReader(folder).read_settings(), folder / COMMON)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = {path.name: describe_file(path) for path in folder.iterdir() if path.name != MANIFEST}
    manifest["versions"]["megatron_core"] = "0.99.0"
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    check_whole(folder)


@pytest.mark.end_to_end
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_checkpoint_of_another_version_goes_on(
    text: Path, tmp_path: Path, xalign: Xalign, distributed_optimizer: bool
) -> None:
    run = tmp_path / "run"
    train = [
        "train", EXAMPLE, *settings(text, text / "tokens", run, steps=8),
        "--set", f"parallel.use_distributed_optimizer={str(distributed_optimizer).lower()}",
    ]
    assert "was written with" not in xalign(*train).stderr
    whole = lines(run)
    for step in (6, 8):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    had_common = (run / "checkpoints/step-000004" / COMMON).is_file()
    move_common_state(run / "checkpoints/step-000004")
    assert (run / "checkpoints/step-000004" / COMMON).is_file() != had_common
    said = xalign(*train).stderr
    assert "continuing from" in said and "step-000004" in said
    assert "was written with megatron-core 0.99.0 (now " in said
    assert lines(run) == whole
    assert (run / "checkpoints/step-000006" / COMMON).is_file() == had_common

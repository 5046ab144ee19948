"""What a checkpoint call refuses before any process writes; the rest is in tests/distributed/test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_xalign.errors import CheckpointError
from megatron_xalign.topology import Ranks
from megatron_xalign.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

ALONE = Ranks(
    rank=0, world_size=1, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, data_rank=0, data_size=1,
    device=torch.device("cpu"),
)


def test_a_checkpoint_that_could_not_be_converted_later_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extra lacks config, consumed_samples, tokenizer_sha256"):
        save_checkpoint(tmp_path, 1, [], None, None, ALONE, {"vocab_size": 3})
    assert not any(tmp_path.iterdir())


def test_loading_what_is_no_checkpoint_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-000001 does not exist"):
        load_checkpoint(tmp_path / "step-000001", [], None, None, ALONE)
    with pytest.raises(CheckpointError, match=r"holds no xalign.json"):
        load_checkpoint(tmp_path, [], None, None, ALONE)


def test_a_run_that_has_not_saved_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "checkpoints", ALONE) is None

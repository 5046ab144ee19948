"""Exports while training: whole folders that passed their check, from checkpoints that are removed meanwhile."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from model_checkpoint import random_transformers_model, run_config
from test_to_hf import assert_same_model, load

from megatron_xalign.config import TrainingConfig
from megatron_xalign.convert.from_hf import from_hf
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.training.export import HfExporter

pytest.importorskip("transformers")


def test_exports_are_checked_outlive_their_checkpoints_and_failures_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_transformers_model(run_config())
    model.save_pretrained(str(tmp_path / "model"))
    run = RunFolder(tmp_path / "run")
    good, bad, last = (run.checkpoints / f"step-{step:06d}" for step in (10, 20, 30))
    from_hf(tmp_path / "model", good)
    shutil.copytree(good, bad)
    file = next(bad.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        # As if a run had been killed after its first two saves, the second of which the disk damaged.
        exporter = HfExporter(run, 10, 30)
        exporter.after_save(15, good)
        shutil.copytree(good, last)
        exporter.after_save(30, last)
        for checkpoint in (good, last):
            shutil.rmtree(checkpoint)
        exporter.close()
    assert set(exporter.failed) == {20} and "damaged" in exporter.failed[20]
    assert "step 20 was not exported" in caplog.text
    assert sorted(path.name for path in run.hf.iterdir()) == ["step-000010", "step-000020.log", "step-000030"]
    for step in (10, 30):
        assert_same_model(load(run.hf / f"step-{step:06d}"), model)
        assert (run.hf / f"step-{step:06d}" / "xalign-check.json").is_file()
    assert not (run.path / "exporting").exists()


def test_a_run_that_is_stopped_does_not_wait(tmp_path: Path) -> None:
    exporter = HfExporter(RunFolder(tmp_path), 10, 30)
    (tmp_path / "c").mkdir()
    exporter.after_save(10, tmp_path / "c")
    exporter.close()
    assert exporter.failed == {} and not (tmp_path / "exporting").exists()


def test_steps_that_are_not_saved_cannot_be_exported() -> None:
    with pytest.raises(ConfigError, match="not a multiple of save_interval_steps=50"):
        TrainingConfig(hf_export_interval_steps=60)

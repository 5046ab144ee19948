"""Which checkpoints of a run are kept, and when the others go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_xalign.config import TrainingConfig
from megatron_xalign.formats.checkpoint_folder import MANIFEST, step_folder
from megatron_xalign.training import saver as module
from megatron_xalign.training.saver import Saver


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves that are complete as soon as somebody asks."""

    def begin_save(folder: Path, step: int, *args: Any, **kwargs: Any) -> Any:
        def finish() -> Path:
            path = step_folder(folder, step)
            path.mkdir(parents=True)
            (path / MANIFEST).write_text("{}")
            return path

        return SimpleNamespace(step=step, finish=finish, is_written=lambda: True)

    monkeypatch.setattr(module, "begin_save", begin_save)


def build(tmp_path: Path, **settings: Any) -> Saver:
    config = TrainingConfig(keep_checkpoints=1, **settings)
    ranks: Any = SimpleNamespace(rank=0, device="cpu", sum_over=lambda value, axis: value)
    return Saver(tmp_path, config, ranks, [], None, None)


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.usefixtures("begin")
def test_a_checkpoint_stays_until_observers_were_told_of_it(tmp_path: Path) -> None:
    saver = build(tmp_path, async_save=True)
    saver.save(10, {}, {})
    saver.save(20, {}, {})  # ends the save of step 10, of which nobody was told yet
    told = saver.completed(wait=True)
    assert [step for step, _ in told] == [10, 20]
    assert all((path / MANIFEST).is_file() for _, path in told)
    saver.save(30, {}, {})
    saver.completed(wait=True)
    assert kept(tmp_path) == ["step-000030"]
    saver.save(40, {}, {})
    saver.save(50, {}, {})
    saver.completed(wait=True)
    saver.wait()
    assert kept(tmp_path) == ["step-000050"]


@pytest.mark.usefixtures("begin")
def test_without_async_save_nothing_piles_up(tmp_path: Path) -> None:
    saver = build(tmp_path)
    for step in (10, 20, 30):
        assert saver.save(step, {}, {}) == step_folder(tmp_path, step)
        assert kept(tmp_path) == [f"step-{step:06d}"]


@pytest.mark.usefixtures("begin")
def test_a_damaged_one_of_a_later_step_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    """The run went back to step 20; if it dies at step 35, the checkpoint of step 30 must be there."""
    (tmp_path / "step-000020").mkdir()
    (tmp_path / "step-000020" / MANIFEST).write_text("{}")
    (tmp_path / "step-000040").mkdir()
    (tmp_path / "step-000040" / MANIFEST).write_text("damaged")
    saver = build(tmp_path)
    saver.wait()
    assert kept(tmp_path) == ["step-000020", "step-000040"]
    saver.save(30, {}, {})
    saver.wait()
    assert kept(tmp_path) == ["step-000030", "step-000040"]

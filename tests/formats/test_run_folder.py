"""The facts of a run, written at every start, and what is said where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import CheckpointError, FormatError
from megatron_xalign.formats.run_folder import RunFolder, start_run


def started(folder: Path, command: str = "train") -> RunFolder:
    config = from_tree(RunConfig, {"name": "one", "output_dir": str(folder)})
    return start_run(config, ["xalign", command], {"tensor": 1}, {"train_steps": 7})


def test_every_start_is_written_down(tmp_path: Path) -> None:
    started(tmp_path, "first")
    run = started(tmp_path, "second")
    assert [start["command"] for start in run.facts()["starts"]] == [["xalign", "first"], ["xalign", "second"]]
    assert run.train_steps() == 7
    assert run.config().output_dir == str(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"starts": 3}', b"\xff", b'{"starus": []}'])
def test_damaged_facts_are_told_with_the_way_out_and_nothing_is_written(tmp_path: Path, content: bytes) -> None:
    run = started(tmp_path)
    run.facts_path.write_bytes(content)
    config = run.config_path.read_bytes()
    run.config_path.write_bytes(config + b"# as it was\n")
    with pytest.raises(FormatError, match=r"run\.json .*delete it, and the next start writes it again"):
        started(tmp_path)
    assert run.facts_path.read_bytes() == content
    assert run.config_path.read_bytes() == config + b"# as it was\n"
    run.facts_path.unlink()
    assert len(started(tmp_path).facts()["starts"]) == 1


def test_missing_facts_are_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"run\.json does not exist; `xalign train` writes it"):
        RunFolder(tmp_path).facts()


def test_steps_that_are_no_number_are_told(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.facts_path.write_text(json.dumps(run.facts() | {"train_steps": "7"}), encoding="utf-8")
    with pytest.raises(FormatError, match="train_steps is '7'"):
        run.train_steps()


def test_where_a_run_began_is_kept_over_its_starts(tmp_path: Path) -> None:
    config = from_tree(RunConfig, {"name": "one", "output_dir": str(tmp_path)})
    assert RunFolder(tmp_path).first_step() == started(tmp_path).first_step() == 0
    run = start_run(config, ["xalign"], {}, {"train_steps": 7, "branched_from": {"step": 4, "checkpoint": "there"}})
    assert run.first_step() == started(tmp_path).first_step() == 4
    run.facts_path.write_text(json.dumps(run.facts() | {"branched_from": {"step": "4"}}), encoding="utf-8")
    with pytest.raises(FormatError, match=r"branched_from is \{'step': '4'\}"):
        run.first_step()


@pytest.mark.parametrize("content", ["", "\0\0", "training: {train_stebs: 3}", "- 1", "a: b: c"])
def test_a_damaged_config_is_told_with_its_file_and_the_way_out(tmp_path: Path, content: str) -> None:
    run = started(tmp_path)
    run.config_path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=r"(?s)config\.yaml, which `xalign train` wrote, cannot be read: .*delete it"):
        started(tmp_path)
    assert run.config_path.read_text(encoding="utf-8") == content


def test_a_metrics_line_of_other_bytes_is_named_and_a_last_one_is_passed_over(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics_path.write_bytes(b'{"step": 1, "name": "a\xe2\x80\xa8b"}\n{"st\xffep": 2}\n{"step": 3}\n')
    metrics = run.metrics()
    assert next(metrics) == {"step": 1, "name": "a\u2028b"}
    with pytest.raises(FormatError, match=r"metrics\.jsonl:2 is not JSON"):
        next(metrics)
    run.metrics_path.write_bytes(b'{"step": 1}\n{"st\xff')
    assert [line["step"] for line in run.metrics()] == [1]


@pytest.mark.parametrize(
    ("branched_at", "in_background", "last_step", "may"),
    [
        (0, False, None, True), (0, False, 4, True), (0, False, 5, False), (0, True, 8, True), (0, True, 9, False),
        # A branch from step 6 saves at step 8 first.
        (6, False, 8, True), (6, False, 9, False),
    ],
)
def test_a_run_that_got_past_its_first_checkpoint_and_lost_all_is_not_begun_again(
    tmp_path: Path, branched_at: int, in_background: bool, last_step: int | None, may: bool
) -> None:
    tree = {"output_dir": str(tmp_path), "training": {"save_interval_steps": 4, "async_save": in_background}}
    facts = {"train_steps": 20} | ({"branched_from": {"step": branched_at}} if branched_at else {})
    run = start_run(from_tree(RunConfig, tree), ["xalign"], {}, facts)
    run.check_may_begin()
    if last_step is not None:
        steps = range(branched_at + 1, last_step + 1)
        run.metrics_path.write_text("".join(f'{{"step": {step}}}\n' for step in steps), encoding="utf-8")
    if may:
        run.check_may_begin()
        return
    with pytest.raises(CheckpointError, match=rf"goes to step {last_step}, .* start from step {branched_at} and write"):
        run.check_may_begin()
    run.metrics_path.unlink()
    run.check_may_begin()

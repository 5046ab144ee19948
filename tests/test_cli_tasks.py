"""``xalign preprocess`` as many tasks, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_xalign.cli import main

DATATROVE = ["--datatrove", "local", "--tasks", "2", "--datatrove-option"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(["talo ja koira"] * 9, trainer)
    engine.save(str(tmp_path / "tokenizer.json"))
    lines = [json.dumps({"text": f"talo ja koira {number} " * (number % 7 + 1)}) for number in range(500)]
    (tmp_path / "fin.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [
        str(tmp_path / "fin.jsonl"), "--language", "fin_Latn", "--tokenizer", str(tmp_path / "tokenizer.json"),
        "--part-bytes", "4k", "--workers", "1",
    ]


def test_tasks_and_a_join_make_what_one_command_makes(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("preprocess", [*arguments, "--output-prefix", str(tmp_path / "alone")]) == 0
    tasks = [*arguments, "--output-prefix", str(tmp_path / "tasks")]
    capsys.readouterr()
    for index in (1, 2, 0):
        assert main("preprocess", [*tasks, "--task", f"{index}/3"]) == 0
    assert "task 0/3, " in capsys.readouterr().out
    assert main("preprocess", [*tasks, "--task", "0/3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] > 2
    assert main("preprocess", [*tasks, "--join", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 500
    for kind in ("bin", "idx", "spans"):
        assert (tmp_path / f"tasks.{kind}").read_bytes() == (tmp_path / f"alone.{kind}").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "3/2"], "no task 3 of 2"),
        (["--task", "x"], "not of the form I/N"),
        (["--task", "0/2", "--join"], "--task and --join do not go together"),
        (["--dry-run", "--join"], "--dry-run and --join"),
        (["--tasks", "3"], "go with --datatrove"),
        (["--datatrove", "local"], "--tasks N"),
        ([*DATATROVE, "foo"], "KEY=VALUE"),
        ([*DATATROVE, "=1"], "KEY=VALUE"),
        ([*DATATROVE, "a=1", "--datatrove-option", "a.b=2"], "a has a value already"),
        (["--join"], "no plan of this job"),
    ],
)
def test_what_does_not_go_together_is_said(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main("preprocess", [*arguments, "--output-prefix", str(tmp_path / "out" / "x"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_an_executor_are_numbers_words_and_branches() -> None:
    from megatron_xalign.cli.arguments import nested

    found = nested(["partition=cpu", "cpus_per_task=4", "requeue=false", "sbatch_args.account=p_1", "time=01:00:00"])
    assert found == {
        "partition": "cpu", "cpus_per_task": 4, "requeue": False, "sbatch_args": {"account": "p_1"}, "time": "01:00:00",
    }


def test_a_line_longer_than_asked_counts_as_malformed(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (tmp_path / "fin.jsonl").read_bytes().splitlines()
    short = sum(len(line) <= 100 for line in lines)
    assert 0 < short < 500
    command = [*arguments, "--output-prefix", str(tmp_path / "short"), "--max-line-bytes", "100"]
    assert main("preprocess", command) == 1
    assert "longer than max_line_bytes=100" in capsys.readouterr().err
    assert main("preprocess", [*command, "--on-error", "skip"]) == 0
    manifest = json.loads((tmp_path / "short.manifest.json").read_text(encoding="utf-8"))
    assert manifest["documents"] == short
    assert manifest["counts"]["skipped_lines"] == {"longer than max_line_bytes=100": 500 - short}

"""The command line: help that teaches, one clear line for bad input, exit codes, nothing left behind."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_xalign.cli import build_parser, main
from megatron_xalign.formats.atomic import write_json
from megatron_xalign.training.metrics import append_metrics

VERBS = (
    "quickstart", "corpus", "tokenizer", "preprocess", "verify", "merge", "stats", "pairing",
    "blend", "train", "launch", "import-args", "capture", "neurons", "analyze", "steer", "ablate", "study", "convert",
    "evaluate", "report", "doctor",
)

DOORS = ("preprocess_data",)
"""Verbs with the flags of somebody else's tool, called by a script of its name and not listed among ours."""


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*words, name))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(argv=words)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [words for words, _ in parsers(build_parser()) if not set(words) & set(DOORS)], ids=" ".join
)
def test_every_verb_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv=(*words, "--help")) == 0
    assert f"usage: {' '.join(('xalign', *words))}" in capsys.readouterr().out


def test_the_verbs_are_those_of_the_design() -> None:
    found = {words[0] for words, _ in parsers(build_parser()) if len(words) == 1}
    assert found == {*VERBS, *DOORS}


def test_a_tool_is_a_door_to_one_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", ["--help"]) == 0
    assert "usage: xalign train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quickstart", "--fractions", "0,1.5"), "fraction 1.5 is outside [0, 1]; five percent is written 0.05"),
        (("quickstart", "--fractions", "0,x"), "is not a list of numbers"),
        (("quickstart", "--fractions", "0,0"), "names a fraction twice"),
        (("quickstart", "--steps", "0"), "'0' is not a positive whole number"),
        (("quickstart", "--seed", "-1"), "'-1' is not a whole number of 0 or more"),
        (("corpus", "out", "--monolingual", "en.jsonl"), "is not of the form LANGUAGE=FILE"),
        (("preprocess", "x", "--tokenizer", "t", "--output-prefix", "p", "--pairs", "a,a"), "not a list of different"),
        (
            ("preprocess", "x", "--tokenizer", "t", "--output-prefix", "p", "--pairs", "a,b", "--language", "a"),
            "not allowed with argument",
        ),
        (
            ("preprocess", "x", "--tokenizer", "t", "--output-prefix", "p", "--part-bytes", "64Q"),
            "is not a size in bytes such as 64M",
        ),
        (
            ("preprocess", "x", "--tokenizer", "t", "--output-prefix", "p", "--pairs", "a,b", "--pair-rule", "a_b"),
            "is not pivot, all, or a list",
        ),
        (
            ("preprocess", "x", "--tokenizer", "t", "--output-prefix", "p", "--language-map", "en"),
            "is not a list of CODE=LANGUAGE",
        ),
        (("pairing", "x", "y"), "the following arguments are required: --pairing"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = said(capsys, *words)
    assert (code, message in error) == (2, True), error


def test_bad_input_is_one_line_with_the_way_out_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {mixture: {paralel_fraction: 0.1}}", encoding="utf-8")
    code, error = said(capsys, "train", str(config))
    assert code == 1
    assert error == (
        "xalign: error: unknown setting data.mixture.paralel_fraction; did you mean data.mixture.parallel_fraction?\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "MISSING"), "does not exist"),
        (("blend", "MISSING"), "does not exist"),
        (("verify", "MISSING"), "does not exist"),
        (("merge", "OUT", "MISSING"), "does not exist"),
        (("stats", "MISSING"), "does not exist"),
        (("pairing", "MISSING", "OUT", "--pairing", "shuffled"), "does not exist"),
        (("preprocess", "MISSING", "--language", "x", "--tokenizer", "T", "--output-prefix", "OUT"), "does not exist"),
        (("analyze", "MISSING"), "holds no statistics"),
        (("report", "MISSING"), "does not exist"),
        (("convert", "to-hf", "MISSING", "OUT"), "does not exist"),
        (("tokenizer", "train", "MISSING", "OUT"), "is no corpus folder"),
        (("quickstart", "--corpus", "MISSING", "--out", "OUT"), "pairs.jsonl does not exist"),
        (("corpus", "OUT", "--pairs", "MISSING"), "--monolingual LANGUAGE=FILE and --pairs FILE go together"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_left_behind(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MISSING": str(tmp_path / "missing"), "OUT": str(tmp_path / "out")}
    code, error = said(capsys, *(places.get(word, word) for word in words))
    assert code == 1
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("eng_Latn.jsonl", "fin_Latn.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_text("", encoding="utf-8")
    code, error = said(capsys, "quickstart", "--corpus", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "of 0 pairs" in error


def test_a_quickstart_on_other_text_is_refused_in_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "out" / "quickstart.json", {"text": "registry"})
    code, error = said(capsys, "quickstart", "--corpus", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "holds a quickstart on other text (registry" in error


def test_a_dry_quickstart_says_what_it_would_do_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(argv=["quickstart", "--dry-run", "--out", str(out), "--fractions", "0,0.02", "--steps", "7"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("p0.02", "7 steps", "TP2 PP1", "TP1 PP2", str(out / "hf" / "p0.02")))
    assert not out.exists()


def test_an_unforeseen_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_xalign.workflows.verify", lambda *_: json.loads("{"))
    code, error = said(capsys, "verify", "x")
    assert code == 1
    assert "JSONDecodeError" in error


def test_a_full_disk_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*_: object) -> None:
        # Always full, as the other one is always empty.
        append_metrics(Path("/dev/full"), {"step": 1})

    monkeypatch.setattr("megatron_xalign.workflows.verify", verify)
    code, error = said(capsys, "verify", "x")
    assert code == 1
    assert "there is no room left for /dev/full (No space left on device)" in error and "Traceback" not in error


def test_output_that_nobody_reads_any_more_is_no_fault() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        [sys.executable, "-m", "megatron_xalign", "doctor", "--json"], stdout=write_end, stderr=subprocess.PIPE,
        text=True, timeout=240, check=False,
    )
    os.close(write_end)
    assert (process.returncode, process.stderr) == (141, "")

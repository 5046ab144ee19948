"""Built-in tasks against plain loops and transformers' own loss; a run's checkpoints, each evaluated once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoint import LENGTH, checkpoint_of, random_transformers_model, run_config
from test_to_hf import write_tokenizer

from megatron_xalign import workflows
from megatron_xalign.cli import main
from megatron_xalign.config import DataConfig
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.errors import CorpusError
from megatron_xalign.evaluation import model as models
from megatron_xalign.evaluation.lm_eval_tasks import measured, write_tasks
from megatron_xalign.evaluation.tasks import Request, text_by_language, translation_choice
from megatron_xalign.formats.results import read_results

pytest.importorskip("transformers")


def letters(text: str) -> list[int]:
    return [ord(letter) % 97 for letter in text]


def test_bits_per_byte_are_what_a_loop_gives() -> None:
    # Token t has probability 2 ** -(t + 1), whatever came before.
    def score(requests: Any) -> list[float]:
        return [-math.log(2) * sum(token + 1 for token in rest) for _, rest in requests]

    texts = {"eng_Latn": ["abc", "aé"], "fin_Latn": ["b" * 10]}
    found = {(item.measure, item.subject): item for item in text_by_language(texts, letters, score, 0, 4)}
    bits = sum(token + 1 for text in texts["eng_Latn"] for token in letters(text))
    assert found["eval_bits_per_byte", "eng_Latn"].value == pytest.approx(bits / 6)  # é has two bytes
    assert found["eval_nll_per_token", "eng_Latn"].value == pytest.approx(math.log(2) * bits / 5)
    assert found["eval_bits_per_byte", "fin_Latn"].value == pytest.approx(2.0)  # cut into stretches, none lost
    for item in found.values():
        assert item.low <= item.value <= item.high
    with pytest.raises(CorpusError, match="no text in deu_Latn"):
        text_by_language({"deu_Latn": []}, letters, score, 0, 4)


SOURCES = ["aa", "bb", "cc", "dd", "ee"]
TARGETS = ["AA", "BB", "CC", "DD", "EE"]


def upper(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_model_that_translates_is_right_and_one_that_does_not_is_not() -> None:
    def translates(requests: list[Request]) -> list[float]:
        # The source's letters in capitals are likely; "AA" is likely always, which must not help it.
        likely = [(sum(chr(token).lower() in map(chr, context[1:]) for token in rest)) for context, rest in requests]
        return [5.0 * match + (20.0 if rest == upper("AA") else 0.0) - 50.0
                for match, (_, rest) in zip(likely, requests, strict=True)]

    found = {item.measure: item for item in translation_choice(
        SOURCES, TARGETS, "x-y", upper, translates, start=0, longest=100  # type: ignore[arg-type]
    )}
    assert found["translation_choice"].value == 1.0
    assert found["translation_choice_raw"].value < 1.0
    assert found["translation_choice_chance"].value == 0.25
    same = translation_choice(SOURCES, TARGETS, "x-y", upper, lambda requests: [0.0] * len(requests), 0, 100)
    assert same[0].value == 0.0  # a tie is no preference
    with pytest.raises(CorpusError, match="0 of 5 pairs fit"):
        translation_choice(SOURCES, TARGETS, "x-y", upper, translates, 0, 4)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder with two checkpoints, and held-out text of two languages."""
    folder = tmp_path_factory.mktemp("evaluated")
    sha256 = write_tokenizer(folder / "tokenizer")
    probe = folder / "probe.jsonl"
    probe.write_text("".join(
        json.dumps({"id": str(n), "texts": {"eng_Latn": f"w{n + 1} w{n + 2}", "fin_Latn": f"w{n + 50} w{n + 60} w3"}})
        + "\n" for n in range(6)
    ))
    config = run_config(tokenizer=str(folder / "tokenizer"))
    object.__setattr__(
        config, "data", DataConfig(seq_length=LENGTH, tokenizer=str(folder / "tokenizer"), probe=str(probe))
    )
    for step, seed in ((2, 0), (4, 1)):
        checkpoint_of(
            folder / "run" / "checkpoints" / f"step-{step:06d}", random_transformers_model(config, seed), config,
            tokenizer_sha256=sha256,
        )
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    return folder / "run", probe


def test_every_checkpoint_of_a_run_is_evaluated_once(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, probe = run
    assert main("evaluate", [str(folder)]) == 0
    assert "translation_choice" in capsys.readouterr().out
    results = read_results(folder / "analysis" / "evaluation")
    assert results.steps == [2, 4]
    subjects = {row.subject for row in results.rows}
    assert subjects == {"eng_Latn", "fin_Latn", "eng_Latn-fin_Latn", "fin_Latn-eng_Latn"}
    assert results.rows[0].consumed_tokens == 2 * 32 * LENGTH
    # The oracle: transformers' loss on <eod> and the text, weighted by tokens.
    model = random_transformers_model(run_config(), seed=0)
    nats = count = 0.0
    for line in probe.read_text().splitlines():
        ids = [0, *(int(word[1:]) for word in json.loads(line)["texts"]["fin_Latn"].split())]
        with torch.no_grad():
            nats += model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    (row,) = results.select(measure="eval_nll_per_token", subject="fin_Latn", step=2)
    assert row.value == pytest.approx(nats / count, rel=1e-5)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", never)
        assert main("evaluate", [str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)[str(folder)]["rows"]
    assert [row["value"] for row in again] == [row.value for row in results.rows]
    # Nothing is left of the folders that were evaluated; a damaged cache is measured again.
    evaluation = folder / "analysis" / "evaluation"
    assert not list(evaluation.glob(".evaluating*"))
    next((evaluation / "cache").iterdir()).write_text("{")
    assert main("evaluate", [str(folder)]) == 0
    assert read_results(evaluation).rows == results.rows


def test_a_hugging_face_folder_is_evaluated_on_named_text(run: tuple[Path, Path], tmp_path: Path) -> None:
    hf = workflows.convert_to_hf(run[0], tmp_path / "hf")
    assert main("evaluate", [str(hf)]) == 1  # no text named
    assert main("evaluate", [str(hf), "--texts", str(run[1]), "--most", "5"]) == 0
    assert read_results(hf / "evaluation").select(measure="eval_bits_per_byte", subject="eng_Latn")
    (hf / "tokenizer.json").unlink()
    shutil.rmtree(hf / "evaluation")
    assert main("evaluate", [str(hf), "--texts", str(run[1])]) == 1
    assert not (hf / "evaluation" / "results.json").exists()


def test_numbers_of_lm_eval_become_rows() -> None:
    found = measured({"task": {
        "alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.1, "bits_per_byte,none": 2.0,
        "bits_per_byte_stderr,none": "N/A", "exact_match,strict": 1.0, "sample_len": 7,
    }})
    assert [(item.measure, item.value) for item in found] == [
        ("lm_eval.acc", 0.5), ("lm_eval.bits_per_byte", 2.0), ("lm_eval.exact_match.strict", 1.0)
    ]
    assert (found[0].low, found[0].high) == (pytest.approx(0.304), pytest.approx(0.696))
    assert (found[1].low, found[1].high) == (None, None)


def test_lm_eval_gives_the_bits_per_byte_of_the_built_in_task(run: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install 'lm-eval[hf]>=0.4.9'")
    texts = [json.loads(line)["texts"]["fin_Latn"] for line in run[1].read_text().splitlines()]
    (task,) = write_tasks(tmp_path / "tasks", {"fin_Latn": texts})
    hf = workflows.convert_to_hf(run[0], tmp_path / "hf")
    arguments = [str(hf), "--texts", str(run[1]), "--lm-eval", task, "--include-path", str(tmp_path / "tasks")]
    assert main("evaluate", arguments) == 0
    results = read_results(hf / "evaluation")
    (theirs,) = results.select(measure="lm_eval.bits_per_byte", subject=task)
    (ours,) = results.select(measure="eval_bits_per_byte", subject="fin_Latn")
    assert theirs.value == pytest.approx(ours.value, rel=1e-4)

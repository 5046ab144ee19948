"""Held-out samples: from every source, never trained on, the same in every run."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SourceConfig, TrainingConfig
from megatron_xalign.data.blend import build_blend
from megatron_xalign.data.evaluation import Evaluation, build_evaluation
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.token_file import TokenFileWriter

SEQ_LENGTH, MARKER = 40, 1000
NAMES = ("eng", "fin", "pairs", "tiny")


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 100_000
    eod: int = 0


def write(prefix: Path, languages: list[str], documents: int, longest: int, seed: int) -> None:
    """Documents whose first token is found nowhere else."""
    random = np.random.default_rng(seed)
    origin: Any = "parallel" if len(languages) > 1 else "monolingual"
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin=origin, languages=languages) as writer:
        for number in range(documents):
            sides = [random.integers(2, MARKER, random.integers(1, longest)) for _ in languages]
            sides[0][0] = MARKER + number
            writer.add_document([*((side, index) for index, side in enumerate(sides)), ([0], -1)])
        writer.finish()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write(folder / "eng", ["eng_Latn"], 800, 100, seed=1)
    write(folder / "fin", ["fin_Latn"], 800, 100, seed=2)
    write(folder / "pairs", ["eng_Latn", "fin_Latn"], 800, 15, seed=3)
    # Of its ten documents one is held out, with less text than a sample.
    write(folder / "tiny", ["fin_Latn"], 10, 30, seed=4)
    return folder


def run_of(
    tokens: Path, split: str = "80,10,10", names: tuple[str, ...] = NAMES, cap: int = 20, **mixture: Any
) -> RunConfig:
    return RunConfig(
        data=DataConfig(
            sources=tuple(SourceConfig(prefix=str(tokens / name), max_repeats=50) for name in names),
            seq_length=SEQ_LENGTH,
            split=split,
            mixture=MixtureConfig(**mixture),
        ),
        training=TrainingConfig(
            train_steps=150, global_batch_size=8, micro_batch_size=8, eval_samples_per_source=cap
        ),
    )


def documents_in(rows: dict[str, np.ndarray]) -> set[tuple[int, int]]:
    """(source, first token) of every document that begins in the samples."""
    begins = rows["tokens"] >= MARKER
    return set(zip(rows["source_ids"][begins].tolist(), rows["tokens"][begins].tolist(), strict=True))


def everything(evaluation: Evaluation) -> dict[str, np.ndarray]:
    return evaluation.batch(range(len(evaluation)))


def test_no_document_is_in_two_parts_and_every_source_is_in_each(tokens: Path) -> None:
    config = run_of(tokens, cap=1000, parallel_fraction=0.3)
    config = replace(config, training=replace(config.training, train_steps=700))
    blend = build_blend(config)
    assert min(source["repeats"] for source in blend.audit()["sources"]) > 1.2  # all of the training text was read
    parts = {
        "train": documents_in(blend.batch(range(len(blend)))),
        "validation": documents_in(everything(build_evaluation(config, "validation"))),
        "test": documents_in(everything(build_evaluation(config, "test"))),
    }
    for name, found in parts.items():
        assert {source for source, _ in found} == {0, 1, 2, 3}, name
        for other in parts.keys() - {name}:
            assert not found & parts[other]
    for part in ("validation", "test"):
        for source, documents in ((0, 800), (1, 800), (2, 800), (3, 10)):
            held = {marker for at, marker in parts[part] if at == source}
            # The last few may be in the tail that fills no window.
            assert documents // 10 - 6 <= len(held) <= documents // 10


def test_samples_are_windows_of_each_source_in_turn(tokens: Path) -> None:
    evaluation = build_evaluation(run_of(tokens))
    rows = everything(evaluation)
    assert evaluation.sources_N.tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [3]
    assert evaluation.languages == ["eng_Latn", "fin_Latn"]
    assert evaluation.source_names == list(NAMES)
    assert rows["tokens"].shape == (61, SEQ_LENGTH)
    for k, source in enumerate(evaluation.sources_N.tolist()):
        assert set(rows["source_ids"][k].tolist()) - {-1} == {source}
        np.testing.assert_array_equal(evaluation[k]["tokens"], rows["tokens"][k])
    # The one sample of the tiny source ends in padding without loss.
    text = rows["source_ids"][60] >= 0
    assert 0 < text.sum() < SEQ_LENGTH
    assert rows["loss_mask"][60].sum() == text.sum() - 1
    np.testing.assert_array_equal(evaluation[-1]["tokens"], rows["tokens"][60])
    with pytest.raises(IndexError):
        evaluation[61]


@pytest.mark.parametrize(
    "other", [{"seed": 77}, {"parallel_fraction": 0.4}, {"packing": "mixed_documents", "parallel_fraction": 0.1}]
)
def test_samples_are_the_same_in_every_run(tokens: Path, other: dict[str, Any]) -> None:
    one, two = (everything(build_evaluation(run_of(tokens, **mixture))) for mixture in ({}, other))
    for name, rows in one.items():
        np.testing.assert_array_equal(rows, two[name])


def test_more_samples_begin_with_the_same(tokens: Path) -> None:
    few, many = (build_evaluation(run_of(tokens, names=("eng",), cap=cap)) for cap in (5, 9))
    np.testing.assert_array_equal(everything(few)["tokens"], everything(many)["tokens"][:5])


def test_it_travels_to_a_worker_process(tokens: Path) -> None:
    evaluation = build_evaluation(run_of(tokens))
    there = pickle.loads(pickle.dumps(evaluation))
    np.testing.assert_array_equal(everything(there)["tokens"], everything(evaluation)["tokens"])


def test_nothing_held_out_is_an_error(tokens: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.split=100,0,0 leaves no validation document"):
        build_evaluation(run_of(tokens, split="100,0,0"))
    with pytest.raises(ValueError, match="neither"):
        build_evaluation(run_of(tokens), "train")


def test_a_source_without_held_out_text_is_named(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = build_evaluation(run_of(tokens, split="98,1,1"))
    assert "leaves no validation sample of tiny" in caplog.text
    assert set(evaluation.sources_N.tolist()) == {0, 1, 2}


def test_whole_pairs_are_whole_here_too(tokens: Path) -> None:
    config = run_of(tokens, keep_pairs_whole=True, parallel_fraction=0.2)
    evaluation = build_evaluation(replace(config, data=replace(config.data, seq_length=64)))
    rows = everything(evaluation)
    pairs = evaluation.sources_N == 2
    for token_ids, documents in zip(rows["tokens"][pairs], rows["document_ids"][pairs], strict=True):
        for document in set(documents.tolist()) - {-1}:
            (places,) = np.nonzero(documents == document)
            assert token_ids[places[0]] >= MARKER and token_ids[places[-1]] == 0

"""Series: what is proved on the built indices, that what is wrong is found, and the command."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign import cli
from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SourceConfig, TrainingConfig
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.data.blend import build_blend
from megatron_xalign.data.series import compare_blends, compare_series
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.token_file import TokenFileWriter
from megatron_xalign.terminal import describe_series

HALVES = {"eng_Latn": 0.5, "fin_Latn": 0.5}


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 1000
    eod: int = 0


def write(prefix: Path, languages: list[str], documents: int, longest: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    origin: Any = "parallel" if len(languages) > 1 else "monolingual"
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin=origin, languages=languages) as writer:
        for _ in range(documents):
            sides = [random.integers(2, 1000, random.integers(1, longest)) for _ in languages]
            parts: list[Any] = [part for index, side in enumerate(sides) for part in ((side, index), ([1], -1))]
            writer.add_document([*parts[:-1], ([0], -1)])
        writer.finish()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write(folder / "eng", ["eng_Latn"], 900, 100, seed=1)
    write(folder / "fin", ["fin_Latn"], 900, 100, seed=2)
    write(folder / "pairs", ["eng_Latn", "fin_Latn"], 1500, 20, seed=3)
    return folder


def run_of(tokens: Path, **mixture: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(
            sources=tuple(SourceConfig(prefix=str(tokens / name), max_repeats=3) for name in ("eng", "fin", "pairs")),
            seq_length=48,
            mixture=MixtureConfig(**{"languages": HALVES, "seed": 9, **mixture}),
        ),
        training=TrainingConfig(train_steps=60, global_batch_size=8, micro_batch_size=8),
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("packing", ["source_windows", "mixed_documents"])
def test_a_series_is_proved_on_its_built_indices(tokens: Path, packing: str, whole: bool) -> None:
    config = run_of(tokens, packing=packing, keep_pairs_whole=whole)
    report = json.loads(json.dumps(compare_series(config, [0.2, 0.0, 0.01, 0.05]), allow_nan=False))
    assert report["fractions"] == [0.0, 0.01, 0.05, 0.2]
    assert report["holds"] and all(proof["holds"] for proof in report["proofs"])
    assert len(report["runs"]) == 4
    differs = {entry["what"]: entry["by_run"] for entry in report["differs"]}
    pairs = differs["pairs begun"]
    assert pairs == sorted(pairs) and pairs[0] == 0
    assert differs["parallel fraction asked"] == report["fractions"]
    text = describe_series(report)
    assert text.count("proved") == len(report["proofs"]) and "FAILED" not in text
    for what in differs:
        assert what in text


def test_with_add_monolingual_text_is_the_same(tokens: Path) -> None:
    report = compare_series(run_of(tokens, budget_rule="add"), [0.0, 0.2])
    assert report["holds"]
    differs = {entry["what"]: entry["by_run"] for entry in report["differs"]}
    steps = differs["steps"]
    assert steps[1] > steps[0] == 60
    monolingual = [[audit["languages"][code]["monolingual"] for audit in report["runs"]] for code in HALVES]
    for without, added in monolingual:
        # A step of samples at most: the run is whole steps.
        assert abs(added - without) <= 8 * 48


def failing(report: dict[str, Any]) -> list[str]:
    return [proof["name"] for proof in report["proofs"] if not proof["holds"]]


def test_another_order_of_a_source_is_found(tokens: Path) -> None:
    blends = [
        build_blend(run_of(tokens, parallel_fraction=0.05)), build_blend(run_of(tokens, parallel_fraction=0.1, seed=8))
    ]
    assert "one order of every source" in failing(compare_blends(blends))


def test_other_text_of_the_same_name_is_found(tokens: Path, tmp_path: Path) -> None:
    write(tmp_path / "eng", ["eng_Latn"], 900, 100, seed=77)
    config = run_of(tokens, parallel_fraction=0.1)
    sources = (replace(config.data.sources[0], prefix=str(tmp_path / "eng")), *config.data.sources[1:])
    other = build_blend(replace(config, data=replace(config.data, sources=sources)))
    report = compare_blends([build_blend(run_of(tokens, parallel_fraction=0.05)), other])
    assert failing(report) == ["one order of every source"]
    assert "eng is not the same text" in report["proofs"][0]["detail"]


def test_an_index_whose_rows_are_not_what_it_counts_is_found(tokens: Path) -> None:
    blends = [build_blend(run_of(tokens, parallel_fraction=fraction)) for fraction in (0.05, 0.1)]
    ids_R = blends[1].order.ids_R.copy()
    ids_R[:2] = ids_R[1], ids_R[0]
    ids_R[5] = 0 if ids_R[5] else 1
    blends[1].order = replace(blends[1].order, ids_R=ids_R)
    assert "a prefix of every order" in failing(compare_blends(blends))


def test_less_parallel_text_at_a_larger_fraction_is_found(tokens: Path) -> None:
    blends = [build_blend(run_of(tokens, parallel_fraction=fraction)) for fraction in (0.2, 0.1)]
    assert failing(compare_blends(blends)) == ["parallel text of a smaller fraction begins that of a larger one"]


def test_shares_that_are_not_the_same_are_found(tokens: Path) -> None:
    other = {"eng_Latn": 0.4, "fin_Latn": 0.6}
    blends = [
        build_blend(run_of(tokens, parallel_fraction=0.1)),
        build_blend(run_of(tokens, parallel_fraction=0.2, languages=other)),
    ]
    assert failing(compare_blends(blends)) == ["language shares are equal"]


@pytest.mark.parametrize("fractions", [[0.1], [0.1, 0.1]])
def test_a_series_needs_two_fractions(tokens: Path, fractions: list[float]) -> None:
    with pytest.raises(ConfigError, match="two or more different fractions"):
        compare_series(run_of(tokens), fractions)


def test_a_schedule_is_no_series_of_fractions(tokens: Path) -> None:
    phase: Any = {"until_tokens": 1000, "parallel_fraction": 0.1}
    from megatron_xalign.config import SchedulePhase

    with pytest.raises(ConfigError, match=r"data\.mixture\.schedule"):
        compare_series(run_of(tokens, schedule=(SchedulePhase(**phase),)), [0.0, 0.1])


def test_the_command_proves_a_series_and_says_so(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_of(tokens)), encoding="utf-8")
    assert cli.main("blend", [str(path), "--series", "0,0.05,0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"]
    assert cli.main("blend", [str(path), "--series", "0,0.05,0.2"]) == 0
    assert "proved: language shares are equal" in capsys.readouterr().out

    from megatron_xalign.data import series

    honest = series.compare_blends
    monkeypatch.setattr(series, "compare_blends", lambda blends: honest(blends[::-1]))
    assert cli.main("blend", [str(path), "--series", "0,0.05,0.2"]) == 1
    assert "FAILED: parallel text" in capsys.readouterr().out
    assert cli.main("blend", [str(path), "--series", "0,x"]) == 2


def test_the_command_shows_ranks_and_an_audit(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_of(tokens, parallel_fraction=0.1)), encoding="utf-8")
    assert cli.main("blend", [str(path), "--data-parallel-size", "2", "--data-parallel-size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "4 data-parallel ranks" in shown and "asked 10.0000%" in shown and "holds: yes" in shown
    assert cli.main("blend", [str(path), "--data-parallel-size", "4", "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert len(audit["data_parallel"]["4"]["ranks"]) == 4
    # Samples as text need a tokenizer; asked for without one, that is an error.
    assert cli.main("blend", [str(path), "--samples", "3"]) == 1
    assert "data.tokenizer is not set" in capsys.readouterr().err

"""Losses by language and source against a loop over tokens; the metrics file after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xalign.batch import Batch
from megatron_xalign.errors import FormatError
from megatron_xalign.training.metrics import LossSums, append_metrics, readable, truncate_metrics, with_columns_of

LANGUAGES, SOURCES = ["eng_Latn", "fin_Latn", "ell_Grek"], ["mono", "pairs"]


class OneProcess:
    """Stands in for ``Ranks`` of a job of one process."""

    device = torch.device("cpu")
    pipeline_size = 1
    data_context_rank = 0

    def sum_over(self, tensor: torch.Tensor, axis: str) -> torch.Tensor:
        return tensor.clone()

    def broadcast_over(self, tensor: torch.Tensor, axis: str, source: int) -> torch.Tensor:
        return tensor.clone()


class SecondOfTwo(OneProcess):
    data_context_rank = 1


def random_batch(seed: int, rows: int = 3, length: int = 11) -> tuple[Batch, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, (rows, length), generator=generator).to(dtype)

    batch = Batch(
        tokens=integers(0, 9, torch.int64), labels=integers(0, 9, torch.int64),
        loss_mask=integers(0, 2, torch.float32), position_ids=integers(0, 9, torch.int64),
        language_ids=integers(-1, 3, torch.int8), label_language_ids=integers(-1, 2, torch.int8),
        source_ids=integers(-1, 2, torch.int16), document_ids=integers(0, 2, torch.int32),
    )
    return batch, torch.rand(rows, length, generator=generator) * 5


def expected(batches: list[tuple[Batch, torch.Tensor]]) -> dict[str, Any]:
    everything: list[float] = []
    by_language: dict[str, list[float]] = {}
    by_source: dict[str, list[float]] = {}
    content: dict[str, int] = {}
    for batch, losses in batches:
        for row in range(losses.shape[0]):
            for position in range(losses.shape[1]):
                if batch.loss_mask[row, position] == 0:
                    continue
                loss = float(losses[row, position])
                language, source = int(batch.label_language_ids[row, position]), int(batch.source_ids[row, position])
                everything.append(loss)
                if language >= 0:
                    by_language.setdefault(LANGUAGES[language], []).append(loss)
                if source >= 0:
                    by_source.setdefault(SOURCES[source], []).append(loss)
                    if language >= 0:
                        content[SOURCES[source]] = content.get(SOURCES[source], 0) + 1
    return {
        "tokens_by_language": {name: len(by_language.get(name, [])) for name in LANGUAGES},
        "tokens_by_source": {name: len(by_source.get(name, [])) for name in SOURCES},
        "parallel_fraction": content["pairs"] / sum(content.values()),
        "loss": np.mean(everything),
        "loss_by_language": {name: np.mean(losses) for name, losses in by_language.items()},
        "loss_by_source": {name: np.mean(losses) for name, losses in by_source.items()},
    }


def sums_for(ranks: Any) -> LossSums:
    return LossSums(LANGUAGES, SOURCES, ranks, ["pairs"])


def assert_same(means: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert means["loss"] == pytest.approx(wanted["loss"])
    for key in ("loss_by_language", "loss_by_source"):
        assert means[key] == pytest.approx(wanted[key])


def assert_same_counts(means: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert means["tokens_by_language"] == wanted["tokens_by_language"]
    assert means["tokens_by_source"] == wanted["tokens_by_source"]
    assert means["parallel_fraction"] == pytest.approx(wanted["parallel_fraction"])


def test_means_are_weighted_by_tokens_and_split_by_language_and_source() -> None:
    sums = sums_for(OneProcess())
    batches = [random_batch(seed, rows=seed + 1) for seed in range(3)]
    for batch, losses in batches:
        sums.add(batch, losses)
    means = sums.take()
    assert_same(means, expected(batches))
    assert_same_counts(means, expected(batches))
    assert "ell_Grek" not in means["loss_by_language"], "no label was in this language"


def test_a_z_loss_is_reported_beside_the_loss_and_survives_a_checkpoint() -> None:
    sums = LossSums(LANGUAGES, SOURCES, OneProcess(), ["pairs"], with_z_loss=True)  # type: ignore[arg-type]
    batches = [random_batch(5), random_batch(6)]
    parts = []
    for batch, losses in batches:
        z_loss = losses.square()
        sums.add(batch, losses, z_loss)
        sums.restore(json.loads(json.dumps(sums.state())))
        parts.append(z_loss[batch.loss_mask > 0])
    # A run may go on without it, or begin it.
    without = sums_for(OneProcess())
    without.restore(sums.state())
    begun = LossSums(LANGUAGES, SOURCES, OneProcess(), ["pairs"], with_z_loss=True)  # type: ignore[arg-type]
    begun.restore(without.state())
    means = sums.take()
    assert means["z_loss"] == pytest.approx(float(torch.cat(parts).double().mean()))
    assert_same(means, expected(batches))
    for other in (without, begun):
        of_other = other.take()
        assert_same(of_other, expected(batches))
        assert_same_counts(of_other, expected(batches))
        assert of_other.get("z_loss", 0.0) == 0.0
    assert "z_loss" not in sums_for(OneProcess()).take()


def test_taking_starts_a_new_interval() -> None:
    sums = sums_for(OneProcess())
    sums.add(*random_batch(1))
    sums.take()
    second = random_batch(2)
    sums.add(*second)
    means = sums.take()
    assert_same(means, expected([second]))
    assert_same_counts(means, expected([random_batch(1), second]))


def test_sums_of_a_checkpoint_go_on_where_they_were_on_one_rank_only() -> None:
    sums, batches = sums_for(OneProcess()), [random_batch(3), random_batch(4)]
    sums.add(*batches[0])
    state = json.loads(json.dumps(sums.state()))
    resumed, other = sums_for(OneProcess()), sums_for(SecondOfTwo())
    resumed.restore(state)
    other.restore(state)
    assert np.abs(other.state()).sum() == 0, "the sums would be counted twice"
    resumed.add(*batches[1])
    means = resumed.take()
    assert_same(means, expected(batches))
    assert_same_counts(means, expected(batches))
    with pytest.raises(ValueError, match=r"loss sums of .* columns"):
        LossSums(["one"], SOURCES, OneProcess()).restore(state)  # type: ignore[arg-type]


def write(path: Path, steps: list[int], tail: str = "") -> None:
    for step in steps:
        append_metrics(path, {"step": step, "loss": 1.0 / step})
    with path.open("a", encoding="utf-8") as file:
        file.write(tail)


def test_a_resumed_run_drops_later_lines_and_one_cut_off_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30, 40], tail='{"step": 50, "lo')
    truncate_metrics(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    append_metrics(path, {"step": 30})
    assert path.read_text().endswith('{"step": 30}\n')


def test_starting_afresh_empties_the_file_and_a_missing_one_is_fine(tmp_path: Path) -> None:
    truncate_metrics(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()
    write(tmp_path / "metrics.jsonl", [10])
    truncate_metrics(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [10], tail="garbage\n")
    write(path, [20])
    with pytest.raises(FormatError, match=r"metrics\.jsonl line 2 is not a JSON object with a step: 'garbage'"):
        truncate_metrics(path, 20)
    assert "garbage" in path.read_text(), "nothing may be lost"


def test_a_line_of_other_bytes_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n{"st\xffep": 20}\n{"step": 30}\n')
    with pytest.raises(FormatError, match=r"line 2 is not a JSON object with a step.*Take that line out"):
        truncate_metrics(path, 20)
    path.write_bytes(b'{"step": 10}\n{"step": 20}\n{"st\xff')
    truncate_metrics(path, 20)
    assert path.read_bytes() == b'{"step": 10}\n{"step": 20}\n'


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        append_metrics(tmp_path / "metrics.jsonl", {"step": 1, "loss": float("nan")})


def test_sums_go_on_where_languages_and_sources_are_others() -> None:
    """As if the second run had been there from the beginning and had none of what is new to it."""
    batch, loss_BS = random_batch(3)
    ranks: Any = OneProcess()
    before = LossSums(LANGUAGES, SOURCES, ranks, ["pairs"])
    before.add(batch, loss_BS)
    languages, sources = ["swe_Latn", *LANGUAGES[::-1]], ["web", *SOURCES[::-1]]
    now = LossSums(languages, sources, ranks, ["pairs"])
    now.restore(with_columns_of(before.state(), (LANGUAGES, SOURCES), (languages, sources)))
    line, other = now.take(), before.take()
    for name in ("loss", "loss_by_language", "loss_by_source", "parallel_fraction"):
        assert line[name] == other[name]
    assert line["tokens_by_language"] == other["tokens_by_language"] | {"swe_Latn": 0}
    assert line["tokens_by_source"] == other["tokens_by_source"] | {"web": 0}
    with_z = [[1.0] * 11] * 3 + [[0.5]]
    assert with_columns_of(with_z, (LANGUAGES, SOURCES), (LANGUAGES, SOURCES)) == with_z


def test_a_line_for_people_has_what_they_look_for() -> None:
    line = {
        "step": 120, "loss": 3.21049, "loss_by_language": {"eng_Latn": 3.1, "fin_Latn": 3.4}, "grad_norm": 0.5215,
        "lr": 3e-4, "tokens_per_second": 12345.6, "memory_gib": 1.25, "seconds_left": 5025.4, "mfu": 0.412,
        "parallel_fraction": 0.0499,
    }
    assert readable(line, 2000) == (
        "step 120/2000 | loss 3.2105 (eng_Latn 3.100, fin_Latn 3.400) | parallel 4.99 % | gradient 0.521 | lr 0.0003 | "
        "12,346 tokens/s | MFU 41.2 % | 1.2 GiB | 1:23:45 left"
    )

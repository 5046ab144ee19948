"""Validation losses by language and source against a plain loop, on any number of data-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered_samples import LENGTH, NumberedSamples

from megatron_xalign.batch import Batch
from megatron_xalign.config import TrainingConfig
from megatron_xalign.training.validation import ValidationObserver

CONFIG = TrainingConfig(train_steps=7, global_batch_size=4, micro_batch_size=2, eval_interval_steps=3)
NUM_SAMPLES = 7


class Ranks:
    """One data-parallel rank after another; their sums are added up by the test."""

    device = torch.device("cpu")
    pipeline_size = 1
    rank = context_rank = 0

    def __init__(self, data_rank: int, data_size: int, sums: list[torch.Tensor]) -> None:
        self.data_rank, self.data_size, self.sums = data_rank, data_size, sums

    def sum_over(self, tensor: torch.Tensor, axis: str) -> torch.Tensor:
        assert axis == "data_context"
        self.sums.append(tensor.clone())
        return torch.stack(self.sums[-self.data_rank - 1 :]).sum(0)

    def broadcast_over(self, tensor: torch.Tensor, axis: str, source: int) -> torch.Tensor:
        return tensor


def loss_of(tokens: np.ndarray | torch.Tensor) -> Any:
    return (tokens % 7) + tokens / 100


def forward_only(batches: list[Batch]) -> list[torch.Tensor]:
    return [loss_of(batch.tokens).float() for batch in batches]


def observer(path: Path, ranks: Ranks, start_step: int = 0) -> ValidationObserver:
    return ValidationObserver(
        NumberedSamples(NUM_SAMPLES), CONFIG, seq_length=LENGTH, ranks=ranks,  # type: ignore[arg-type]
        forward_only=forward_only, languages=["eng_Latn", "fin_Latn"], source_names=["a", "b"],  # type: ignore[arg-type]
        path=path, start_step=start_step,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("data_size", [1, 2, 3, 5])
def test_every_sample_counts_once_whatever_the_number_of_ranks(tmp_path: Path, data_size: int) -> None:
    sums: list[torch.Tensor] = []
    for data_rank in range(data_size):
        path = tmp_path / f"rank-{data_rank}.jsonl"
        observer(path, Ranks(data_rank, data_size, sums)).before_step(0)
    arrays = NumberedSamples(NUM_SAMPLES).batch(list(range(NUM_SAMPLES)))
    losses, languages, sources = loss_of(arrays["tokens"]), arrays["label_language_ids"], arrays["source_ids"]
    # The last rank's line holds the sums of all, as each rank's does where they are really summed.
    (line,) = lines(path)
    assert line["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    for index, code in enumerate(["eng_Latn", "fin_Latn"]):
        assert line["loss_by_language"][code] == pytest.approx(losses[languages == index].mean(), rel=1e-6)
    for index, name in enumerate("ab"):
        assert line["loss_by_source"][name] == pytest.approx(losses[sources == index].mean(), rel=1e-6)


def test_it_measures_at_the_start_at_every_interval_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    watcher = observer(path, Ranks(0, 1, []))
    for step in range(7):
        watcher.before_step(step)
        watcher.after_step(step + 1, {})
    assert [(line["step"], line["consumed_tokens"]) for line in lines(path)] == [
        (step, step * 4 * LENGTH) for step in (0, 3, 6, 7)
    ]
    assert len({line["loss"] for line in lines(path)}) == 1


def test_a_resumed_run_measures_later_steps_again(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    watcher = observer(path, Ranks(0, 1, []))
    watcher.before_step(0)
    watcher.after_step(3, {})
    watcher.after_step(6, {})
    observer(path, Ranks(0, 1, []), start_step=4).after_step(6, {})
    assert [line["step"] for line in lines(path)] == [0, 3, 6]

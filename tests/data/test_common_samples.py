"""How many samples two runs begin with in common, against comparing the samples themselves."""

# N samples, S sequence

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SchedulePhase, SourceConfig, TrainingConfig
from megatron_xalign.data import common_samples as module
from megatron_xalign.data.blend import Blend, build_blend
from megatron_xalign.data.common_samples import common_samples
from megatron_xalign.formats.token_file import TokenFileWriter

SEQ_LENGTH, BATCH = 64, 12


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 100_000
    eod: int = 0


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    languages = {"eng": ["eng_Latn"], "fin": ["fin_Latn"], "pairs": ["eng_Latn", "fin_Latn"]}
    for number, (name, sides) in enumerate(languages.items()):
        random = np.random.default_rng(number)
        origin: Any = "parallel" if len(sides) > 1 else "monolingual"
        with TokenFileWriter(folder / name, tokenizer=Tokenizer(), origin=origin, languages=sides) as writer:
            for _ in range(900):
                # Tokens of a width at which no two documents are alike.
                parts: list[Any] = [
                    (random.integers(2, 100_000, random.integers(1, 60)), side) for side in range(len(sides))
                ]
                writer.add_document([*parts, ([0], -1)])
            writer.finish()
    return folder


def blend_of(
    tokens: Path, fractions: list[tuple[int, float]], steps: int, packing: str = "source_windows",
    names: tuple[str, ...] = ("eng", "fin", "pairs"),
) -> Blend:
    schedule = tuple(SchedulePhase(until_tokens=until, parallel_fraction=fraction) for until, fraction in fractions)
    mixture: Any = {"schedule": schedule, "seed": 5, "packing": packing}
    return build_blend(RunConfig(
        data=DataConfig(
            sources=tuple(SourceConfig(prefix=str(tokens / name), max_repeats=9) for name in names),
            seq_length=SEQ_LENGTH, mixture=MixtureConfig(**mixture),
        ),
        training=TrainingConfig(train_steps=steps, global_batch_size=BATCH, micro_batch_size=BATCH),
    ))


def truth(before: Blend, now: Blend, num_samples: int) -> int:
    """By the samples as they are served, in whole batches."""
    looked_at = min(len(before), len(now))
    one, other = before.batch(range(looked_at)), now.batch(range(looked_at))
    same_N = np.all(one["tokens"] == other["tokens"], axis=1) & np.all(one["loss_mask"] == other["loss_mask"], axis=1)
    same = int(np.argmin(same_N)) if not same_N.all() else looked_at
    same = same // BATCH * BATCH
    return num_samples if same >= num_samples else same


@pytest.mark.parametrize("packing", ["source_windows", "mixed_documents"])
@pytest.mark.parametrize("rows_at_a_time", [7, 1 << 22])
def test_it_is_what_the_samples_say(
    tokens: Path, packing: str, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", rows_at_a_time)
    always, batch_tokens = 1 << 40, BATCH * SEQ_LENGTH
    runs = [
        blend_of(tokens, fractions, steps, packing)
        for fractions, steps in [
            ([(always, 0.0)], 20), ([(always, 0.0)], 31), ([(9 * batch_tokens, 0.0), (always, 0.3)], 20),
            ([(9 * batch_tokens + 5 * SEQ_LENGTH, 0.0), (always, 0.5)], 31), ([(always, 0.3)], 20),
        ]
    ]
    found = set()
    for before in runs:
        for now in runs:
            for num_samples in (0, 1, BATCH, 9 * BATCH, 9 * BATCH + 5, 10 * BATCH, 20 * BATCH):
                common = common_samples(before, now, num_samples)
                assert common == truth(before, now, num_samples)
                found.add(common)
    # Nothing in common, all, up to the batch where the schedules part, and a batch that parts in its middle.
    assert {0, 9 * BATCH, 9 * BATCH + 5, 20 * BATCH} <= found


@pytest.mark.parametrize("packing", ["source_windows", "mixed_documents"])
def test_a_source_that_comes_later_is_no_difference_before(tokens: Path, packing: str) -> None:
    always, batch_tokens = 1 << 40, BATCH * SEQ_LENGTH
    without = blend_of(tokens, [(always, 0.0)], 20, packing, ("eng", "fin"))
    later = blend_of(tokens, [(9 * batch_tokens, 0.0), (always, 0.3)], 20, packing, ("pairs", "eng", "fin"))
    assert common_samples(without, later, 9 * BATCH) == truth(without, later, 9 * BATCH)
    assert common_samples(without, later, 9 * BATCH) == 9 * BATCH
    assert common_samples(without, later, 20 * BATCH) == truth(without, later, 20 * BATCH) < 20 * BATCH


def test_packed_in_other_ways_nothing_is_common(tokens: Path) -> None:
    always = [(1 << 40, 0.3)]
    assert common_samples(blend_of(tokens, always, 9), blend_of(tokens, always, 9, "mixed_documents"), BATCH) == 0


def test_a_blend_has_all_in_common_with_itself(tokens: Path) -> None:
    blend = blend_of(tokens, [(1 << 40, 0.3)], 9, "mixed_documents")
    assert common_samples(blend, replace_order(blend), len(blend)) == len(blend)


def replace_order(blend: Blend) -> Blend:
    """The same with an order of its own."""
    other = Blend(blend.plan, blend.windows, replace(blend.order, ids_R=blend.order.ids_R.copy()), blend._config)
    assert other.order is not blend.order
    return other

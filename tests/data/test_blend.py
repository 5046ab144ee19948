"""Samples of a run and their audit, against brute-force counting of the samples as served."""

# S sequence, N samples

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SourceConfig, TrainingConfig
from megatron_xalign.data import order as order_module
from megatron_xalign.data.blend import Blend, build_blend, describe_audit, readable_samples
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.token_file import TokenFileWriter

SEQ_LENGTH, BATCH = 48, 8
HALVES = {"eng_Latn": 0.5, "fin_Latn": 0.5}


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 1000
    eod: int = 0


def write_monolingual(prefix: Path, language: str, documents: int, longest: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin="monolingual", languages=[language]) as writer:
        for _ in range(documents):
            writer.add_document([(random.integers(2, 1000, random.integers(1, longest)), 0), ([0], -1)])
        writer.finish()


def write_pairs(prefix: Path, languages: list[str], documents: int, seed: int, sha256: str = "a" * 64) -> None:
    random = np.random.default_rng(seed)
    with TokenFileWriter(prefix, tokenizer=Tokenizer(sha256), origin="parallel", languages=languages) as writer:
        for _ in range(documents):
            # Of very different lengths, so that the halves of a window are far from even.
            sides = [random.integers(2, 1000, random.integers(2, 30)) for _ in languages]
            parts: list[Any] = [part for index, side in enumerate(sides) for part in ((side, index), ([1], -1))]
            writer.add_document([*parts[:-1], ([0], -1)])
        writer.finish()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_monolingual(folder / "eng", "eng_Latn", 500, 200, seed=1)
    write_monolingual(folder / "fin", "fin_Latn", 900, 100, seed=2)
    write_monolingual(folder / "finweb", "fin_Latn", 100, 300, seed=3)
    write_monolingual(folder / "swe", "swe_Latn", 800, 60, seed=4)
    write_pairs(folder / "pairs", ["eng_Latn", "fin_Latn"], 1200, seed=5)
    write_pairs(folder / "trios", ["fin_Latn", "swe_Latn", "eng_Latn"], 600, seed=6)
    return folder


def run_of(
    tokens: Path,
    fraction: float,
    names: tuple[str, ...] = ("eng", "fin", "pairs"),
    steps: int = 40,
    repeats: float = 4.0,
    seed: int = 11,
    **mixture: Any,
) -> RunConfig:
    return RunConfig(
        data=DataConfig(
            sources=tuple(SourceConfig(prefix=str(tokens / name), max_repeats=repeats) for name in names),
            seq_length=SEQ_LENGTH,
            mixture=MixtureConfig(parallel_fraction=fraction, seed=seed, **mixture),
        ),
        training=TrainingConfig(train_steps=steps, global_batch_size=BATCH, micro_batch_size=BATCH),
    )


def drawn(blend: Blend) -> list[tuple[int, int]]:
    return [blend.origin_of(sample) for sample in range(len(blend))]


def draws_of(blend: Blend, name: str) -> list[bytes]:
    """Tokens of every sample of a source, in the order of the source."""
    index = blend.source_names.index(name)
    found = {draw: blend[k]["tokens"].tobytes() for k, (source, draw) in enumerate(drawn(blend)) if source == index}
    assert sorted(found) == list(range(len(found)))
    return [found[draw] for draw in range(len(found))]


def test_a_sample_has_the_fields_of_a_batch_and_their_types(tokens: Path) -> None:
    batch = pytest.importorskip("megatron_xalign.batch")
    sample = build_blend(run_of(tokens, 0.3))[0]
    assert {item.name for item in fields(batch.Batch)} <= set(sample)
    dtypes = {name: array.dtype.name for name, array in sample.items()}
    assert dtypes == {
        "tokens": "int64", "labels": "int64", "loss_mask": "float32", "position_ids": "int64", "language_ids": "int8",
        "label_language_ids": "int8", "source_ids": "int16", "document_ids": "int32",
    }  # fmt: skip
    assert {array.shape for array in sample.values()} == {(SEQ_LENGTH,)}
    assert batch.collate([sample, sample]).tokens.shape == (2, SEQ_LENGTH)


def test_labels_and_their_languages_are_the_next_tokens(tokens: Path) -> None:
    blend = build_blend(run_of(tokens, 0.3))
    for k in range(40):
        sample = blend[k]
        np.testing.assert_array_equal(sample["labels"][:-1], sample["tokens"][1:])
        np.testing.assert_array_equal(sample["label_language_ids"][:-1], sample["language_ids"][1:])
        # Ids 0 and 1 are end of document and template in these files, all others are content.
        np.testing.assert_array_equal(sample["language_ids"] >= 0, sample["tokens"] > 1)
        np.testing.assert_array_equal(sample["label_language_ids"] >= 0, sample["labels"] > 1)
        np.testing.assert_array_equal(sample["position_ids"], np.arange(SEQ_LENGTH))
        assert set(sample["loss_mask"].tolist()) == {1.0}


@pytest.mark.parametrize("fraction_of", ["content", "all"])
@pytest.mark.parametrize("rule", ["replace", "add"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.4])
def test_audit_is_what_counting_the_served_samples_gives(
    tokens: Path, fraction: float, fraction_of: str, rule: str
) -> None:
    config = run_of(
        tokens, fraction, ("eng", "fin", "finweb", "pairs"), languages=HALVES, fraction_of=fraction_of, budget_rule=rule
    )
    blend = build_blend(config)
    samples, content = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for k in range(len(blend)):
        sample = blend[k]
        (source,) = set(sample["source_ids"].tolist())
        name = blend.source_names[source]
        samples[name] += 1
        for language in sample["language_ids"].tolist():
            if language >= 0:
                content[name][blend.languages[language]] += 1

    audit = json.loads(json.dumps(blend.audit(), allow_nan=False))
    for source in audit["sources"]:
        name = source["name"]
        assert source["samples"] == samples[name]
        assert source["tokens"] == source["loss_tokens"] == samples[name] * SEQ_LENGTH
        assert source["content_tokens_by_language"] == dict(content[name])
        assert source["content_tokens"] == content[name].total()
        assert source["repeats"] == samples[name] * SEQ_LENGTH / source["available_tokens"]
    total = sum(counts.total() for counts in content.values())
    achieved = audit["achieved"]
    assert (audit["samples"], audit["content_tokens"]) == (len(blend), total)
    assert achieved["parallel_fraction_content"] == content["pairs"].total() / total
    assert achieved["parallel_fraction_all"] == achieved["parallel_fraction_loss"] == samples["pairs"] / len(blend)
    assert achieved["parallel_fraction"] == achieved[f"parallel_fraction_{fraction_of}"]
    whole = total if fraction_of == "content" else len(blend) * SEQ_LENGTH
    difference = abs(fraction - achieved["parallel_fraction"]) * whole / SEQ_LENGTH
    assert audit["difference_samples"] == pytest.approx(difference)
    assert audit["holds"] and difference <= 1
    for code, entry in audit["languages"].items():
        assert entry["parallel"] == content["pairs"][code]
        assert entry["content_tokens"] == sum(counts[code] for counts in content.values())
        assert entry["monolingual"] == entry["content_tokens"] - entry["parallel"]
        shared, of = (
            (entry["monolingual"], total - content["pairs"].total())
            if rule == "add"
            else (entry["content_tokens"], total)
        )
        assert entry["achieved"] == shared / of
        assert abs(shared - 0.5 * of) <= SEQ_LENGTH


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    percent=st.integers(0, 60),
    names=st.sampled_from(
        [("eng", "fin", "pairs"), ("eng", "fin", "finweb", "swe", "trios"), ("eng", "fin", "swe", "pairs", "trios")]
    ),
    seed=st.integers(0, 2**31),
    fraction_of=st.sampled_from(["content", "all"]),
)
def test_fraction_and_languages_hold_at_every_prefix(
    tokens: Path, percent: int, names: tuple[str, ...], seed: int, fraction_of: str
) -> None:
    fraction = percent / 100
    blend = build_blend(run_of(tokens, fraction, names, seed=seed, fraction_of=fraction_of, repeats=9))
    audit = blend.audit()
    # Batches are shuffled inside, so whole batches are the prefixes that training sees.
    counts_NK = np.zeros((len(blend), len(blend.languages)), dtype=np.int64)
    is_parallel = np.zeros(len(blend), dtype=bool)
    for k, (source, draw) in enumerate(drawn(blend)):
        counts_NK[k] = blend.windows[source].windows(draw, draw + 1).content_NK[0]
        is_parallel[k] = audit["sources"][source]["origin"] == "parallel"
    counted = counts_NK.sum(axis=1) if fraction_of == "content" else np.full(len(blend), SEQ_LENGTH)
    at = np.arange(BATCH - 1, len(blend), BATCH)
    off = np.abs(np.cumsum(counted * is_parallel) - fraction * np.cumsum(counted))[at] / SEQ_LENGTH
    assert off.max() <= 0.5 + 1e-9
    assert off.max() <= audit["worst_difference_samples"] + 1e-9
    shares = np.array([audit["asked"]["languages"][code] for code in blend.languages])
    total = np.cumsum(counts_NK.sum(axis=1))[:, None]
    assert np.abs(np.cumsum(counts_NK, axis=0) - shares * total)[at].max() / SEQ_LENGTH <= 2


def test_unigram_entropy_is_scipy_s_of_the_weighted_frequencies(tokens: Path) -> None:
    blend = build_blend(run_of(tokens, 0.3))
    frequency = np.zeros(1000)
    for source, drawn in zip(blend.windows, blend.drawn, strict=True):
        seen = Counter(token for document in source.file for token in document.tolist())
        for token, count in seen.items():
            frequency[token] += drawn / len(blend) * count / seen.total()
    assert blend.unigram_entropy() == pytest.approx(scipy.stats.entropy(frequency), abs=1e-12)


def test_in_a_series_every_run_reads_a_prefix_of_the_same_order(tokens: Path) -> None:
    blends = {fraction: build_blend(run_of(tokens, fraction, languages=HALVES)) for fraction in (0.0, 0.01, 0.05, 0.3)}
    for name in ("eng", "fin", "pairs"):
        orders = sorted((draws_of(blend, name) for blend in blends.values()), key=len)
        for shorter, longer in itertools.pairwise(orders):
            assert longer[: len(shorter)] == shorter
    assert len(draws_of(blends[0.01], "pairs")) < len(draws_of(blends[0.05], "pairs"))
    audits = [blend.audit() for blend in blends.values()]
    for code in HALVES:
        shares = [audit["languages"][code]["achieved"] for audit in audits]
        assert max(shares) - min(shares) <= 2 * SEQ_LENGTH / audits[0]["content_tokens"]


def test_a_longer_run_keeps_every_sample(tokens: Path) -> None:
    short, long = (build_blend(run_of(tokens, 0.05, languages=HALVES, steps=steps)) for steps in (7, 80))
    assert drawn(long)[: len(short)] == drawn(short)
    for k in range(len(short)):
        for name, array in short[k].items():
            np.testing.assert_array_equal(array, long[k][name])


def test_more_room_for_repeats_keeps_every_sample(tokens: Path) -> None:
    # So tight that the allowance, not the need, is what the index builder looks at.
    built = build_blend(run_of(tokens, 0.3, repeats=1.0, steps=40))
    assert drawn(built) == drawn(build_blend(run_of(tokens, 0.3, repeats=50.0, steps=40)))


def test_every_global_batch_is_a_shuffle_of_what_was_drawn_for_it(tokens: Path) -> None:
    blend = build_blend(run_of(tokens, 0.25, languages=HALVES))
    served = drawn(blend)
    moved = 0
    next_draw: Counter[int] = Counter()
    for step in range(blend.train_steps):
        batch = served[step * BATCH : (step + 1) * BATCH]
        # A batch holds, of each source, exactly the samples that come next in it.
        for source, samples in itertools.groupby(sorted(batch), key=lambda origin: origin[0]):
            draws = [draw for _, draw in samples]
            assert draws == list(range(next_draw[source], next_draw[source] + len(draws)))
            next_draw[source] += len(draws)
        moved += batch != sorted(batch)
    assert moved > blend.train_steps * 0.9
    # At one sample per rank, every rank gets parallel text (the order before shuffling gives it to 2 of 8).
    parallel_on_rank = Counter(k % BATCH for k, (source, _) in enumerate(served) if source == 2)
    assert len(parallel_on_rank) == BATCH


def test_samples_do_not_depend_on_the_order_they_are_asked_in(tokens: Path) -> None:
    config = run_of(tokens, 0.2)
    forward, backward = build_blend(config), build_blend(config)
    a = [forward[k]["tokens"].tolist() for k in range(30)]
    b = [backward[k]["tokens"].tolist() for k in reversed(range(30))]
    assert a == b[::-1]
    np.testing.assert_array_equal(forward[-1]["tokens"], forward[len(forward) - 1]["tokens"])
    with pytest.raises(IndexError):
        forward[len(forward)]


def test_a_blend_travels_to_a_worker_process(tokens: Path) -> None:
    blend = build_blend(run_of(tokens, 0.2))
    there = pickle.loads(pickle.dumps(blend))
    np.testing.assert_array_equal(there[17]["tokens"], blend[17]["tokens"])


def test_add_makes_the_run_longer_and_leaves_the_monolingual_text_alone(tokens: Path) -> None:
    names = ("eng", "fin", "pairs")
    without = build_blend(run_of(tokens, 0.0, names, languages=HALVES))
    added = build_blend(run_of(tokens, 0.25, names, languages=HALVES, budget_rule="add"))
    assert added.train_steps > without.train_steps == 40
    for name in ("eng", "fin"):
        shorter, longer = sorted((draws_of(without, name), draws_of(added, name)), key=len)
        assert longer[: len(shorter)] == shorter
        assert len(longer) - len(shorter) <= BATCH


def test_repeats_beyond_what_is_allowed_are_an_error(tokens: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks for [\d,]+ tokens of pairs; .* max_repeats=0.1 allows"):
        build_blend(run_of(tokens, 0.5, repeats=0.1, steps=40))


def test_the_last_sample_too_many_is_an_error(tokens: Path) -> None:
    """Where the plan's averages would let a run pass, the built index still counts."""
    windows = build_blend(run_of(tokens, 0.0, ("eng",), steps=1, repeats=1)).windows[0].num_windows()
    most = windows // BATCH
    build_blend(run_of(tokens, 0.0, ("eng",), steps=most, repeats=1))
    tight = (most * BATCH - 0.5) / windows
    with pytest.raises(ConfigError, match="max_repeats=1 for eng"):
        build_blend(run_of(tokens, 0.0, ("eng",), steps=most, repeats=tight))


def test_two_tokenizers_are_an_error_that_names_both_files(tokens: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "other", ["eng_Latn", "fin_Latn"], 50, seed=9, sha256="b" * 64)
    config = run_of(tokens, 0.1, ("eng", "fin"))
    sources = (*config.data.sources, SourceConfig(prefix=str(tmp_path / "other")))
    with pytest.raises(FormatError, match=r"eng\.manifest\.json and .*other\.manifest\.json .* \(a+ and b+\)"):
        build_blend(replace(config, data=replace(config.data, sources=sources)))


def test_an_index_that_misses_what_was_asked_is_an_error(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What if something else were built: the audit is of the built index and notices."""
    honest = order_module._settings

    def other(plan: Any) -> dict[str, Any]:
        settings = honest(plan)
        ((until, numerator, _),) = settings["phases"]
        return {**settings, "phases": [(until, 2 * numerator, 2 * numerator)]}

    monkeypatch.setattr(order_module, "_settings", other)
    with pytest.raises(CorpusError, match=r"samples off; 1\.00 are allowed"):
        build_blend(run_of(tokens, 0.2, languages=HALVES))


def test_no_sources_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        build_blend(RunConfig())


def test_readable_samples_mark_every_stretch_of_a_language(tokens: Path) -> None:
    blend = build_blend(run_of(tokens, 0.5))
    shown = readable_samples(blend, lambda ids: " ".join(map(str, ids)), 20)
    assert len(shown) == 20
    for k, text in enumerate(shown):
        heading, *lines = text.splitlines()
        source, draw = blend.origin_of(k)
        assert heading == f"sample {k}: {blend.source_names[source]} #{draw}"
        marks, words = zip(*(line.strip().split("] ") for line in lines), strict=True)
        assert [int(word) for line in words for word in line.split()] == blend[k]["tokens"].tolist()
        if blend.source_names[source] == "pairs":
            assert {"[eng_Latn", "[fin_Latn", "[-"} <= set(marks)


def test_the_described_audit_states_asked_and_achieved(tokens: Path) -> None:
    audit = build_blend(run_of(tokens, 0.05, languages=HALVES)).audit()
    text = describe_audit(audit)
    assert "asked 5.0000%" in text and f"achieved {audit['achieved']['parallel_fraction']:.4%}" in text
    for source in audit["sources"]:
        assert f"{source['name']} " in text and f"{source['samples']:,}" in text
    assert len({len(line) for line in text.splitlines() if "_Latn" in line}) == 1

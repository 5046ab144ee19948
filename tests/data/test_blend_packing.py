"""Every packing, schedule, split and loss rule: the audit against counting the samples as they are served."""

# S sequence, N samples

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SchedulePhase, SourceConfig, TrainingConfig
from megatron_xalign.data import order as order_module
from megatron_xalign.data.audit import describe_audit
from megatron_xalign.data.blend import Blend, build_blend, readable_samples
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.token_file import TokenFileWriter, read_token_file

SEQ_LENGTH, BATCH = 64, 12
EOD, TEMPLATE, FIRST_MARKER = 0, 1, 1000
HALVES = {"eng_Latn": 0.5, "fin_Latn": 0.5}


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 100_000
    eod: int = EOD


def write(
    prefix: Path, languages: list[str], documents: int, longest: int, seed: int, pairing: str | None = None
) -> None:
    """Documents whose first token is found nowhere else, so that samples show which document they begin."""
    random = np.random.default_rng(seed)
    origin = "parallel" if len(languages) > 1 else "monolingual"
    details = {"pairing": pairing} if pairing else {}
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin=origin, languages=languages) as writer:  # type: ignore[arg-type]
        for number in range(documents):
            parts: list[Any] = []
            for index in range(len(languages)):
                side = random.integers(2, FIRST_MARKER, random.integers(1, longest))
                if index == 0:
                    side[0] = FIRST_MARKER + number
                parts += [(side, index), ([TEMPLATE], -1)]
            writer.add_document([*parts[:-1], ([EOD], -1)])
        writer.finish(**details)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write(folder / "eng", ["eng_Latn"], 900, 150, seed=1)
    write(folder / "fin", ["fin_Latn"], 1200, 90, seed=2)
    write(folder / "finweb", ["fin_Latn"], 200, 400, seed=3)
    # Some pairs are longer than a sample.
    write(folder / "pairs", ["eng_Latn", "fin_Latn"], 1500, 36, seed=4)
    write(folder / "short", ["fin_Latn", "eng_Latn"], 1500, 8, seed=5)
    write(folder / "shuffled", ["eng_Latn", "fin_Latn"], 500, 20, seed=6, pairing="shuffled")
    return folder


def run_of(
    tokens: Path,
    fraction: float = 0.0,
    names: tuple[str, ...] = ("eng", "fin", "finweb", "pairs"),
    steps: int = 20,
    data: dict[str, Any] | None = None,
    **mixture: Any,
) -> RunConfig:
    return RunConfig(
        data=DataConfig(
            sources=tuple(SourceConfig(prefix=str(tokens / name), max_repeats=6) for name in names),
            seq_length=SEQ_LENGTH,
            mixture=MixtureConfig(**{"parallel_fraction": fraction, "seed": 5, **mixture}),
            **(data or {}),
        ),
        training=TrainingConfig(train_steps=steps, global_batch_size=BATCH, micro_batch_size=BATCH),
    )


def served(blend: Blend) -> dict[str, np.ndarray]:
    return blend.batch(range(len(blend)))


def chosen_order(blend: Blend) -> list[int]:
    """Sample numbers in the order they were chosen."""
    return sorted(range(len(blend)), key=blend.index.position_of)


def check_audit(blend: Blend, config: RunConfig) -> dict[str, Any]:
    """Everything in the audit that the served samples can tell."""
    rows = served(blend)
    sizes = [1, 2, 3, 12]
    audit: dict[str, Any] = json.loads(json.dumps(blend.audit(sizes), allow_nan=False))
    assert audit["holds"]
    is_text = rows["source_ids"] >= 0
    bears = rows["loss_mask"] == 1
    assert audit["tokens"] == is_text.sum()
    assert audit["padding_tokens"] == (~is_text).sum()
    assert audit["loss_tokens"] == bears.sum()
    assert not bears[~is_text].any()
    assert audit["padding_fraction"] == (~is_text).mean()
    is_parallel_source = np.array([source["origin"] == "parallel" for source in audit["sources"]])
    is_parallel = is_text & is_parallel_source[rows["source_ids"]]
    is_content = rows["language_ids"] >= 0
    assert audit["content_tokens"] == is_content.sum()
    assert audit["other_tokens"] == (is_text & ~is_content).sum()
    counted = is_text if config.data.mixture.fraction_of == "all" else is_content
    assert audit["achieved"]["parallel_fraction"] == (is_parallel & counted).sum() / counted.sum()
    assert audit["achieved"]["parallel_fraction_loss"] == (is_parallel & bears).sum() / bears.sum()
    begins = rows["tokens"] >= FIRST_MARKER
    assert audit["pairs"] == (begins & is_parallel).sum()
    for index, source in enumerate(audit["sources"]):
        own = rows["source_ids"] == index
        assert source["tokens"] == own.sum()
        assert source["loss_tokens"] == (own & bears).sum()
        assert source["content_tokens"] == (own & is_content).sum()
        assert source["documents_begun"] == (own & begins).sum()
        by_language = Counter(rows["language_ids"][own & is_content].tolist())
        assert source["content_tokens_by_language"] == {
            blend.languages[language]: count for language, count in sorted(by_language.items())
        }
    for index, (code, entry) in enumerate(audit["languages"].items()):
        of_language = rows["language_ids"] == index
        assert entry["content_tokens"] == of_language.sum()
        assert entry["parallel"] == (of_language & is_parallel).sum(), code
    check_phases(blend, audit, counted, is_parallel)
    for size in sizes:
        for rank, part in enumerate(audit["data_parallel"][str(size)]["ranks"]):
            # A data-parallel rank reads a contiguous part of every global batch.
            slots = np.arange(len(blend)) % BATCH // (BATCH // size) == rank
            assert part["tokens"] == is_text[slots].sum()
            assert part["loss_tokens"] == bears[slots].sum()
            assert part["padding_tokens"] == (~is_text)[slots].sum()
            assert part["parallel_fraction"] == (is_parallel & counted)[slots].sum() / counted[slots].sum()
    assert describe_audit(audit)
    return audit


def check_phases(blend: Blend, audit: dict[str, Any], counted: np.ndarray, is_parallel: np.ndarray) -> None:
    position = np.array([blend.index.position_of(k) for k in range(len(blend))])
    begin = 0
    for phase in audit["phases"]:
        here = (position >= begin) & (position < begin + phase["samples"])
        assert phase["begin_tokens"] == begin * SEQ_LENGTH
        if counted[here].any():
            assert phase["achieved"] == (is_parallel & counted)[here].sum() / counted[here].sum()
        begin += phase["samples"]
    assert begin == len(blend)


def check_fraction(blend: Blend, config: RunConfig, off_by_tokens: float) -> None:
    """At every sample in the chosen order, the parallel tokens are near what the schedule asks for."""
    rows = {name: array[chosen_order(blend)] for name, array in served(blend).items()}
    is_text = rows["source_ids"] >= 0
    is_parallel_source = np.array([item.text.origin == "parallel" for item in blend.plan.sources])
    counted = is_text if config.data.mixture.fraction_of == "all" else rows["language_ids"] >= 0
    of_parallel = np.cumsum((counted & is_text & is_parallel_source[rows["source_ids"]]).sum(axis=1))
    asked = np.array([asked_of(config, sample) for sample in range(len(blend))])
    target = np.cumsum(asked * counted.sum(axis=1))
    assert np.abs(of_parallel - target).max() <= off_by_tokens + 1e-6


def asked_of(config: RunConfig, sample: int) -> float:
    mixture, at, begin = config.data.mixture, sample * SEQ_LENGTH, 0
    for phase in mixture.schedule:
        end = phase.parallel_fraction if phase.to is None else phase.to
        if at < phase.until_tokens:
            way = (at - begin) / (phase.until_tokens - begin)
            return phase.parallel_fraction + (end - phase.parallel_fraction) * way
        begin = phase.until_tokens
    return end if mixture.schedule else mixture.parallel_fraction


def phases(*ends: tuple[int, float, float | None]) -> tuple[SchedulePhase, ...]:
    return tuple(SchedulePhase(until_tokens=until, parallel_fraction=begin, to=to) for until, begin, to in ends)


SCHEDULES = {
    "early": phases((6000, 0.4, None), (9000, 0.0, None)),
    "late": phases((7777, 0.0, None), (9000, 0.3, None)),
    "slope": phases((10_000, 0.5, 0.1), (11_000, 0.1, None)),
}


@pytest.mark.parametrize("fraction", [0.0, 0.07, 0.45])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("packing", ["source_windows", "mixed_documents"])
def test_the_audit_is_what_is_served(tokens: Path, packing: str, whole: bool, fraction: float) -> None:
    config = run_of(tokens, fraction, languages=HALVES, packing=packing, keep_pairs_whole=whole)
    blend = build_blend(config)
    audit = check_audit(blend, config)
    # Half a window; half of the longest document; a whole one where a pair may have to wait for its sample.
    longest = SEQ_LENGTH if packing == "source_windows" else 400 if whole else 200
    check_fraction(blend, config, SEQ_LENGTH / 2 if packing == "source_windows" else longest)
    if whole:
        assert audit["pairs_cut"] == 0
        assert_no_pair_is_cut(blend)
        if fraction > 0.1:
            assert audit["pairs_left_out"] > 0
    elif fraction:
        assert audit["pairs_cut"] > 0


def assert_no_pair_is_cut(blend: Blend) -> None:
    rows = served(blend)
    parallel = [i for i, item in enumerate(blend.plan.sources) if item.text.origin == "parallel"]
    for source_ids, token_ids, documents in zip(
        rows["source_ids"], rows["tokens"], rows["document_ids"], strict=True
    ):
        for document in np.unique(documents[np.isin(source_ids, parallel)]):
            (places,) = np.nonzero(documents == document)
            assert token_ids[places[0]] >= FIRST_MARKER
            assert token_ids[places[-1]] == EOD
            assert len(places) == places[-1] - places[0] + 1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fraction_of", ["content", "all"])
@pytest.mark.parametrize(
    ("packing", "whole"), [("source_windows", False), ("source_windows", True), ("mixed_documents", False),
                           ("mixed_documents", True)],
)  # fmt: skip
def test_a_schedule_holds_at_every_sample(tokens: Path, packing: str, whole: bool, fraction_of: str, name: str) -> None:
    config = run_of(
        tokens, languages=HALVES, schedule=SCHEDULES[name], packing=packing, keep_pairs_whole=whole,
        fraction_of=fraction_of,
    )  # fmt: skip
    blend = build_blend(config)
    audit = check_audit(blend, config)
    check_fraction(blend, config, SEQ_LENGTH / 2 if packing == "source_windows" else 420)
    assert len(audit["phases"]) == 2
    if packing == "source_windows":
        rows = served(blend)
        parallel = np.isin(rows["source_ids"][:, 0], [3])
        position = np.array([blend.index.position_of(k) for k in range(len(blend))])
        if name == "early":
            assert not parallel[position * SEQ_LENGTH >= 6000].any()
        if name == "late":
            assert not parallel[position * SEQ_LENGTH < 7777].any()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    percent=st.integers(0, 70),
    packing=st.sampled_from(["source_windows", "mixed_documents"]),
    whole=st.booleans(),
    split=st.sampled_from(["100,0,0", "90,5,5", "3,1,0"]),
    eod_mask_loss=st.booleans(),
    names=st.sampled_from(
        [("eng", "fin", "pairs"), ("eng", "fin", "finweb", "pairs", "short"), ("short", "fin", "eng")]
    ),
    rule=st.sampled_from(["replace", "add"]),
    fraction_of=st.sampled_from(["content", "all"]),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_any_mixture_is_audited_to_the_token(
    tokens: Path, percent: int, packing: str, whole: bool, split: str, eod_mask_loss: bool, names: tuple[str, ...],
    rule: str, fraction_of: str, seed: int,
) -> None:  # fmt: skip
    config = run_of(
        tokens, percent / 100, names, steps=10, languages=HALVES, packing=packing, keep_pairs_whole=whole, seed=seed,
        budget_rule=rule, fraction_of=fraction_of, data={"split": split, "eod_mask_loss": eod_mask_loss},
    )  # fmt: skip
    check_audit(build_blend(config), config)


PACKINGS = [(p, w) for p in ("source_windows", "mixed_documents") for w in (False, True)]


@pytest.mark.parametrize(("packing", "whole"), PACKINGS)
def test_a_longer_run_keeps_every_sample(tokens: Path, packing: str, whole: bool) -> None:
    short, long = (
        build_blend(run_of(tokens, 0.2, steps=steps, packing=packing, keep_pairs_whole=whole)) for steps in (3, 17)
    )
    for name, rows in served(short).items():
        np.testing.assert_array_equal(rows, long.batch(range(len(short)))[name])


def documents_of(blend: Blend) -> dict[int, list[int]]:
    """The documents of every source in the order they were drawn."""
    rows = {name: array[chosen_order(blend)] for name, array in served(blend).items()}
    begins = rows["tokens"] >= FIRST_MARKER
    found = defaultdict(list)
    for source, marker in zip(rows["source_ids"][begins].tolist(), rows["tokens"][begins].tolist(), strict=True):
        found[source].append(marker)
    return found


def test_in_a_series_of_mixed_documents_every_run_reads_a_prefix_of_the_same_order(tokens: Path) -> None:
    orders = [
        documents_of(build_blend(run_of(tokens, fraction, languages=HALVES, packing="mixed_documents")))
        for fraction in (0.0, 0.01, 0.1, 0.5)
    ]
    for source in range(4):
        of_source = sorted((order[source] for order in orders), key=len)
        for shorter, longer in itertools.pairwise(of_source):
            assert longer[: len(shorter)] == shorter
    assert len(orders[1][3]) < len(orders[2][3]) < len(orders[3][3])


def test_splits_are_disjoint_and_no_document_is_lost(tokens: Path) -> None:
    found: dict[str, set[tuple[int, int]]] = {}
    for part, split in (("train", "80,15,5"), ("swapped", "15,80,5")):
        config = run_of(tokens, 0.3, ("eng", "fin", "pairs"), steps=60, data={"split": split})
        rows = served(build_blend(config))
        begins = rows["tokens"] >= FIRST_MARKER
        pairs = zip(rows["source_ids"][begins].tolist(), rows["tokens"][begins].tolist(), strict=True)
        found[part] = set(pairs)
    train_documents = {source: {m for s, m in found["train"] if s == source} for source in range(3)}
    for source, count in ((0, 900), (1, 1200), (2, 1500)):
        assert len(train_documents[source]) <= round(0.8 * count)


def test_padding_of_packed_short_pairs_is_below_one_percent(tmp_path: Path) -> None:
    write(tmp_path / "eng", ["eng_Latn"], 4000, 60, seed=1)
    write(tmp_path / "pairs", ["eng_Latn", "fin_Latn"], 6000, 12, seed=2)
    for packing in ("source_windows", "mixed_documents"):
        config = run_of(
            tmp_path, 0.3, ("eng", "pairs"), steps=40, packing=packing, keep_pairs_whole=True,
            languages={"eng_Latn": 0.85, "fin_Latn": 0.15},
        )  # fmt: skip
        mixture = replace(config.data.mixture, languages={})
        config = replace(config, data=replace(config.data, seq_length=256, mixture=mixture))
        audit = build_blend(config).audit()
        assert audit["pairs_cut"] == 0
        assert audit["padding_fraction"] < 0.01


def test_pairs_alone_can_be_mixed_documents(tokens: Path) -> None:
    config = run_of(tokens, 1.0, ("short",), steps=6, packing="mixed_documents", keep_pairs_whole=True)
    blend = build_blend(config)
    audit = check_audit(blend, config)
    assert_no_pair_is_cut(blend)
    assert 0 < audit["padding_fraction"] < 0.2
    rows = served(blend)
    # The last token before padding predicts nothing.
    for documents, mask in zip(rows["document_ids"], rows["loss_mask"], strict=True):
        (text,) = np.nonzero(documents >= 0)
        assert mask[text[:-1]].all()
        assert mask[text[-1]] == (len(text) == SEQ_LENGTH)


@pytest.mark.parametrize(("packing", "whole"), PACKINGS)
def test_ranks_read_the_same_mixture(tokens: Path, packing: str, whole: bool) -> None:
    config = run_of(tokens, 0.25, steps=80, languages=HALVES, packing=packing, keep_pairs_whole=whole)
    audit = build_blend(config).audit([2, 3, 4])
    for size, entry in audit["data_parallel"].items():
        # Ranks of a batch of 12 have a handful of samples in a step; what is left is chance.
        assert entry["spread"] < (0.1 if size == "2" else 0.15), size
        if packing == "source_windows":
            # Of a batch of 12 samples a rank has 12 / size; the shuffle in runs of 8 moves some over a border.
            assert entry["most_uneven_step_samples"] <= 3


def test_ranks_that_do_not_divide_the_batch_are_an_error(tokens: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=12 cannot be divided over 5"):
        build_blend(run_of(tokens, 0.1)).audit([5])


def test_a_file_of_another_pairing_is_an_error_with_the_command(tokens: Path) -> None:
    config = run_of(tokens, 0.1, ("eng", "fin", "shuffled"))
    words = r"pairing=aligned and .*shuffled was made with pairing=shuffled .*xalign preprocess"
    with pytest.raises(ConfigError, match=words):
        build_blend(config)
    mixture = replace(config.data.mixture, pairing="shuffled")
    assert build_blend(replace(config, data=replace(config.data, mixture=mixture))).audit()["holds"]


@pytest.mark.parametrize(("packing", "whole"), PACKINGS)
def test_too_little_text_is_an_error_that_works_as_advice(tokens: Path, packing: str, whole: bool) -> None:
    config = run_of(tokens, 0.5, ("eng", "fin", "pairs"), steps=300, packing=packing, keep_pairs_whole=whole)
    sources = tuple(replace(source, max_repeats=30) for source in config.data.sources)
    tight = tuple(replace(source, max_repeats=30 if i < 2 else 0.5) for i, source in enumerate(sources))
    with pytest.raises(ConfigError, match=r"max_repeats=0\.5 allows") as caught:
        build_blend(replace(config, data=replace(config.data, sources=tight)))
    words = str(caught.value).split()
    repeats = next(word for word in words if word.startswith("max_repeats=") and word != "max_repeats=0.5")
    enough = float(repeats.removeprefix("max_repeats="))
    sources = tuple(replace(source, max_repeats=enough if i == 2 else 30) for i, source in enumerate(sources))
    build_blend(replace(config, data=replace(config.data, sources=sources)))


def test_a_source_of_pairs_that_all_are_too_long_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "eng", ["eng_Latn"], 400, 60, seed=1)
    random = np.random.default_rng(0)
    with TokenFileWriter(
        tmp_path / "pairs", tokenizer=Tokenizer(), origin="parallel", languages=["eng_Latn", "fin_Latn"]
    ) as writer:
        for _ in range(50):
            writer.add_document([(random.integers(2, 900, 70), 0), (random.integers(2, 900, 70), 1), ([EOD], -1)])
        writer.finish()
    for packing in ("source_windows", "mixed_documents"):
        with pytest.raises((CorpusError, ConfigError), match="pairs"):
            build_blend(run_of(tmp_path, 0.2, ("eng", "pairs"), packing=packing, keep_pairs_whole=True))


# --- orders that are kept ---------------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(order_module, "_FEW_SAMPLES", 0)
    yield


@pytest.mark.parametrize(("packing", "whole"), PACKINGS)
def test_a_kept_order_is_opened_and_not_made_again(
    tokens: Path, tmp_path: Path, kept: None, monkeypatch: pytest.MonkeyPatch, packing: str, whole: bool
) -> None:
    data = {"index_cache_dir": str(tmp_path / "cache")}
    config = run_of(tokens, 0.3, packing=packing, keep_pairs_whole=whole, data=data)
    first = build_blend(config)
    there = pickle.loads(pickle.dumps(first))
    assert len(pickle.dumps(first)) < 40_000
    monkeypatch.setattr(order_module, "_Builder", None)
    second = build_blend(config)
    assert second.audit([2, 4]) == first.audit([2, 4])
    for again in (second, there):
        for name, rows in served(first).items():
            np.testing.assert_array_equal(rows, served(again)[name])
    in_memory = build_blend_without_cache(config, monkeypatch)
    np.testing.assert_array_equal(served(in_memory)["tokens"], served(first)["tokens"])
    assert in_memory.audit() == first.audit()


def build_blend_without_cache(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Blend:
    monkeypatch.undo()
    return build_blend(replace(config, data=replace(config.data, index_cache_dir="none")))


def test_anything_that_changes_samples_changes_the_name_of_an_order(
    tokens: Path, tmp_path: Path, kept: None
) -> None:
    base = run_of(tokens, 0.2, languages=HALVES, data={"index_cache_dir": str(tmp_path)})
    mixture = base.data.mixture
    others = [
        replace(base.data, mixture=replace(mixture, parallel_fraction=0.21)),
        replace(base.data, mixture=replace(mixture, seed=6)),
        replace(base.data, mixture=replace(mixture, languages={"eng_Latn": 0.4, "fin_Latn": 0.6})),
        replace(base.data, mixture=replace(mixture, packing="mixed_documents")),
        replace(base.data, mixture=replace(mixture, packing="mixed_documents", keep_pairs_whole=True)),
        replace(base.data, mixture=replace(mixture, fraction_of="all")),
        replace(base.data, split="99,1,0"),
        replace(base.data, seq_length=65),
        replace(base.data, eod_mask_loss=True),
    ]
    folders = {build_blend(replace(base, data=data)).order.folder for data in (base.data, *others)}
    assert len(folders) == 1 + len(others)
    assert build_blend(replace(base, data=replace(base.data, reset_position_ids=True))).order.folder in folders


@pytest.mark.parametrize("name", ["ids.bin", "counts.bin", "tally.npz", "tally.json"])
def test_a_damaged_order_is_made_again(
    tokens: Path, tmp_path: Path, kept: None, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config = run_of(tokens, 0.2, data={"index_cache_dir": str(tmp_path)})
    first = build_blend(config)
    expected = served(first)["tokens"].copy()
    assert first.order.folder is not None
    path = first.order.folder / name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    second = build_blend(config)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(served(second)["tokens"], expected)


def test_a_kept_order_does_not_hide_that_a_source_is_read_too_often(tokens: Path, tmp_path: Path, kept: None) -> None:
    config = run_of(tokens, 0.5, ("eng", "fin", "pairs"), steps=200, data={"index_cache_dir": str(tmp_path)})
    repeats = build_blend(config).audit()["sources"][2]["repeats"]
    assert repeats > 1
    tight = tuple(replace(source, max_repeats=repeats * 0.98) for source in config.data.sources)
    with pytest.raises(ConfigError, match="pairs holds"):
        build_blend(replace(config, data=replace(config.data, sources=tight)))


def test_readable_samples_of_mixed_documents_name_every_document(tokens: Path) -> None:
    blend = build_blend(run_of(tokens, 0.5, ("eng", "short"), packing="mixed_documents", keep_pairs_whole=True))
    shown = readable_samples(blend, lambda ids: " ".join(map(str, ids)), 30)
    for k, text in enumerate(shown):
        sample = blend[k]
        assert len(set(sample["document_ids"].tolist()) - {-1}) == 1 + text.count(":\n") + text.endswith(":") - 0
        words = [word for line in text.splitlines() if "] " in line and "[padding]" not in line
                 for word in line.split("] ")[1].split()]  # fmt: skip
        assert [int(word) for word in words] == sample["tokens"][sample["document_ids"] >= 0].tolist()


def test_megatron_s_own_files_take_part(tokens: Path, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        (tmp_path / f"plain.{kind}").write_bytes((tokens / f"fin.{kind}").read_bytes())
    config = run_of(tokens, 0.2, ("eng", "pairs"))
    plain = SourceConfig(prefix=str(tmp_path / "plain"), max_repeats=6)
    with pytest.raises(ConfigError, match=r"data.sources.2: .*plain has no .manifest.json .* language: fin_Latn"):
        build_blend(replace(config, data=replace(config.data, sources=(*config.data.sources, plain))))
    sources = (*config.data.sources, replace(plain, language="fin_Latn"))
    config = replace(config, data=replace(config.data, sources=sources))
    blend = build_blend(config)
    check_audit(blend, config)
    assert read_token_file(tmp_path / "plain", "fin_Latn").manifest == {}

"""Any sources, mixture, packing, schedule and number of ranks: the samples of a run against lists, loops and fractions.

The sources are random too: documents of no, one and many tokens, longer than samples, epochs that end in the middle of
the run.
"""

# S sequence, N samples, J sources

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from plain_streams import PlainStream, Token, plain_order, plain_sample

from megatron_xalign.config import DataConfig, MixtureConfig, RunConfig, SchedulePhase, SourceConfig, TrainingConfig
from megatron_xalign.data.blend import Blend, build_blend
from megatron_xalign.data.evaluation import build_evaluation
from megatron_xalign.data.order_key import order_key
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.token_file import TokenFileWriter

LANGUAGES = ("ara_Arab", "fin_Latn", "zho_Hans")
EOD, TEMPLATE = 0, 1
VOCABULARY = 5000
EPOCHS = 12


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "b" * 64
    vocab_size: int = VOCABULARY
    eod: int = EOD


@dataclass(frozen=True)
class Source:
    """A source as lists."""

    name: str
    languages: tuple[str, ...]
    documents: tuple[tuple[tuple[int, str | None], ...], ...]
    """Of every document (token, its language or None)."""

    @property
    def is_parallel(self) -> bool:
        return len(self.languages) > 1

    def write(self, folder: Path) -> None:
        origin: Any = "parallel" if self.is_parallel else "monolingual"
        with TokenFileWriter(
            folder / self.name, tokenizer=Tokenizer(), origin=origin, languages=list(self.languages)
        ) as writer:
            for document in self.documents:
                parts = []
                for code, group in itertools.groupby(document, key=lambda token: token[1]):
                    language = self.languages.index(code) if code else -1
                    parts.append((np.array([token for token, _ in group]), language))
                writer.add_document(parts)
            writer.finish()


def make_source(name: str, languages: Sequence[str], lengths: Sequence[int], seed: int) -> Source:
    """Documents whose sides have those lengths; a monolingual one of 0 is its end alone."""
    random = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        document: list[tuple[int, str | None]] = []
        for index, language in enumerate(languages):
            size = length if index == 0 else max(1, length + int(random.integers(-2, 3)))
            size = max(size, 1) if len(languages) > 1 else size
            document += [(int(token), language) for token in random.integers(2, VOCABULARY, size)]
            document.append((TEMPLATE if index + 1 < len(languages) else EOD, None))
        documents.append(tuple(document))
    return Source(name, tuple(languages), tuple(documents))


LENGTHS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 70)), min_size=20, max_size=60)
MONOLINGUAL = st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=4)
PAIRS = st.lists(st.sampled_from([("fin_Latn", "ara_Arab"), ("ara_Arab", "zho_Hans"), LANGUAGES]), max_size=2)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Source], RunConfig]:
    monolingual, pairs = draw(MONOLINGUAL), draw(PAIRS)
    sources = [
        make_source(f"s{number}", (languages,) if isinstance(languages, str) else languages, draw(LENGTHS), number)
        for number, languages in enumerate([*monolingual, *pairs])
    ]
    seq_length, batch = draw(st.integers(2, 40)), draw(st.sampled_from([1, 2, 4, 6, 12]))
    steps = draw(st.integers(1, 60 // batch + 1))
    most = 40 if pairs else 0
    schedule: tuple[SchedulePhase, ...] = ()
    if draw(st.integers(0, 2)) == 0:
        ends = sorted(draw(st.sets(st.integers(1, steps * batch * seq_length), min_size=1, max_size=3)))
        percent = st.integers(0, most)
        schedule = tuple(
            SchedulePhase(
                until_tokens=end,
                parallel_fraction=draw(percent) / 100,
                to=draw(st.none() | percent.map(lambda p: p / 100)),
            )
            for end in ends
        )
    packing = draw(st.sampled_from(["source_windows", "mixed_documents"]))
    config = RunConfig(
        data=DataConfig(
            sources=tuple(SourceConfig(prefix=source.name, max_repeats=EPOCHS) for source in sources),
            seq_length=seq_length,
            split=draw(st.sampled_from(["100,0,0", "80,10,10"])),
            reset_position_ids=draw(st.booleans()),
            eod_mask_loss=draw(st.booleans()),
            index_cache_dir="none",
            mixture=MixtureConfig(
                parallel_fraction=0.0 if schedule else draw(st.integers(0, most)) / 100,
                schedule=schedule,
                fraction_of=draw(st.sampled_from(["content", "all"])),
                budget_rule=draw(st.sampled_from(["replace", "add"])) if not schedule else "replace",
                packing=packing,
                keep_pairs_whole=draw(st.booleans()),
                seed=draw(st.integers(0, 2**40)),
            ),
        ),
        training=TrainingConfig(train_steps=steps, global_batch_size=batch, micro_batch_size=batch),
    )
    return sources, config


def place(config: RunConfig, folder: Path) -> RunConfig:
    sources = tuple(replace(source, prefix=str(folder / source.prefix)) for source in config.data.sources)
    return replace(config, data=replace(config.data, sources=sources))


def plain_stream(source: Source, config: RunConfig, languages: list[str]) -> PlainStream:
    """The training part of a source as lists."""
    size, mixture = len(source.documents), config.data.mixture
    documents = [
        [
            Token(token, languages.index(code) if code else -1, number, code is None and at + 1 == len(document))
            for at, (token, code) in enumerate(document)
        ]
        for number, document in enumerate(source.documents)
    ]
    keys = [
        (
            order_key(mixture.seed, source.name, "documents", epoch),
            order_key(mixture.seed, source.name, "windows", epoch),
        )
        for epoch in range(EPOCHS + 1)
    ]
    split_key = None if config.data.split == "100,0,0" else order_key(0, source.name, "split")
    return PlainStream(
        documents, seq_length=config.data.seq_length, keys=keys, split_key=split_key,
        part=(0, train_size(size, config)),
        whole_documents=mixture.keep_pairs_whole and source.is_parallel and mixture.packing == "source_windows",
    )  # fmt: skip


def train_size(size: int, config: RunConfig) -> int:
    """Documents of the training part: largest remainders, the earlier part first."""
    if config.data.split == "100,0,0":
        return size
    parts = [Fraction(size * share, 100) for share in (80, 10, 10)]
    left = size - sum(int(part) for part in parts)
    first = sorted(range(3), key=lambda index: (int(parts[index]) - parts[index], index))[:left]
    return int(parts[0]) + (0 in first)


def check_windows(blend: Blend, config: RunConfig, sources: list[Source], rows: dict[str, np.ndarray]) -> None:
    """Every sample is the window of its source that a loop over the documents cuts or packs."""
    streams = [plain_stream(source, config, blend.languages) for source in sources]
    for sample in range(len(blend)):
        index, draw = blend.origin_of(sample)
        epoch = 0
        while draw >= len(streams[index].windows(epoch)):
            draw -= len(streams[index].windows(epoch))
            epoch += 1
        wanted = plain_sample(
            streams[index].windows(epoch)[draw], index, seq_length=config.data.seq_length, padding_token=EOD,
            reset_position_ids=config.data.reset_position_ids, eod_mask_loss=config.data.eod_mask_loss,
        )  # fmt: skip
        for name, values in wanted.items():
            np.testing.assert_array_equal(rows[name][sample], values, err_msg=name)


def check_documents(blend: Blend, config: RunConfig, sources: list[Source], rows: dict[str, np.ndarray]) -> None:
    """The samples in the order they were chosen are the documents of every source in its order, nothing between."""
    streams = [plain_stream(source, config, blend.languages) for source in sources]
    too_long = config.data.seq_length if config.data.mixture.keep_pairs_whole else None
    supplies = [
        iter(
            [
                stream.documents[document]
                for epoch in range(EPOCHS + 1)
                for document in stream.order(epoch)
                if stream.documents[document]
                and not (source.is_parallel and too_long and len(stream.documents[document]) > too_long)
            ]
        )
        for source, stream in zip(sources, streams, strict=True)
    ]
    chosen = sorted(range(len(blend)), key=blend.index.position_of)
    # Of the document at hand: its source and what is left of it.
    source, left = -1, list[Token]()
    for sample in chosen:
        filled = int((rows["source_ids"][sample] >= 0).sum())
        assert (rows["source_ids"][sample, :filled] >= 0).all()
        for at in range(filled):
            if not left:
                source = int(rows["source_ids"][sample, at])
                left = list(next(supplies[source]))
                assert at == 0 or rows["document_ids"][sample, at] == rows["document_ids"][sample, at - 1] + 1
            token = left.pop(0)
            assert rows["source_ids"][sample, at] == source
            assert rows["tokens"][sample, at] == token.id
            assert rows["language_ids"][sample, at] == token.language
        labels = rows["labels"][sample, : filled - 1]
        np.testing.assert_array_equal(labels, rows["tokens"][sample, 1:filled])
        if filled < config.data.seq_length:
            # Padding comes only where the next document is a pair that does not fit, so none is open here.
            assert config.data.mixture.keep_pairs_whole and not left
            assert rows["loss_mask"][sample, filled - 1 :].sum() == 0


def check_whole_pairs(sources: list[Source], rows: dict[str, np.ndarray]) -> None:
    """Every stretch of a parallel document in a sample is one whole document of the file."""
    whole = [{tuple(token for token, _ in document) for document in source.documents} for source in sources]
    for tokens, of, documents in zip(rows["tokens"], rows["source_ids"], rows["document_ids"], strict=True):
        for document in set(documents[documents >= 0].tolist()):
            (places,) = np.nonzero(documents == document)
            source = int(of[places[0]])
            assert not sources[source].is_parallel or tuple(tokens[places].tolist()) in whole[source]


def check_counts(
    blend: Blend, config: RunConfig, sources: list[Source], rows: dict[str, np.ndarray], ranks: int
) -> None:
    """The audit is what counting the served samples gives, for every source, language and rank."""
    audit = json.loads(json.dumps(blend.audit([ranks]), allow_nan=False))
    is_text, is_content = rows["source_ids"] >= 0, rows["language_ids"] >= 0
    is_parallel = is_text & np.array([source.is_parallel for source in sources])[rows["source_ids"]]
    counted = is_text if config.data.mixture.fraction_of == "all" else is_content
    bears = rows["loss_mask"] > 0
    assert audit["tokens"] == is_text.sum()
    assert audit["padding_tokens"] == (~is_text).sum()
    assert audit["content_tokens"] == is_content.sum()
    assert audit["loss_tokens"] == bears.sum()
    for index, entry in enumerate(audit["sources"]):
        own = rows["source_ids"] == index
        by_language = Counter(rows["language_ids"][own & is_content].tolist())
        assert entry["tokens"] == own.sum()
        assert entry["loss_tokens"] == (own & bears).sum()
        assert {code: count for code, count in entry["content_tokens_by_language"].items() if count} == {
            blend.languages[language]: count for language, count in by_language.items()
        }
    size = config.training.global_batch_size
    for rank, part in enumerate(audit["data_parallel"][str(ranks)]["ranks"]):
        own_rows = np.arange(len(blend)) % size // (size // ranks) == rank
        assert part["tokens"] == is_text[own_rows].sum()
        assert part["loss_tokens"] == bears[own_rows].sum()
        if counted[own_rows].any():
            assert part["parallel_fraction"] == (is_parallel & counted)[own_rows].sum() / counted[own_rows].sum()


def check_fraction(blend: Blend, config: RunConfig, sources: list[Source], rows: dict[str, np.ndarray]) -> None:
    """After every sample, in the order they were chosen, the parallel tokens are what was asked for."""
    mixture, seq_length = config.data.mixture, config.data.seq_length
    chosen = sorted(range(len(blend)), key=blend.index.position_of)
    is_text = rows["source_ids"] >= 0
    is_parallel = is_text & np.array([source.is_parallel for source in sources])[rows["source_ids"]]
    counted = is_text if mixture.fraction_of == "all" else rows["language_ids"] >= 0
    longest = max(len(document) for source in sources for document in source.documents)
    allowed = Fraction(seq_length, 2) if mixture.packing == "source_windows" else Fraction(longest)
    if mixture.packing == "mixed_documents" and mixture.schedule:
        # A document is held to the fraction of the sample it begins in, also where it goes on into others.
        allowed += 2 * longest
    off = Fraction(0)
    for place_of, sample in enumerate(chosen):
        total = int(counted[sample].sum())
        off += int((is_parallel & counted)[sample].sum()) - asked(config, place_of * seq_length) * total
        assert abs(off) <= allowed + Fraction(1, 1000)


def asked(config: RunConfig, at: int) -> Fraction:
    mixture, begin = config.data.mixture, 0
    if not mixture.schedule:
        return Fraction(str(mixture.parallel_fraction))
    for phase in mixture.schedule:
        first = Fraction(str(phase.parallel_fraction))
        last = first if phase.to is None else Fraction(str(phase.to))
        if at < phase.until_tokens:
            return first + (last - first) * Fraction(at - begin, phase.until_tokens - begin)
        begin = phase.until_tokens
    return last


@settings(max_examples=60, deadline=None)
@given(run=runs(), data=st.data())
def test_any_run_is_what_lists_and_loops_make_of_it(run: tuple[list[Source], RunConfig], data: st.DataObject) -> None:
    sources, plain_config = run
    with tempfile.TemporaryDirectory() as name:
        for source in sources:
            source.write(Path(name))
        config = place(plain_config, Path(name))
        try:
            blend = build_blend(config)
        except (ConfigError, CorpusError) as error:
            # Too little text, or languages that pairs alone bring: said in words, and another test's business.
            assert str(error)
            event("refused")
            assume(False)
        event(f"{config.data.mixture.packing}, {'whole' if config.data.mixture.keep_pairs_whole else 'cut'}")
        rows = blend.batch(range(len(blend)))
        if config.data.mixture.packing == "source_windows":
            check_windows(blend, config, sources, rows)
        else:
            check_documents(blend, config, sources, rows)
        if config.data.mixture.keep_pairs_whole:
            check_whole_pairs(sources, rows)
        batch = config.training.global_batch_size
        check_counts(
            blend, config, sources, rows, data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
        )
        check_fraction(blend, config, sources, rows)

        # A run cut anywhere goes on with the samples that its number names; a shorter one is its beginning.
        first = data.draw(st.integers(0, len(blend) - 1))
        for field, values in blend.batch(range(first, len(blend))).items():
            np.testing.assert_array_equal(values, rows[field][first:])
        steps = data.draw(st.integers(1, config.training.train_steps))
        shorter = build_blend(replace(config, training=replace(config.training, train_steps=steps)))
        for field, values in shorter.batch(range(len(shorter))).items():
            np.testing.assert_array_equal(values, rows[field][: len(shorter)])
        if config.data.split != "100,0,0":
            check_held_out(config, sources)


def check_held_out(config: RunConfig, sources: list[Source]) -> None:
    """No held-out sample has a token of a training document of its source, and the two held-out parts share none."""
    config = replace(config, training=replace(config.training, eval_samples_per_source=1000))
    for index, source in enumerate(sources):
        size = len(source.documents)
        order = plain_order(order_key(0, source.name, "split"), size)
        train = set(order[: train_size(size, config)])
        for part in ("validation", "test"):
            evaluation = build_evaluation(config, part)
            rows = evaluation.batch(range(len(evaluation)))
            own = evaluation.sources_N == index
            known = {document: number for number, document in enumerate(tokens_of(source))}
            # A border of the sample may cut its first and its last document: what is left may look like another one.
            whole = [
                tuple(tokens[documents == document].tolist())
                for tokens, documents in zip(rows["tokens"][own], rows["document_ids"][own], strict=True)
                for document in list(dict.fromkeys(documents[documents >= 0].tolist()))[1:-1]
            ]
            repeated = {text for text, count in Counter(tokens_of(source)).items() if count > 1}
            assert not {known[text] for text in whole if text in known and text not in repeated} & train


def tokens_of(source: Source) -> list[tuple[int, ...]]:
    return [tuple(token for token, _ in document) for document in source.documents]

"""Sources as streams over real token files: what is counted is what is served, from any file that Megatron reads."""

# N windows or documents, T tokens, S sequence, K languages

from __future__ import annotations

import multiprocessing
import os
import pickle
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_streams import PlainStream, Token, plain_order, plain_sample

from megatron_xalign import _native
from megatron_xalign.data import source_stream
from megatron_xalign.data.blend_reader import BlendReader
from megatron_xalign.data.index_cache import IndexCache
from megatron_xalign.data.order_key import order_key
from megatron_xalign.data.source_stream import SourceStream
from megatron_xalign.data.splits import DocumentRange, split_documents
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file import TokenFile, TokenFileWriter, companion, read_token_file

LANGUAGES = ["fin_Latn", "swe_Latn", "eng_Latn"]
SEQ_LENGTH = 32


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 1000
    eod: int = 0


def write_pairs(prefix: Path, seed: int = 5, count: int = 60) -> Path:
    """Documents of English, a template token, Finnish, end of document; some longer than a window."""
    random = np.random.default_rng(seed)
    languages = ["eng_Latn", "fin_Latn"]
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin="parallel", languages=languages) as writer:
        for _ in range(count):
            sides = [random.integers(2, 1000, random.integers(1, 30)) for _ in range(2)]
            writer.add_document([(sides[0], 0), ([1], -1), (sides[1], 1), ([0], -1)])
        writer.finish()
    return prefix


def write_monolingual(prefix: Path, seed: int = 6, count: int = 300) -> Path:
    """Documents of Finnish and an end-of-document token."""
    random = np.random.default_rng(seed)
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin="monolingual", languages=["fin_Latn"]) as writer:
        for _ in range(count):
            writer.add_document([(random.integers(2, 1000, random.integers(1, 40)), 0), ([0], -1)])
        writer.finish()
    return prefix


def write_megatron(prefix: Path, dtype: str, most_sequences: int, seed: int = 7, count: int = 80) -> Path:
    """With Megatron's own builder: documents of one or several sequences, some empty, ends of document by chance."""
    pytest.importorskip("megatron.core")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for _ in range(count):
        lengths = random.integers(0, 30, random.integers(1, most_sequences + 1))
        builder.add_document(random.integers(0, 9, lengths.sum()), lengths.tolist())
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokens")
    return {
        "pairs": write_pairs(folder / "pairs"),
        "finnish": write_monolingual(folder / "finnish"),
        "core": write_megatron(folder / "core", "uint16", 1),
        "sentences": write_megatron(folder / "sentences", "int32", 4),
    }


def open_source(prefixes: dict[str, Path], name: str, check: Any = "sizes") -> TokenFile:
    ours = name in ("pairs", "finnish")
    return read_token_file(prefixes[name], None if ours else "swe_Latn", None if ours else 3, check=check)


NAMES = ("pairs", "finnish", "core", "sentences")


def plain_stream(file: TokenFile, stream: SourceStream) -> PlainStream:
    """The same from the file's own methods."""
    run = [*(LANGUAGES.index(code) for code in file.languages), -1]
    documents = []
    for number in range(len(file)):
        ids, languages = file[number].tolist(), file.language_ids(number).tolist()
        eod = [file.eod == token for token in ids]
        if file.manifest:
            eod = [at == len(ids) - 1 for at in range(len(ids))]
        documents.append(
            [Token(token, run[spoken], number, end) for token, spoken, end in zip(ids, languages, eod, strict=True)]
        )
    return PlainStream(
        documents, seq_length=stream.seq_length, split_key=stream.part.key, part=(stream.part.begin, stream.part.end),
        keys=[
            tuple(order_key(stream.seed, stream.name, of, epoch) for of in ("documents", "windows"))
            for epoch in range(4)
        ],
        whole_documents=stream.whole_documents,
    )  # fmt: skip


@pytest.fixture(params=["cut", "whole"])
def whole_documents(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "whole")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["train", "validation", None])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_counts_and_samples_are_those_of_a_loop_over_the_file(
    name: str, part: Any, eod_mask_loss: bool, whole_documents: bool, prefixes: dict[str, Path]
) -> None:
    file = open_source(prefixes, name)
    split = split_documents(name, len(file), (Fraction(70), Fraction(30), Fraction(0)))
    stream = SourceStream(
        name, file, LANGUAGES, seq_length=SEQ_LENGTH, seed=7, part=split[part] if part else None,
        whole_documents=whole_documents, eod_mask_loss=eod_mask_loss,
    )  # fmt: skip
    plain = plain_stream(file, stream)
    windows = plain.draws(3)
    assert [stream.num_windows(epoch) for epoch in range(3)] == [len(plain.windows(epoch)) for epoch in range(3)]
    counts = stream.windows(0, len(windows))
    options = {"reset_position_ids": True, "eod_mask_loss": eod_mask_loss, "padding_token": 5}
    index = _native.ListedSamples(np.zeros(len(windows), np.int32), np.arange(len(windows)))
    # A reader of its own builds what it needs.
    fresh = pickle.loads(pickle.dumps(stream))
    batch = BlendReader([fresh], index, seq_length=SEQ_LENGTH, **options).batch(range(len(windows)))
    for draw, window in enumerate(windows):
        expected = plain_sample(window, 0, seq_length=SEQ_LENGTH, **options)
        for field, values in expected.items():
            np.testing.assert_array_equal(batch[field][draw], values, err_msg=f"{field} of {draw}")
        languages = expected["language_ids"].tolist()
        assert counts.content_NK[draw].tolist() == [languages.count(language) for language in range(3)]
        assert counts.tokens_N[draw] == (expected["document_ids"] >= 0).sum()
        assert counts.loss_N[draw] == expected["loss_mask"].sum()
    # Any range is a part of it.
    begin, end = len(windows) // 3, len(windows) - 5
    piece = stream.windows(begin, end)
    np.testing.assert_array_equal(piece.content_NK, counts.content_NK[begin:end])
    np.testing.assert_array_equal(piece.loss_N, counts.loss_N[begin:end])
    assert stream.begun_and_cut(end) == plain.begun_and_cut(end, 3)
    held = [token for document in plain.part for token in plain.documents[document]]
    assert stream.tokens == len(held)
    assert stream.content_tokens_K.tolist() == [sum(token.language == k for token in held) for k in range(3)]
    left_out = stream.left_out(1)
    assert left_out.tokens == len(held) - sum(min(len(window), SEQ_LENGTH) for window in plain.windows(1))
    if whole_documents:
        assert left_out.documents == sum(len(plain.documents[document]) > SEQ_LENGTH for document in plain.part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_documents_and_stretches_are_those_of_a_loop_over_the_file(name: str, prefixes: dict[str, Path]) -> None:
    file = open_source(prefixes, name)
    split = split_documents(name, len(file), (Fraction(50), Fraction(30), Fraction(20)))["test"]
    stream = SourceStream(
        name, file, LANGUAGES, seq_length=SEQ_LENGTH, seed=7, part=split, eod_mask_loss=True
    )
    plain = plain_stream(file, stream)
    drawn = [document for epoch in range(3) for document in plain.order(epoch)]
    counts = stream.documents(5, len(drawn) - 3)
    random = np.random.default_rng(0)
    lengths = np.array([len(plain.documents[document]) for document in drawn])
    begins = random.integers(0, lengths + 1)
    ends = random.integers(begins, lengths + 1)
    stretches = stream.stretches(np.arange(len(drawn)), begins, ends)

    def expected(tokens: list[Token]) -> tuple[list[int], int, int]:
        languages = [token.language for token in tokens]
        loss = len(tokens) - sum(token.is_eod for token in tokens)
        return [languages.count(language) for language in range(3)], len(tokens), loss

    for draw, document in enumerate(drawn):
        assert stream.document_of(draw) == document
        row = stretches.content_NK[draw].tolist(), stretches.tokens_N[draw], stretches.loss_N[draw]
        assert row == expected(plain.documents[document][begins[draw] : ends[draw]])
        if 5 <= draw < len(drawn) - 3:
            at = draw - 5
            row = counts.content_NK[at].tolist(), counts.tokens_N[at], counts.loss_N[at]
            assert row == expected(plain.documents[document])
    with pytest.raises(ValueError, match=r"tokens 0\.\.99 are not all in document"):
        stream.stretches(np.array([0]), np.array([0]), np.array([99]))
    with pytest.raises(ValueError, match="no document with draw -1"):
        stream.stretches(np.array([-1]), np.array([0]), np.array([0]))


def test_parts_of_a_split_share_no_document(prefixes: dict[str, Path]) -> None:
    file = open_source(prefixes, "finnish")
    parts = split_documents("finnish", len(file), (Fraction(80), Fraction(15), Fraction(5)))
    streams = [
        SourceStream("finnish", file, LANGUAGES, seq_length=SEQ_LENGTH, seed=1, part=part) for part in parts.values()
    ]
    read = [{stream.document_of(draw) for draw in range(len(stream))} for stream in streams]
    assert [len(documents) for documents in read] == [240, 45, 15]
    assert set.union(*read) == set(range(300))
    # With another seed the same documents are held out, in another order.
    again = SourceStream("finnish", file, LANGUAGES, seq_length=SEQ_LENGTH, seed=2, part=parts["validation"])
    in_order = [again.document_of(draw) for draw in range(45)]
    assert set(in_order) == read[1]
    assert in_order != [streams[1].document_of(draw) for draw in range(45)]


def test_order_depends_on_seed_name_and_epoch_alone(prefixes: dict[str, Path]) -> None:
    file = open_source(prefixes, "pairs")

    def order(name: str, seed: int, epoch: int, **options: Any) -> list[int]:
        stream = SourceStream(name, file, LANGUAGES, seq_length=8, seed=seed, **options)
        return [stream.document_of(draw) for draw in range(epoch * len(file), (epoch + 1) * len(file))]

    first = order("pairs", 7, 0)
    assert first == order("pairs", 7, 0, whole_documents=True, eod_mask_loss=True)
    assert first == list(plain_order(order_key(7, "pairs", "documents", 0), len(file)))
    others = [order("pairs", 8, 0), order("other", 7, 0), order("pairs", 7, 1)]
    assert len({tuple(found) for found in (first, *others)}) == 4


def test_order_keys_never_change_and_parts_do_not_run_together() -> None:
    assert order_key(1234, "eng", "documents", 0) == 12227897946483733863
    assert order_key(1, "a", "b") != order_key(1, "ab") != order_key(1, "a,b")
    assert order_key(1, "1") != order_key(1, 1)


def test_neither_tokens_nor_spans_of_a_regular_file_are_read_to_count_it(tmp_path: Path) -> None:
    prefix = write_monolingual(tmp_path / "finnish")
    expected = SourceStream(
        "finnish", read_token_file(prefix, check="sizes"), LANGUAGES, seq_length=SEQ_LENGTH, seed=7
    ).windows(0, 100)
    companion(prefix, "bin").write_bytes(b"\xff" * companion(prefix, "bin").stat().st_size)
    # Of the spans all but the header and the last end, which opening looks at.
    spans = bytearray(companion(prefix, "spans").read_bytes())
    spans[-600 * 9 : -600 - 8] = b"\xff" * (599 * 8)
    spans[-600:] = b"\xff" * 600
    companion(prefix, "spans").write_bytes(spans)
    stream = SourceStream("finnish", read_token_file(prefix, check="sizes"), LANGUAGES, seq_length=SEQ_LENGTH, seed=7)
    np.testing.assert_array_equal(stream.windows(0, 100).content_NK, expected.content_NK)
    index = _native.ListedSamples(np.zeros(1, np.int32), np.zeros(1, np.int64))
    with pytest.raises(FormatError, match=r"finnish: document \d+ has a token id outside its vocabulary of 1000"):
        BlendReader([stream], index, seq_length=SEQ_LENGTH, padding_token=0).batch([0])


@pytest.mark.parametrize("kind", ["starts", "packing", "counts", "totals"])
def test_what_the_cache_keeps_is_what_would_be_built(
    kind: str, prefixes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_stream, "_FEW_DOCUMENTS", 0)
    whole = kind == "packing"
    part = split_documents("pairs", 60, (Fraction(9), Fraction(1), Fraction(0)))["train"]

    def read(cache: IndexCache) -> tuple[np.ndarray, ...]:
        stream = SourceStream(
            "pairs", open_source(prefixes, "pairs"), LANGUAGES, seq_length=SEQ_LENGTH, seed=7, part=part,
            whole_documents=whole, cache=cache,
        )  # fmt: skip
        counts = stream.windows(0, stream.num_windows(0) + stream.num_windows(1))
        left_out = np.array([stream.left_out(1).tokens])
        return counts.content_NK, counts.tokens_N, counts.loss_N, stream.content_tokens_K, left_out

    expected = read(IndexCache(None))
    first = read(IndexCache(tmp_path))
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert any(name.startswith(f"{kind}-") for name in kept)
    again = read(IndexCache(tmp_path))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
    for arrays in (first, again):
        for found, wanted in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_text_tokenised_again_in_place_is_never_read_with_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_stream, "_FEW_DOCUMENTS", 0)

    def stream_of(file: TokenFile) -> SourceStream:
        cache = IndexCache(tmp_path / "cache")
        return SourceStream("pairs", file, LANGUAGES, seq_length=SEQ_LENGTH, seed=7, cache=cache)

    def first_windows() -> list[list[int]]:
        stream = stream_of(read_token_file(tmp_path / "pairs", check="sizes"))
        plain = plain_stream(stream.file, stream)
        stream.windows(0, 5)
        index = _native.ListedSamples(np.zeros(5, np.int32), np.arange(5))
        tokens = BlendReader([stream], index, seq_length=SEQ_LENGTH, padding_token=0).batch(range(5))["tokens"].tolist()
        assert tokens == [[token.id for token in window[:-1]] for window in plain.windows(0)[:5]]
        return tokens

    write_pairs(tmp_path / "pairs", seed=1)
    before = first_windows()
    write_pairs(tmp_path / "pairs", seed=2)
    assert first_windows() != before
    # As many bytes as before, at the same moment, without a manifest: the time of modification tells.
    for kind in ("manifest.json", "spans"):
        companion(tmp_path / "pairs", kind).unlink()

    def open_core() -> SourceStream:
        return stream_of(read_token_file(tmp_path / "pairs", "fin_Latn", 0, check="sizes"))

    first = open_core().identity
    assert open_core().identity == first
    os.utime(companion(tmp_path / "pairs", "bin"), ns=(1, 1))
    assert open_core().identity != first


def test_a_process_that_is_sent_a_stream_opens_the_file_itself(tmp_path: Path) -> None:
    prefix = write_monolingual(tmp_path / "finnish")
    stream = SourceStream(
        "finnish", read_token_file(prefix, check="sizes"), LANGUAGES, seq_length=SEQ_LENGTH, seed=7,
        part=DocumentRange(10, 200, 300, 5), cache=IndexCache(tmp_path / "cache"), num_threads=3,
    )  # fmt: skip
    sent = pickle.dumps(stream)
    assert len(sent) < 4000
    again = pickle.loads(sent)
    assert again.identity == stream.identity and again.num_threads == 3
    write_monolingual(prefix, seed=99)
    with pytest.raises(FormatError, match="was made again since"):
        pickle.loads(sent)


def _batch_sum(reader_bytes: bytes, queue: Any) -> None:
    reader = pickle.loads(reader_bytes)
    batch = reader.batch(np.arange(len(reader)))
    queue.put({name: int(array.astype(np.int64).sum()) for name, array in batch.items()})


class PicklableSamples(_native.ListedSamples):
    """Listed samples that travel to other processes."""

    def __init__(self, sources: np.ndarray, draws: np.ndarray) -> None:
        super().__init__(sources, draws)
        self._arguments = (sources, draws)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_reader_works_in_data_workers(method: str, prefixes: dict[str, Path]) -> None:
    streams = [
        SourceStream(name, open_source(prefixes, name), LANGUAGES, seq_length=SEQ_LENGTH, seed=7)
        for name in ("pairs", "finnish")
    ]
    sources = np.arange(40, dtype=np.int32) % 2
    index = PicklableSamples(sources, np.arange(40, dtype=np.int64))
    reader = BlendReader(streams, index, seq_length=SEQ_LENGTH, padding_token=0)
    expected = {name: int(array.astype(np.int64).sum()) for name, array in reader.batch(range(40)).items()}
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_batch_sum, args=(pickle.dumps(reader), queue))
    process.start()
    assert queue.get(timeout=300) == expected
    process.join(60)


def test_buffers_are_used_again_and_rows_are_of_any_order(prefixes: dict[str, Path]) -> None:
    stream = SourceStream("pairs", open_source(prefixes, "pairs"), LANGUAGES, seq_length=SEQ_LENGTH, seed=7)
    count = stream.num_windows()
    index = _native.ListedSamples(np.zeros(count, np.int32), np.arange(count))
    reader = BlendReader([stream], index, seq_length=SEQ_LENGTH, padding_token=0)
    everything = reader.batch(range(count))
    out = reader.batch([3, 1, 1, 2])
    for name, array in out.items():
        np.testing.assert_array_equal(array, everything[name][[3, 1, 1, 2]])
    assert reader.batch(np.array([0, 5, 6, 7]), out) is out
    np.testing.assert_array_equal(out["tokens"], everything["tokens"][[0, 5, 6, 7]])
    out["loss_mask"][0] = 0.0
    assert reader.batch([0])["loss_mask"].all()
    # Positions in the sample are the same everywhere: one array for all batches, also after a larger one.
    more = reader.batch(np.arange(count).repeat(2))
    for batch in (more, reader.batch([4])):
        np.testing.assert_array_equal(batch["position_ids"], np.tile(np.arange(SEQ_LENGTH), (len(batch["tokens"]), 1)))
    assert np.shares_memory(more["position_ids"], reader.batch([2])["position_ids"])
    assert reader.batch([])["tokens"].shape == (0, SEQ_LENGTH)
    for wrong in ([count], [-1]):
        with pytest.raises(IndexError):
            reader.batch(wrong)


def test_wrong_arguments_are_refused(prefixes: dict[str, Path]) -> None:
    file = open_source(prefixes, "pairs")
    with pytest.raises(ValueError, match=r"pairs holds eng_Latn, which the run \['fin_Latn'\] does not have"):
        SourceStream("pairs", file, ["fin_Latn"], seq_length=SEQ_LENGTH, seed=7)
    with pytest.raises(ValueError, match="the part is of 59 documents; pairs has 60"):
        SourceStream("pairs", file, LANGUAGES, seq_length=SEQ_LENGTH, seed=7, part=DocumentRange.whole(59))
    stream = SourceStream("pairs", file, LANGUAGES, seq_length=100_000, seed=7)
    assert stream.num_windows() == 0
    for call in (lambda: stream.windows(0, 1), lambda: stream.prepare(1), lambda: stream.begun_and_cut(1)):
        with pytest.raises(ValueError, match="no window of 100000 tokens"):
            call()
    assert len(stream.windows(0, 0).tokens_N) == 0
    with pytest.raises(ValueError, match="no draws"):
        stream.windows(2, 1)
    nothing = SourceStream("pairs", file, LANGUAGES, seq_length=4, seed=7, part=DocumentRange(3, 3, 60))
    assert (nothing.tokens, nothing.num_windows(), len(nothing)) == (0, 0, 0)
    assert len(nothing.documents(0, 0).tokens_N) == 0
    with pytest.raises(ValueError, match="no draws of pairs"):
        nothing.documents(0, 1)
    index = _native.ListedSamples(np.zeros(1, np.int32), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="pairs is cut for seq_length=4, not 8"):
        BlendReader([nothing], index, seq_length=8, padding_token=0)
    with pytest.raises(IndexError, match="has no window"):
        BlendReader([nothing], index, seq_length=4, padding_token=0).batch([0])

"""What the writer makes of sentences, widths, batches and full disks; Megatron's own builder and reader beside it."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.errors import CorpusError, FormatError
from megatron_xalign.formats import token_file_columns
from megatron_xalign.formats.token_file import (
    NO_LANGUAGE,
    TokenFileWriter,
    companion,
    read_manifest,
    read_token_file,
    token_dtype,
    verify_token_file,
)

KINDS = ("bin", "idx", "spans")


def open_writer(prefix: Path, tokenizer, **more) -> TokenFileWriter:
    settings = {"origin": "parallel", "languages": ["eng_Latn", "fin_Latn"], **more}
    return TokenFileWriter(prefix, tokenizer=tokenizer, **settings)


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (100_000, np.int32)])
def test_documents_of_several_sentences_are_what_megatrons_builder_makes(
    tmp_path: Path, token_files, megatron_builder, vocab_size: int, dtype
) -> None:
    documents = token_files.documents(1, 60, vocab_size=vocab_size)
    tokenizer = token_files.Tokenizer(vocab_size=vocab_size)
    manifest = token_files.write(tmp_path / "ours", documents, tokenizer=tokenizer, sentences=True)
    sentences = []
    for document in documents:
        borders = np.cumsum(token_files.sentences(document))
        sentences.append([list(part) for part in np.split(token_files.ids(document), borders[:-1])])
    megatron_builder(tmp_path / "theirs", sentences, dtype)
    for kind in ("bin", "idx"):
        assert companion(tmp_path / "ours", kind).read_bytes() == companion(tmp_path / "theirs", kind).read_bytes()
    assert manifest["sequences"] == sum(map(len, sentences)) > manifest["documents"] == 60
    file = read_token_file(tmp_path / "ours")
    assert [document.tolist() for document in file] == list(map(token_files.ids, documents))
    assert verify_token_file(tmp_path / "ours")["sequences"] == manifest["sequences"]


document = st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=4), min_size=1, max_size=4)
batch = st.tuples(st.booleans(), st.lists(document, min_size=1, max_size=4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(batch, min_size=1, max_size=5))
def test_batches_with_and_without_sentences_mix(
    tmp_path: Path, token_files, megatron_builder, batches: list
) -> None:
    theirs = []
    with open_writer(tmp_path / "x", token_files.Tokenizer()) as writer:
        for with_sentences, documents in batches:
            ids = [[token for sentence in document for token in sentence] for document in documents]
            lengths = np.array([len(one) for one in ids])
            sentences = np.array([len(sentence) for document in documents for sentence in document])
            writer.add_documents(
                np.concatenate(ids), lengths, np.cumsum(lengths), np.zeros(len(ids), dtype=int),
                sentences if with_sentences else None,
            )
            theirs += documents if with_sentences else [[one] for one in ids]
        manifest = writer.finish()
    megatron_builder(tmp_path / "m", theirs)
    for kind in ("bin", "idx"):
        assert companion(tmp_path / "x", kind).read_bytes() == companion(tmp_path / "m", kind).read_bytes()
    assert manifest["sequences"] == sum(map(len, theirs))
    assert manifest["longest_document_tokens"] == max(sum(map(len, document)) for document in theirs)
    assert manifest["shortest_document_tokens"] == min(sum(map(len, document)) for document in theirs)


def test_sentences_that_do_not_fit_their_documents_are_a_value_error(tmp_path: Path, token_files) -> None:
    with open_writer(tmp_path / "x", token_files.Tokenizer()) as writer:
        arrays = np.array([1, 2, 3, 4]), np.array([3, 1]), np.array([3, 4]), np.array([0, 0])
        for bad in ([4], [1, 3], [3, 2], [3, 0, 1], [2, 2], [3, 1, -1, 1], [], [1.0, 2.0, 1.0], [[3, 1]]):
            with pytest.raises(ValueError, match="sentence"):
                writer.add_documents(*arrays, np.array(bad))
        writer.add_documents(*arrays, np.array([1, 2, 1]))
        assert (writer.documents, writer.sequences, writer.tokens, writer.spans) == (2, 3, 4, 2)


# --- width ------------------------------------------------------------------------------------------------------------

WIDTHS = [65_499, 65_500, 65_501, 65_535, 65_536, 65_537]


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_every_reader_agrees_on_the_ids_around_the_limits_of_uint16(tmp_path: Path, token_files, vocab_size) -> None:
    """Readers that look at the header, and those that go by the size of the vocabulary."""
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[1, vocab_size - 1, 0], [vocab_size - 1, vocab_size - 2, 255, 256, 0], [0]]
    prefix = tmp_path / "x"
    with open_writer(prefix, token_files.Tokenizer(vocab_size=vocab_size)) as writer:
        for ids in documents:
            writer.add_document([(ids, 0)])
        writer.finish()
    assert [ids.tolist() for ids in read_token_file(prefix)] == documents

    by_header = indexed_dataset.IndexedDataset(str(prefix))
    assert [by_header[index].tolist() for index in range(3)] == documents
    by_header = indexed_dataset.IndexedDataset(str(prefix), mmap=False)
    assert [by_header[index].tolist() for index in range(3)] == documents

    # Megatron's fast index path: its own config chooses the dtype from the vocabulary, its own reader believes it.
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1, sequence_length=4, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        tokenizer=SimpleNamespace(vocab_size=vocab_size), sequences_per_dataset={str(prefix): (3, 4)},
        blend=([str(prefix)], None), split="1,0,0", mmap_bin_files=True,
    )
    fast = indexed_dataset.IndexedDataset(
        str(prefix), sequences_per_dataset=config.sequences_per_dataset[str(prefix)],
        dtype_code=config.token_dtype_code,
    )
    assert [fast[index].tolist() for index in range(3)] == documents
    assert fast.document_indices.tolist() == [0, 1, 2, 3]

    tokenization = pytest.importorskip("datatrove.utils.tokenization")
    dataset = pytest.importorskip("datatrove.utils.dataset")

    class Step(tokenization.PipelineStepWithTokenizer):
        name, type = "test", "test"
        tokenizer = SimpleNamespace(get_vocab_size=lambda: vocab_size)

        def run(self, data, rank: int = 0, world_size: int = 1):
            return data

    flat = [token for ids in documents for token in ids]
    read = dataset.DatatroveFileDataset(
        f"{prefix}.bin", seq_len=len(flat) - 1, token_size=Step().token_size
    )
    assert read[0]["input_ids"].tolist() == flat


def test_the_width_of_megatrons_writer_is_misread_by_its_own_fast_path(tmp_path: Path, megatron_builder) -> None:
    """Why ours differs from Megatron's writer between 65,500 and 65,536 ids; fails when that is mended."""
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    optimal = indexed_dataset.DType.optimal_dtype
    megatron_builder(tmp_path / "m", [[[1, 65_535, 7, 0]]], optimal(65_536))
    # Held by a name: Megatron's reader unmaps its file when it goes, under the arrays it gave out.
    by_header = indexed_dataset.IndexedDataset(str(tmp_path / "m"))
    assert by_header[0].tolist() == [1, 65_535, 7, 0]
    uint16 = indexed_dataset.DType.code_from_dtype(np.uint16)
    fast = indexed_dataset.IndexedDataset(str(tmp_path / "m"), sequences_per_dataset=(1, 2), dtype_code=uint16)
    assert fast[0].tolist() == [1, 0, 65_535, 0]
    assert [np.dtype(optimal(size)).name for size in WIDTHS] == ["uint16", *["int32"] * 5]
    assert [token_dtype(size).name for size in WIDTHS] == [*["uint16"] * 5, "int32"]


def test_ids_of_any_integer_width_make_the_same_bytes(tmp_path: Path, token_files) -> None:
    rng = np.random.default_rng(3)
    # More tokens than go into one of the writer's buffers.
    tokens = rng.integers(0, 128, 300_000)
    lengths = np.full(300, 1000)
    ends = np.cumsum(lengths)
    seen = {}
    for dtype in ("i1", "u1", "<i2", ">i2", "<u2", "<i4", "<u4", "<i8", ">i8", "<u8"):
        for step in (1, 2):
            given = np.repeat(tokens.astype(dtype), step)[::step]
            with open_writer(tmp_path / "x", token_files.Tokenizer()) as writer:
                writer.add_documents(given, lengths, ends, np.zeros(300, dtype=int))
                seen[dtype, step] = writer.finish()["files"]
    assert len({str(files) for files in seen.values()}) == 1
    assert np.array_equal(read_token_file(tmp_path / "x").tokens, tokens)


def test_ids_outside_the_vocabulary_are_refused_in_any_width(tmp_path: Path, token_files) -> None:
    one = np.array([1])
    for vocab_size in (1000, 65_536, 100_000):
        with open_writer(tmp_path / "x", token_files.Tokenizer(vocab_size=vocab_size)) as writer:
            for dtype in ("<i2", "<u2", ">i4", "<i4", "<u4", "<i8", "<u8"):
                for value in (-1, vocab_size, 1 << 31, -(1 << 40), (1 << 63) + 5):
                    info = np.iinfo(dtype)
                    if info.min <= value <= info.max:
                        with pytest.raises(ValueError, match="leave the vocabulary"):
                            writer.add_documents(np.array([value], dtype=dtype), one, one, one)
                if vocab_size - 1 <= np.iinfo(dtype).max:
                    writer.add_documents(np.array([vocab_size - 1], dtype=dtype), one, one, one)
            for bad in (np.array([1.0]), np.array([[1]]), np.array([True]), np.array(["1"])):
                with pytest.raises(ValueError, match="token ids are integers"):
                    writer.add_documents(bad, one, one, one)


# --- counts -----------------------------------------------------------------------------------------------------------


def test_the_manifest_counts_documents_and_tokens_by_language(tmp_path: Path, token_files) -> None:
    documents = token_files.documents(5, 300, num_languages=3)
    codes = ["eng_Latn", "fin_Latn", "zho_Hans"]
    manifest = token_files.write(tmp_path / "x", documents, languages=codes)
    for index, code in enumerate(codes):
        of_language = [[ids for ids, language in document if language == index] for document in documents]
        assert manifest["tokens_by_language"][code] == sum(len(ids) for pieces in of_language for ids in pieces)
        assert manifest["documents_by_language"][code] == sum(map(bool, of_language))
    lengths = [len(token_files.ids(document)) for document in documents]
    assert (manifest["longest_document_tokens"], manifest["shortest_document_tokens"]) == (max(lengths), min(lengths))
    assert manifest["spans"] == sum(map(len, documents)) and not manifest["content_is_regular"]


text = [([5, 6], 0), ([0], NO_LANGUAGE)]
IRREGULAR = {
    "no end": [([5, 6], 0)],
    "no text": [([0], NO_LANGUAGE)],
    "two tokens of no language": [([5], 0), ([0, 0], NO_LANGUAGE)],
    "end first": [([0], NO_LANGUAGE), ([5], 0)],
    "two spans of text": [([5], 0), ([6], 0), ([0], NO_LANGUAGE)],
    "text after the end": [([5], 0), ([0], NO_LANGUAGE), ([6], 0)],
}


@pytest.mark.parametrize("what", IRREGULAR)
def test_content_is_regular_only_if_every_document_is_text_and_one_token_more(
    tmp_path: Path, token_files, what: str
) -> None:
    def regular(documents: list, languages: tuple[str, ...] = ("eng_Latn",)) -> bool:
        manifest = token_files.write(tmp_path / "x", documents, languages=languages, origin="monolingual", batch=2)
        file = read_token_file(tmp_path / "x", check="sizes")
        assert file.content_is_regular == manifest["content_is_regular"]
        return file.content_is_regular

    assert regular([text]) and regular([text] * 5)
    assert not regular([text] * 5, ("eng_Latn", "fin_Latn"))
    for at in range(5):
        documents = [text] * 5
        documents[at] = IRREGULAR[what]
        assert not regular(documents)
        # In counts alone it can be made up for by another document.
        assert not regular([*documents, [([5], 0)], [([0], NO_LANGUAGE)], [([5], 0), ([0], -1), ([5], 0), ([0], -1)]])


def test_a_document_that_megatrons_index_cannot_hold_is_refused(tmp_path: Path, token_files) -> None:
    size = 1 << 31
    tokens = np.broadcast_to(np.array([1], dtype=np.int32), (size,))
    with open_writer(tmp_path / "x", token_files.Tokenizer()) as writer:
        writer.add_document([([1], 0)])
        with pytest.raises(CorpusError, match=r"document 1 of .* has 2,147,483,648 tokens; .* up to 2,147,483,647"):
            writer.add_documents(tokens, np.array([size]), np.array([size]), np.array([0]))


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, token_files) -> None:
    count = 20_000
    arrays = np.ones(4 * count, dtype=np.int32), np.full(count, 4), np.arange(1, count + 1) * 4, np.zeros(count, int)

    def peak(batches: int) -> int:
        tracemalloc.start()
        with open_writer(tmp_path / "x", token_files.Tokenizer()) as writer:
            for _ in range(batches):
                writer.add_documents(*arrays, np.full(2 * count, 2))
            writer.finish()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(60), peak(240)
    assert many < few + 1_000_000, (few, many)
    assert len(read_token_file(tmp_path / "x", check="sizes")) == 240 * count


# --- failing disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "the disk reports an error")],
)
def test_a_disk_that_fails_at_any_write_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    calls = 0
    moment = -1

    def failing(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise OSError(number, os.strerror(number))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(token_file_columns._HashedFile, "_write", failing(token_file_columns._HashedFile._write))
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    documents = token_files.documents(1, 9)
    (tmp_path / "f").mkdir()
    for before in (False, True):
        if before:
            # A file that was there stays, or goes when its successor was being named: never a mixture.
            token_files.write(tmp_path / "f" / "x", documents[:2])
        was = {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()}
        for moment in range(1000):
            calls = 0
            try:
                token_files.write(tmp_path / "f" / "x", documents)
                break
            except FormatError as error:
                assert said in str(error) and str(tmp_path) in str(error)
            now = {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()}
            assert now == was or (before and now.items() <= was.items() and "x.manifest.json" not in now)
            if now != was:
                with pytest.raises(FormatError):
                    read_token_file(tmp_path / "f" / "x", "und")
                moment, calls = -1, 0
                token_files.write(tmp_path / "f" / "x", documents[:2])
        assert calls > 15
        moment = -1
    assert len(read_token_file(tmp_path / "f" / "x")) == 9


FULL = """
import resource, sys
from types import SimpleNamespace
import numpy as np
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file import TokenFileWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
tokenizer = SimpleNamespace(sha256="ab" * 32, vocab_size=1000, eod=0)
n = 5000
try:
    with TokenFileWriter(sys.argv[1], tokenizer=tokenizer, origin="monolingual", languages=["fin_Latn"]) as writer:
        for _ in range(4):
            writer.add_documents(np.ones(n, int), np.ones(n, int), np.arange(1, n + 1), np.zeros(n, int))
        writer.finish()
except FormatError as error:
    print("FormatError", error)
"""


@pytest.mark.parametrize("limit", [1000, 20_000, 50_000, 100_000, 170_000, 500_000])
def test_a_real_limit_of_the_system_is_one_clear_error_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "x"), str(limit)], env=environment, timeout=300, check=False,
        capture_output=True, text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    # .bin has 40,000 bytes, .idx 400,034; .spans 180,056.
    assert done.stdout.startswith("FormatError" if limit < 400_034 else "")
    assert "larger than this file system or your limits" in done.stdout or limit > 400_034
    assert len(list(tmp_path.iterdir())) == (4 if limit > 400_034 else 0)


def test_on_a_full_disk_the_first_error_is_told_though_closing_fails_too(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is written to /dev/full stays in memory until it is flushed, which fails: columns met a full disk like that.
    full = functools.partial(Path("/dev/full").open, "w+b")
    monkeypatch.setattr(token_file_columns.tempfile, "SpooledTemporaryFile", lambda *_, **__: full())
    with pytest.raises(FormatError, match="cannot be written: the disk is full"):
        token_files.write(tmp_path / "x", token_files.documents(1, 9))
    columns = token_file_columns.TokenFileColumns(tmp_path / "x", np.dtype(np.uint16))
    with pytest.raises(FormatError, match="somebody else's"), columns:
        columns.put_sequences(np.ones(3, dtype=np.int32))
        raise FormatError("somebody else's")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_the_error_says_what_to_do(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = token_files.Tokenizer()

    def refused(prefix: Path, said: str) -> None:
        with pytest.raises(FormatError, match=said), open_writer(prefix, tokenizer):
            raise AssertionError("the block was entered")

    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "x", "a part of the path is a file")
    refused(tmp_path / ("n" * 240), r"the name has 254 bytes; use a shorter one \(255 less \d+ at most\)")
    refused(tmp_path / ("n" * 300), "use a shorter one")

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    monkeypatch.setattr(Path, "open", read_only)
    refused(tmp_path / "x", "the file system is read-only; write elsewhere")
    monkeypatch.undo()
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(tmp_path / "locked" / "x", "you may not write there")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(FormatError, match="there is a folder of that name"):
        token_files.write(tmp_path / "folder", token_files.documents(1, 2))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "locked") == ["file", "folder.bin"]


def test_a_writer_that_failed_or_is_done_takes_nothing_more(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = [([5], 0), ([0], NO_LANGUAGE)]
    writer = open_writer(tmp_path / "x", token_files.Tokenizer())
    with writer:
        writer.add_document(document)
        writer.finish()
        with pytest.raises(FormatError, match="is not open for writing"):
            writer.add_document(document)
    with pytest.raises(FormatError, match="is not open for writing"):
        writer.add_document(document)
    with open_writer(tmp_path / "y", token_files.Tokenizer()) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(
                token_file_columns._HashedFile, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, ""))
            )
            with pytest.raises(FormatError, match="the disk is full"):
                writer.add_document(document)
        # Half a document may be written; what follows it would lie at the wrong place.
        with pytest.raises(FormatError, match="is not open for writing"):
            writer.add_document(document)
        with pytest.raises(FormatError, match="is not open for writing"):
            writer.finish(allow_empty=True)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"x"}


def test_a_manifest_that_is_no_json_leaves_nothing(tmp_path: Path, token_files) -> None:
    for bad in (float("nan"), object(), "\ud800"):
        with pytest.raises((ValueError, TypeError)):
            token_files.write(tmp_path / "x", token_files.documents(1, 2), more=bad)
        assert not list(tmp_path.iterdir())


def test_languages_no_table_could_show_are_a_value_error(tmp_path: Path, token_files) -> None:
    for bad in (["a", "a"], [""], ["a\nb"], ["\ud800"], [f"l{n}" for n in range(128)]):
        with pytest.raises(ValueError, match="different printable codes"):
            open_writer(tmp_path / "x", token_files.Tokenizer(), languages=bad)
    with pytest.raises(ValueError, match="neither 'monolingual' nor 'parallel'"):
        open_writer(tmp_path / "x", token_files.Tokenizer(), origin="both")


def test_languages_can_be_named_as_they_come(tmp_path: Path, token_files) -> None:
    with open_writer(tmp_path / "x", token_files.Tokenizer(), origin="monolingual", languages=[]) as writer:
        for code in ("fin_Latn", "eng_Latn", "fin_Latn"):
            writer.add_document([([5, 6], writer.language_index(code)), ([0], NO_LANGUAGE)])
        with pytest.raises(CorpusError, match="is no language code"):
            writer.language_index("a\nb")
        writer.finish()
    token_files.write(
        tmp_path / "y", [[([5, 6], index), ([0], -1)] for index in (0, 1, 0)], origin="monolingual",
        languages=["fin_Latn", "eng_Latn"],
    )
    assert read_manifest(tmp_path / "x") == {**read_manifest(tmp_path / "y"), "name": "x"}
    for kind in KINDS:
        assert companion(tmp_path / "x", kind).read_bytes() == companion(tmp_path / "y", kind).read_bytes()
    with open_writer(tmp_path / "z", token_files.Tokenizer(), languages=[]) as writer:
        for number in range(127):
            assert writer.language_index(f"l{number}") == number
        with pytest.raises(CorpusError, match="in more than 127 languages, one_More is one more"):
            writer.language_index("one_More")


def test_what_came_before_its_language_was_named_is_counted_right(tmp_path: Path, token_files) -> None:
    document, end = [([5], 0), ([0], NO_LANGUAGE)], [([0], NO_LANGUAGE)]
    for before, regular in (([], True), ([end], False), ([[([0], -1), ([0], -1)]], False)):
        with open_writer(tmp_path / "x", token_files.Tokenizer(), languages=[]) as writer:
            for one in before:
                writer.add_document(one)
            writer.language_index("fin_Latn")
            writer.add_document(document)
            assert writer.finish()["content_is_regular"] == regular
        assert verify_token_file(tmp_path / "x")["documents_by_language"] == {"fin_Latn": 1}
    with open_writer(tmp_path / "x", token_files.Tokenizer(), languages=[]) as writer:
        writer.add_document(end)
        with pytest.raises(ValueError, match="without a language"):
            writer.finish()
    with open_writer(tmp_path / "x", token_files.Tokenizer(), languages=["a"]) as writer:
        writer.add_documents(*(np.array(x) for x in ([5, 0, 6, 0], [2, 2], [1, 2, 3, 4], [0, -1, 0, -1])))
        writer.language_index("b")
        writer.add_documents(*(np.array(x) for x in ([5, 0], [2], [1, 2], [1, -1])))
        manifest = writer.finish()
    assert manifest["documents_by_language"] == {"a": 2, "b": 1} and not manifest["content_is_regular"]


def test_a_file_without_documents_is_written_only_when_asked_for(tmp_path: Path, token_files) -> None:
    with (
        pytest.raises(CorpusError, match="no document"),
        open_writer(tmp_path / "x", token_files.Tokenizer()) as writer,
    ):
        writer.finish()
    manifest = token_files.write(tmp_path / "x", [])
    assert read_manifest(tmp_path / "x") == manifest and manifest["documents"] == manifest["tokens"] == 0
    for check in ("index", "sizes"):
        file = read_token_file(tmp_path / "x", check=check)
        assert (len(file), file.num_tokens, list(file), file.offsets.tolist()) == (0, 0, [], [0])
        assert file.language_ids_flat(0, 0).size == file.sequence_lengths.size == 0
    assert verify_token_file(tmp_path / "x", token_files.Tokenizer())["documents"] == 0
    # Of a part of a corpus of which nothing was kept, the languages need not be known either.
    token_files.write(tmp_path / "y", [], languages=[])
    assert read_token_file(tmp_path / "y").languages == []
    assert verify_token_file(tmp_path / "y")["tokens_by_language"] == {}


def test_details_cannot_say_what_is_counted(tmp_path: Path, token_files) -> None:
    for name in ("tokens", "tokens_by_language", "files", "format"):
        with pytest.raises(ValueError, match=f"{name} of a manifest is counted, not given"):
            token_files.write(tmp_path / "x", token_files.documents(1, 2), **{name: 5})
    assert not list(tmp_path.iterdir())

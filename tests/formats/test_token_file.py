"""Token files against Megatron's own IndexedDataset, and against damage."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.errors import CorpusError, FormatError, XAlignError
from megatron_xalign.formats.token_file import (
    NO_LANGUAGE,
    TokenFileWriter,
    check_same_tokenizer,
    companion,
    read_manifest,
    read_token_file,
    token_dtype,
    verify_token_file,
)

EOD = 0
LANGUAGES = ["eng_Latn", "fin_Latn"]


@dataclass(frozen=True)
class FakeTokenizer:
    sha256: str = "ab" * 32
    vocab_size: int = 1000
    eod: int = EOD


def write(prefix: Path, documents: list, tokenizer: FakeTokenizer = FakeTokenizer(), languages=LANGUAGES) -> dict:
    with TokenFileWriter(prefix, tokenizer=tokenizer, origin="parallel", languages=languages) as writer:
        for parts in documents:
            writer.add_document(parts)
        return writer.finish(counts={"read": len(documents)})


def pair(a: list[int], b: list[int]) -> list:
    return [(a, 0), ([9], NO_LANGUAGE), (b, 1), ([EOD], NO_LANGUAGE)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    prefix = tmp_path / "eng-fin"
    write(prefix, [pair([5, 6, 7], [8]), pair([11], [12, 13]), pair([21, 22], [23, 24, 25])])
    return prefix


def test_megatrons_indexed_dataset_reads_our_files_token_for_token(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rng = np.random.default_rng(1)
    for vocab_size in (1000, 65_520, 70_000):
        documents = [
            pair(rng.integers(1, vocab_size, 1 + n % 7).tolist(), rng.integers(1, vocab_size, 1 + n % 3).tolist())
            for n in range(50)
        ]
        prefix = tmp_path / f"v{vocab_size}"
        write(prefix, documents, FakeTokenizer(vocab_size=vocab_size))
        theirs = indexed_dataset.IndexedDataset(str(prefix))
        assert len(theirs) == 50
        assert np.array_equal(theirs.document_indices, np.arange(51))
        for index, parts in enumerate(documents):
            assert theirs[index].tolist() == [token for ids, _ in parts for token in ids]
        # Same bytes as Megatron's builder, given the same width.
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=token_dtype(vocab_size).type)
        for parts in documents:
            ids = [token for piece, _ in parts for token in piece]
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(tmp_path / "m.idx"))
        for kind in ("bin", "idx"):
            assert companion(prefix, kind).read_bytes() == (tmp_path / f"m.{kind}").read_bytes()


def test_the_token_width_is_the_one_megatrons_fast_index_path_assumes() -> None:
    # gpt_dataset.py: 4 (int32) if vocab_size > iinfo(uint16).max + 1 else 8 (uint16)
    assert [token_dtype(n).name for n in (65_499, 65_500, 65_536, 65_537)] == ["uint16", "uint16", "uint16", "int32"]


def test_a_file_of_megatrons_builder_is_read_with_several_sequences_per_document(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, EOD], [2, 3])
    builder.add_document([], [])
    builder.add_document([70_000, EOD], [2])
    builder.finalize(str(tmp_path / "m.idx"))
    with pytest.raises(FormatError, match="language='fin_Latn'"):
        read_token_file(tmp_path / "m")
    ours = read_token_file(tmp_path / "m", language="fin_Latn", eod=EOD)
    assert [document.tolist() for document in ours] == [[1, 2, 3, 4, EOD], [], [70_000, EOD]]
    assert ours.languages == ["fin_Latn"] and ours.origin == "monolingual" and ours.manifest == {}
    assert ours.language_ids(0).tolist() == [0, 0, 0, 0, NO_LANGUAGE]
    assert ours.language_ids_flat(3, 7).tolist() == [0, NO_LANGUAGE, 0, NO_LANGUAGE]
    assert verify_token_file(tmp_path / "m")["tokens"] == 7
    with pytest.raises(FormatError, match="outside the vocabulary of 1000"):
        verify_token_file(tmp_path / "m", FakeTokenizer())


def test_every_token_knows_its_language(three: Path) -> None:
    file = read_token_file(three)
    assert (len(file), file.languages, file.origin) == (3, LANGUAGES, "parallel")
    assert file.offsets.tolist() == [0, 6, 11, 18] and file.sequence_lengths.dtype == np.int32
    assert file[1].tolist() == [11, 9, 12, 13, EOD] and file[-1].tolist() == file[2].tolist()
    assert file.language_ids(0).tolist() == [0, 0, 0, -1, 1, -1]
    whole = np.concatenate([file.language_ids(index) for index in range(3)])
    for start in range(19):
        for stop in range(start, 19):
            assert np.array_equal(file.language_ids_flat(start, stop), whole[start:stop])
    with pytest.raises(IndexError):
        file[3]


def test_the_manifest_counts_tokens_by_language_and_names_its_tokenizer(three: Path) -> None:
    manifest = read_manifest(three)
    assert manifest["tokens"] == 18 and manifest["content_tokens"] == 12
    assert manifest["tokens_by_language"] == {"eng_Latn": 6, "fin_Latn": 6}
    assert manifest["counts"] == {"read": 3}
    check_same_tokenizer(manifest, FakeTokenizer())
    with pytest.raises(FormatError, match="was made with tokenizer abababababab"):
        check_same_tokenizer(manifest, FakeTokenizer(sha256="cd" * 32))
    with pytest.raises(FormatError, match="was made with tokenizer"):
        verify_token_file(three, FakeTokenizer(sha256="cd" * 32))


ids = st.lists(st.integers(1, 999), max_size=5)
documents = st.lists(st.tuples(st.lists(st.tuples(ids, st.integers(-1, 1)), max_size=4)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=documents)
def test_what_is_written_is_read_back(tmp_path: Path, drawn: list) -> None:
    parts = [[*document, ([EOD], NO_LANGUAGE)] for (document,) in drawn]
    write(tmp_path / "x", parts)
    file = read_token_file(tmp_path / "x")
    for index, document in enumerate(parts):
        assert file[index].tolist() == [token for piece, _ in document for token in piece]
        assert file.language_ids(index).tolist() == [language for piece, language in document for _ in piece]
    report = verify_token_file(tmp_path / "x", FakeTokenizer())
    assert report["documents"] == len(parts) and report["tokens"] == int(file.offsets[-1])
    json.dumps(report)


def test_documents_added_in_one_batch_make_the_same_bytes(tmp_path: Path, three: Path) -> None:
    file = read_token_file(three)
    with TokenFileWriter(tmp_path / "b", tokenizer=FakeTokenizer(), origin="parallel", languages=LANGUAGES) as writer:
        writer.add_documents(
            file.tokens, file.sequence_lengths, np.array([3, 4, 5, 6, 7, 8, 10, 11, 13, 14, 17, 18]),
            np.array([0, -1, 1, -1] * 3),
        )
        writer.finish()
    for kind in ("bin", "idx", "spans"):
        assert companion(tmp_path / "b", kind).read_bytes() == companion(three, kind).read_bytes()


@pytest.mark.parametrize("kind", ["bin", "idx", "spans", "manifest.json"])
def test_a_file_cut_anywhere_is_refused(three: Path, kind: str) -> None:
    path = companion(three, kind)
    whole = path.read_bytes()
    for size in range(len(whole) - 1):  # the manifest's last byte is a newline
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            read_token_file(three)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError):
        read_token_file(three)
    path.unlink()
    with pytest.raises(FormatError):
        read_token_file(three)


@pytest.mark.parametrize("kind", ["bin", "idx", "spans"])
def test_a_flipped_bit_anywhere_is_found_by_verify_and_never_crashes_a_reader(three: Path, kind: str) -> None:
    path = companion(three, kind)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            with pytest.raises(FormatError):
                verify_token_file(three)
            try:
                file = read_token_file(three)
                for index in range(len(file)):
                    assert file[index].size == file.language_ids(index).size
            except FormatError:
                pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_damaged_manifest_is_an_error_or_still_describes_the_file(three: Path, at: int, byte: int) -> None:
    path = companion(three, "manifest.json")
    whole = path.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    try:
        assert len(read_token_file(three)) == 3
        verify_token_file(three)
    except FormatError:
        pass
    finally:
        path.write_bytes(whole)


def test_a_megatron_index_with_a_flipped_bit_never_crashes_a_reader(three: Path) -> None:
    for kind in ("manifest.json", "spans"):
        companion(three, kind).unlink()
    path = companion(three, "idx")
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            try:
                assert sum(document.size for document in read_token_file(three, "und")) == 18
            except FormatError:
                refused += 1
    # Only the dtype code (int16 for uint16) and document boundaries can change without a contradiction.
    assert refused > 0.95 * 8 * len(whole)


def test_a_huge_count_in_a_small_index_is_refused_before_anything_is_allocated(three: Path) -> None:
    path = companion(three, "idx")
    whole = bytearray(path.read_bytes())
    whole[18:26] = (1 << 61).to_bytes(8, "little")
    path.write_bytes(bytes(whole))
    with pytest.raises(FormatError, match="truncated or damaged"):
        read_token_file(three)


def test_an_unfinished_or_abandoned_writer_leaves_what_was_there(tmp_path: Path, three: Path) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = TokenFileWriter(three, tokenizer=FakeTokenizer(), origin="parallel", languages=LANGUAGES)
    with pytest.raises(RuntimeError, match="stop"), writer:
        writer.add_document(pair([1], [2]))
        raise RuntimeError("stop")
    with TokenFileWriter(three, tokenizer=FakeTokenizer(), origin="parallel", languages=LANGUAGES) as writer:
        writer.add_document(pair([1], [2]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(CorpusError, match="no document"):
        write(three, [])
    write(three, [pair([1], [2])])
    assert len(read_token_file(three)) == 1


KILLED = """
import os, signal, sys
from types import SimpleNamespace
from megatron_xalign.formats import atomic
from megatron_xalign.formats.token_file import TokenFileWriter
moment = int(sys.argv[2])
moves = 0
real = os.replace
def replace(source, target):
    global moves
    if moves == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    moves += 1
    real(source, target)
atomic.os.replace = replace
tokenizer = SimpleNamespace(sha256="ab" * 32, vocab_size=1000, eod=0)
with TokenFileWriter(sys.argv[1], tokenizer=tokenizer, origin="monolingual", languages=["fin_Latn"]) as writer:
    writer.add_document([([1, 2], 0), ([0], -1)])
    writer.finish()
"""


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("what_was_there", ["nothing", "ours", "megatron's"])
def test_a_killed_writer_leaves_nothing_that_a_reader_takes_for_whole(
    tmp_path: Path, moment: int, what_was_there: str
) -> None:
    prefix = tmp_path / "x"
    if what_was_there != "nothing":
        write(prefix, [pair([5, 6], [7])])
    if what_was_there == "megatron's":
        for kind in ("manifest.json", "spans"):
            companion(prefix, kind).unlink()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(prefix), str(moment)], env=environment, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL
    for language in (None, "und"):
        with pytest.raises(FormatError):
            read_token_file(prefix, language)
    write(prefix, [pair([1], [2])])
    assert verify_token_file(prefix)["documents"] == 1


def test_verify_finds_a_document_without_end_and_an_id_outside_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "x", [pair([5], [6]), [([7, 8], 0)]])
    with pytest.raises(FormatError, match="document 1 does not end"):
        verify_token_file(tmp_path / "x")
    write(tmp_path / "x", [[([7], 0), ([EOD], 1)]])
    with pytest.raises(FormatError, match="gives an end-of-document token a language"):
        verify_token_file(tmp_path / "x")


def test_misuse_of_the_writer_is_a_value_error(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "x", tokenizer=FakeTokenizer(), origin="parallel", languages=LANGUAGES) as writer:
        for parts in ([], [([], 0)], [([1000], 0)], [([-1], 0)], [([1], 2)], [([1], -2)]):
            with pytest.raises(ValueError):
                writer.add_document(parts)
        three, one = np.array([1, 2, 3]), np.array([1])
        for lengths, ends, languages in (
            ([2], [2], [0]), ([3, 0], [3], [0]), ([1, 2], [3], [0]), ([3], [2, 2, 3], [0, 0, 0]), ([3], [4], [0]),
            ([3], [3], [0, 1]), ([3], [], []),
        ):
            with pytest.raises(ValueError):
                writer.add_documents(three, *(np.array(x, dtype=int) for x in (lengths, ends, languages)))
        writer.add_documents(one, one, one, one)
        assert writer.documents == 1


def test_another_language_than_the_manifests_is_refused(three: Path) -> None:
    with pytest.raises(FormatError, match="eng_Latn, fin_Latn by its manifest, not deu_Latn"):
        read_token_file(three, language="deu_Latn")


def test_a_pickled_token_file_opens_itself_again_and_carries_no_tokens(three: Path) -> None:
    file = read_token_file(three)
    pickled = pickle.dumps(file)
    assert len(pickled) < 400
    assert np.array_equal(pickle.loads(pickled).tokens, file.tokens)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(XAlignError, match=r"nothing\.bin does not exist"):
        read_token_file(tmp_path / "nothing", "fin_Latn")

"""One source as a stream of windows, against a plain loop over its documents."""

# T tokens, S sequence, K languages

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from megatron_xalign import _native
from megatron_xalign.data import windows
from megatron_xalign.data.windows import SourceWindows, order_key
from megatron_xalign.formats.token_file import TokenFile, TokenFileWriter, read_token_file

LANGUAGES = ["fin_Latn", "swe_Latn", "eng_Latn"]
SEQ_LENGTH = 32


@dataclass(frozen=True)
class Tokenizer:
    sha256: str = "a" * 64
    vocab_size: int = 1000
    eod: int = 0


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Documents of English, a template token, Finnish, end of document; some longer than a window."""
    random = np.random.default_rng(5)
    prefix = tmp_path_factory.mktemp("tokens") / "pairs"
    languages = ["eng_Latn", "fin_Latn"]
    with TokenFileWriter(prefix, tokenizer=Tokenizer(), origin="parallel", languages=languages) as writer:
        for _ in range(60):
            sides = [random.integers(2, 1000, random.integers(1, 50)) for _ in range(2)]
            writer.add_document([(sides[0], 0), ([1], -1), (sides[1], 1), ([0], -1)])
        writer.finish()
    return read_token_file(prefix)


def stream_of(file: TokenFile, name: str, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, languages (of LANGUAGES) and document of every token of one epoch, by concatenation."""
    documents = _native.permutation(order_key(seed, name, "documents", epoch), len(file)).tolist()
    codes = [*(LANGUAGES.index(code) for code in file.languages), -1]
    return (
        np.concatenate([file[document] for document in documents]),
        np.concatenate([[codes[language] for language in file.language_ids(document)] for document in documents]),
        np.concatenate([[document] * len(file[document]) for document in documents]),
    )


@pytest.fixture
def source(pairs: TokenFile) -> SourceWindows:
    return SourceWindows("pairs", pairs, LANGUAGES, seq_length=SEQ_LENGTH, seed=7)


def test_windows_are_pieces_of_the_shuffled_stream_sharing_borders(source: SourceWindows, pairs: TokenFile) -> None:
    for epoch in range(2):
        tokens_T, languages_T, _ = stream_of(pairs, "pairs", 7, epoch)
        assert source.per_epoch == (len(tokens_T) - 1) // SEQ_LENGTH
        order = _native.permutation(order_key(7, "pairs", "windows", epoch), source.per_epoch)
        for draw, window in enumerate(order.tolist()):
            tokens, languages = source.read(epoch * source.per_epoch + draw)
            piece = slice(window * SEQ_LENGTH, (window + 1) * SEQ_LENGTH + 1)
            np.testing.assert_array_equal(tokens, tokens_T[piece])
            np.testing.assert_array_equal(languages, languages_T[piece])


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_content_is_what_counting_each_window_gives(
    source: SourceWindows, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_CHUNK", chunk)
    num_windows = source.per_epoch + source.per_epoch // 2
    content = source.content(num_windows)
    assert (content.shape, content.dtype) == ((num_windows, 3), np.int32)
    for draw in range(num_windows):
        languages = source.read(draw)[1][:-1]
        assert content[draw].tolist() == [np.count_nonzero(languages == k) for k in range(3)]


def test_documents_begun_and_cut_are_those_a_loop_finds(source: SourceWindows, pairs: TokenFile) -> None:
    drawn = source.per_epoch + 20
    begun, cut = 0, set()
    for epoch in range(2):
        documents_T = stream_of(pairs, "pairs", 7, epoch)[2]
        first_T = np.concatenate([[True], documents_T[1:] != documents_T[:-1]])
        for window in source.epoch(epoch).order[: drawn - epoch * source.per_epoch].tolist():
            begin, end = window * SEQ_LENGTH, (window + 1) * SEQ_LENGTH
            begun += int(first_T[begin:end].sum())
            cut |= {(epoch, documents_T[border]) for border in (begin, end) if not first_T[border]}
    assert source.documents_read(drawn) == (begun, len(cut))
    assert source.documents_read(0) == (0, 0)


def test_epochs_read_everything_in_another_order(source: SourceWindows) -> None:
    first, second = source.epoch(0), source.epoch(1)
    assert sorted(first.documents.tolist()) == sorted(second.documents.tolist())
    assert first.documents.tolist() != second.documents.tolist()
    assert sorted(first.order.tolist()) == list(range(source.per_epoch))


def test_order_depends_on_seed_and_name(source: SourceWindows, pairs: TokenFile) -> None:
    orders = [
        SourceWindows(name, pairs, LANGUAGES, seq_length=SEQ_LENGTH, seed=seed).epoch(0).documents.tolist()
        for name, seed in (("pairs", 7), ("pairs", 8), ("other", 7))
    ]
    assert orders[0] == source.epoch(0).documents.tolist()
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_order_keys_never_change_and_parts_do_not_run_together() -> None:
    assert order_key(1234, "eng", "documents", 0) == 12227897946483733863
    assert order_key(1, "a", "b") != order_key(1, "ab") != order_key(1, "a,b")
    assert order_key(1, "1") != order_key(1, 1)

"""Streams, windows, packing and batches of the C++ library, against loops over lists."""

# S sequence, F languages of the file

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_streams import PlainStream, Token, best_fit, plain_sample

from megatron_xalign import _native
from megatron_xalign.data.blend_reader import FIELDS
from megatron_xalign.errors import FormatError

EOD = 7
RUN_LANGUAGE = {"spans": [4, 0, 2], "all": [3], "all_but_last": [3], "not_eod": [3]}
DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64")
LENGTHS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 60)), max_size=50)
MANY_LENGTHS = st.builds(
    lambda size, seed: np.random.default_rng(seed).integers(0, 9, size).tolist(),
    st.integers(257, 600),
    st.integers(0, 99),
)


def unaligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is no multiple of the item size, as arrays behind the header of an index are."""
    memory = np.zeros(array.nbytes + 1, dtype=np.uint8)
    view = memory[1:].view(array.dtype)
    view[:] = array
    assert array.itemsize == 1 or len(array) == 0 or not view.flags.aligned
    return view


@dataclass
class File:
    """A token file as arrays, and as lists."""

    documents: list[list[Token]]
    arrays: dict[str, Any]


def make_file(lengths: list[int], content: str, dtype: str, seed: int, by_lengths: bool = True) -> File:
    """Random tokens; with spans, random languages and template tokens, and ends that are end-of-document or not."""
    random = np.random.default_rng(seed)
    documents, ends, languages = [], [], []
    for number, length in enumerate(lengths):
        ids = random.integers(0, 100, length)
        spoken = np.zeros(length, dtype=int)
        if content == "spans":
            spoken = np.repeat(random.integers(-1, 3, length), random.integers(1, 6, length))[:length]
        if content == "all_but_last" and length:
            ids[-1], spoken[-1] = EOD, -1
        if content == "not_eod":
            spoken[ids == EOD] = -1
        is_last = np.arange(length) == length - 1
        is_eod = {"spans": is_last & (spoken < 0), "all": spoken > 0}.get(content, spoken < 0)
        run = [*RUN_LANGUAGE[content], -1]
        documents.append(
            [
                Token(int(token), run[language], number, bool(end))
                for token, language, end in zip(ids, spoken, is_eod, strict=True)
            ]
        )
        borders = [at for at in range(1, length) if spoken[at] != spoken[at - 1]] + [length] * (length > 0)
        ends += [sum(lengths[:number]) + border for border in borders]
        languages += [spoken[border - 1] for border in borders]
    flat = np.array([token.id for document in documents for token in document], dtype=dtype)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
    arrays = {
        "name": "tokens/fin",
        "tokens": unaligned(flat),
        "lengths": unaligned(np.array(lengths, dtype=np.int32)) if by_lengths else None,
        "pointers": unaligned(starts * flat.itemsize),
        "content": content,
        "eod": EOD,
        "vocab_size": 100,
        "span_ends": unaligned(np.array(ends, dtype=np.int64)) if content == "spans" else None,
        "span_languages": np.array(languages, dtype=np.int8) if content == "spans" else None,
        "run_language": np.array(RUN_LANGUAGE[content], dtype=np.int8),
    }
    return File(documents, arrays)


KEYS = [(11 * epoch + 1, 13 * epoch + 2) for epoch in range(4)]


def streams_of(
    file: File, seq_length: int, *, whole_documents: bool = False, split_key: int | None = None,
    part: tuple[int, int] | None = None, num_epochs: int = 3, num_threads: int = 2,
) -> tuple[_native.SourceStream, PlainStream]:  # fmt: skip
    """Ours, all epochs indexed, and the plain one."""
    ours = _native.SourceStream(
        **file.arrays, seq_length=seq_length, whole_documents=whole_documents, split_key=split_key,
        part=part or (0, len(file.documents)),
    )  # fmt: skip
    for epoch in range(num_epochs):
        ours.set_keys(epoch, *KEYS[epoch])
        if whole_documents:
            documents, window_starts, *_ = ours.build_packing(epoch)
            ours.use_packing(epoch, documents, window_starts)
        else:
            ours.use_starts(epoch, ours.build_starts(epoch, num_threads))
    plain = PlainStream(
        file.documents, seq_length=seq_length, keys=KEYS, split_key=split_key, part=part,
        whole_documents=whole_documents,
    )  # fmt: skip
    return ours, plain


@st.composite
def cases(draw: st.DrawFn) -> tuple[File, dict[str, Any]]:
    content = draw(st.sampled_from(["spans", "all", "all_but_last", "not_eod"]))
    lengths = draw(st.one_of(LENGTHS, MANY_LENGTHS))
    file = make_file(lengths, content, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)), draw(st.booleans()))
    begin = draw(st.integers(0, len(lengths)))
    part = draw(st.sampled_from([None, (begin, draw(st.integers(begin, len(lengths))))]))
    return file, {
        "seq_length": draw(st.integers(1, 40)),
        "whole_documents": draw(st.booleans()),
        "split_key": draw(st.sampled_from([None, 5])),
        "part": part,
    }


@settings(max_examples=150, deadline=None)
@given(case=cases(), drawn=st.floats(0, 1))
def test_windows_and_their_counts_are_those_of_a_loop(case: tuple[File, dict[str, Any]], drawn: float) -> None:
    file, cut = case
    ours, plain = streams_of(file, **cut)
    inputs = slice(0, cut["seq_length"])
    starts = np.cumsum([0, *(len(document) for document in file.documents)])
    flat = file.arrays["tokens"]
    draw = 0
    for epoch in range(3):
        windows = plain.windows(epoch)
        assert ours.num_windows(epoch) == len(windows)
        content_WF, tokens_W, eod_W = ours.count_epoch(epoch, 2)
        for row, window in enumerate(windows):
            read = [
                int(flat[starts[document] + at])
                for document, begin, count in ours.window(draw)
                for at in range(begin, begin + count)
            ]
            assert read == [token.id for token in window]
            languages = [token.language for token in window[inputs]]
            assert content_WF[row].tolist() == [languages.count(run) for run in file.arrays["run_language"]]
            if cut["whole_documents"]:
                assert tokens_W[row] == len(window)
            else:
                assert tokens_W.shape == (0,)
            labelled = window[:-1]
            assert eod_W[row] == sum(token.is_eod for token in labelled)
            draw += 1
    if draw == 0:
        with pytest.raises(IndexError, match="has no window"):
            ours.window(0)
        return
    with pytest.raises(LookupError, match="epoch 3 of tokens/fin is not indexed"):
        ours.window(draw)
    num_windows = int(drawn * draw)
    assert ours.documents_read(num_windows, 2) == plain.begun_and_cut(num_windows, 3)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_documents_and_totals_are_those_of_a_loop(case: tuple[File, dict[str, Any]]) -> None:
    file, cut = case
    ours, plain = streams_of(file, **cut)
    expected = [plain.documents[document] for epoch in range(3) for document in plain.order(epoch)]
    run = file.arrays["run_language"]
    content = [[[token.language for token in document].count(code) for code in run] for document in expected]
    size = len(plain.part)
    assert ours.num_documents == size
    begin = size // 2
    end = max(3 * size - 1, begin)
    content_NF, tokens_N, eod_N = ours.count_documents(begin, end, 2)
    assert content_NF.tolist() == content[begin:end]
    assert tokens_N.tolist() == [len(document) for document in expected[begin:end]]
    assert eod_N.tolist() == [sum(token.is_eod for token in document) for document in expected[begin:end]]
    for draw in range(begin, end):
        document = plain.order(draw // size)[draw % size]
        assert ours.document(draw) == (document, len(plain.documents[document]))
    tokens, content_F = ours.totals(2)
    assert tokens == sum(len(plain.documents[document]) for document in plain.part)
    assert content_F.tolist() == np.sum(content[:size], axis=0, initial=0).tolist() if size else content_F.sum() == 0


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 99), reset=st.booleans(), mask=st.booleans())
def test_batches_are_those_of_a_loop(
    case: tuple[File, dict[str, Any]], seed: int, reset: bool, mask: bool
) -> None:
    file, cut = case
    random = np.random.default_rng(seed)
    other = make_file(random.integers(1, 30, 40).tolist(), "spans", "uint16", seed)
    options = {"reset_position_ids": reset, "eod_mask_loss": mask, "padding_token": 99}
    both = [streams_of(file, **cut), streams_of(other, **(cut | {"part": None}))]
    windows = [plain.draws(3) for _, plain in both]
    sources = random.integers(0, 2, 30).astype(np.int32) if all(windows) else np.full(30, bool(windows[1]), np.int32)
    if not windows[sources[0]]:
        return
    draws = np.array([random.integers(len(windows[source])) for source in sources], dtype=np.int64)
    index = _native.ListedSamples(sources, draws)
    reader = _native.BatchReader(
        index=index, streams=[ours for ours, _ in both], seq_length=cut["seq_length"], **options
    )
    samples = random.integers(0, 30, 11)
    arrays = {name: np.full((11, cut["seq_length"]), 55, dtype=dtype) for name, dtype in FIELDS.items()}
    assert reader.read(samples, arrays) == []
    for row, sample in enumerate(samples):
        window = windows[sources[sample]][draws[sample]]
        expected = plain_sample(window, sources[sample], seq_length=cut["seq_length"], **options)
        for name in FIELDS:
            np.testing.assert_array_equal(arrays[name][row], expected[name], err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seq_length", [1, 7, 64, 301])
@pytest.mark.parametrize("split", [False, True])
def test_windows_are_those_of_megatrons_sample_index(seq_length: int, split: bool) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    random = np.random.default_rng(seq_length)
    lengths = random.integers(1, 50 if seq_length > 1 else 3, 700).astype(np.int32)
    file = make_file(lengths.tolist(), "all", "int32", 0)
    cut = {"split_key": 3, "part": (100, 600)} if split else {}
    ours, plain = streams_of(file, seq_length, **cut)
    documents = np.array(plain.order(1), dtype=np.int32)
    tokens = int(lengths[documents].sum())
    borders = helpers.build_sample_idx_int64(lengths, documents, seq_length, 1, tokens, True, 1)
    assert ours.num_windows(1) == len(borders) - 1
    order = _native.Permutation(KEYS[1][1], ours.num_windows(1)).fill(0, ours.num_windows(1))
    for row, window in enumerate(order.tolist()):
        (first, begin), (last, end) = borders[window : window + 2].tolist()
        pieces = ours.window(ours.num_windows(0) + row)
        assert pieces[:, 0].tolist() == documents[first : last + 1].tolist()
        assert (pieces[0, 1], pieces[-1, 1] + pieces[-1, 2]) == (begin, end + 1)


def plain_file_stream(lengths: np.ndarray, *, seq_length: int, whole_documents: bool = False) -> _native.SourceStream:
    """Documents of nothing but zeros, the last of each the end-of-document token."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    stream = _native.SourceStream(
        name="many", tokens=np.zeros(starts[-1], dtype=np.uint16), lengths=lengths, pointers=2 * starts[:-1],
        content="all_but_last", eod=0, vocab_size=0, span_ends=None, span_languages=None,
        run_language=np.zeros(1, np.int8), seq_length=seq_length, whole_documents=whole_documents, split_key=None,
        part=(0, len(lengths)),
    )  # fmt: skip
    stream.set_keys(0, 1, 2)
    return stream


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_any_number_of_threads_builds_and_counts_the_same(num_threads: int) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 5, 200_000).astype(np.int32)
    stream = plain_file_stream(lengths, seq_length=16)
    order = _native.Permutation(1, len(lengths)).fill(0, len(lengths))
    in_order = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
    built = stream.build_starts(0, num_threads)
    np.testing.assert_array_equal(built, np.append(in_order[:-1:32], in_order[-1]))
    stream.use_starts(0, built)
    num_windows = (in_order[-1] - 1) // 16
    ends = in_order[1:][lengths[order] > 0] - 1
    ends_W = np.bincount(ends[ends < num_windows * 16] // 16, minlength=num_windows)
    draws = _native.Permutation(2, num_windows).fill(0, num_windows)
    content_WF, tokens_W, eod_W = stream.count_epoch(0, num_threads)
    assert content_WF.dtype == np.uint16
    np.testing.assert_array_equal(eod_W, ends_W[draws])
    np.testing.assert_array_equal(content_WF[:, 0], 16 - ends_W[draws])
    assert tokens_W.shape == (0,)
    # Half of the windows, against flags over windows and documents.
    drawn = np.zeros(num_windows + 1, dtype=bool)
    drawn[draws[: num_windows // 2]] = True
    real = lengths[order] > 0
    first_D, last_D = in_order[:-1][real] // 16, (in_order[1:][real] - 1) // 16
    inside = np.minimum(last_D, num_windows)
    before = np.concatenate([[0], np.cumsum(drawn)])
    touched = before[inside + 1] - before[np.minimum(first_D, num_windows)] > 0
    begun = int(drawn[np.minimum(first_D, num_windows)].sum())
    assert stream.documents_read(num_windows // 2, num_threads) == (begun, int((touched & (last_D > first_D)).sum()))
    assert stream.totals(num_threads)[0] == in_order[-1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), room=st.integers(1, 80), size=st.integers(0, 900))
def test_packing_is_bounded_best_fit(seed: int, room: int, size: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 60, size).tolist()
    file = make_file(lengths, "all", "uint8", seed)
    stream, plain = streams_of(file, room, whole_documents=True)
    documents, window_starts, left_out_documents, left_out_tokens = stream.build_packing(2)
    windows, left_out = best_fit([(document, lengths[document]) for document in plain.order(2)], room)
    assert [documents[a:b].tolist() for a, b in itertools.pairwise(window_starts)] == windows
    assert (left_out_documents, left_out_tokens) == (len(left_out), sum(lengths[document] for document in left_out))


def test_whole_short_documents_leave_less_than_a_hundredth_of_the_windows_empty() -> None:
    lengths = np.random.default_rng(1).lognormal(np.log(60), 0.5, 20_000).astype(np.int32).clip(4, 500)
    stream = plain_file_stream(lengths, seq_length=2048, whole_documents=True)
    documents, window_starts, *_ = stream.build_packing(0)
    stream.use_packing(0, documents, window_starts)
    held = int(stream.count_epoch(0, 1)[1].sum(dtype=np.int64))
    assert held == lengths.sum()
    assert held / (stream.num_windows(0) * 2048) > 0.99


def test_what_is_missing_is_asked_for_and_nothing_is_written() -> None:
    file = make_file([5] * 40, "all", "int32", 0)
    streams = [streams_of(file, 16, num_epochs=number)[0] for number in (0, 1)]
    per_epoch = streams[1].num_windows(0)
    index = _native.ListedSamples(np.array([0, 1, 1], np.int32), np.array([3, 3, per_epoch]))
    reader = _native.BatchReader(
        index=index, streams=streams, seq_length=16, padding_token=0, reset_position_ids=False, eod_mask_loss=False
    )
    arrays = {name: np.full((3, 16), 55, dtype=dtype) for name, dtype in FIELDS.items()}
    assert sorted(reader.read(np.arange(3), arrays)) == [(0, 0), (1, 1)]
    assert all((array == 55).all() for array in arrays.values())
    only_first = {name: array[:1] for name, array in arrays.items()}
    assert reader.read(np.array([1]), only_first) == []
    assert len(index) == 3


def damage(file: File, name: str, at: int, value: int) -> None:
    file.arrays[name] = np.array(file.arrays[name])
    file.arrays[name][at] = value


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("lengths", 20, -4, r"tokens/fin: document 20 has a length of -4"),
        ("lengths", 20, 900, r"tokens/fin: its documents have 1290 tokens together and the file 400"),
        ("pointers", 20, -2, r"tokens/fin: document 20 has 10 tokens from byte -2 on"),
        ("pointers", 20, 2**62, r"tokens/fin: document 20 has 10 tokens from byte 4611686018427387904 on"),
        ("pointers", 20, 401, r"tokens/fin: document 20 .* byte 401 "),
        ("pointers", 20, 790, r"tokens/fin: document 20 .* byte 790 .* of 800 bytes"),
        ("tokens", 205, 101, r"tokens/fin: document 20 has a token id outside its vocabulary of 100"),
        ("span_ends", 41, 500, r"tokens/fin: the spans of document \d+"),
        ("span_ends", 41, -1, r"tokens/fin: the spans of document \d+"),
        ("span_languages", 41, 3, r"tokens/fin: the spans of document 20"),
        ("span_languages", 41, -2, r"tokens/fin: the spans of document 20"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_document(name: str, at: int, value: int, words: str) -> None:
    file = make_file([10] * 40, "all", "uint16", 0)
    # Two spans a document.
    file.arrays |= {
        "content": "spans", "run_language": np.arange(3, dtype=np.int8),
        "span_ends": np.arange(5, 401, 5), "span_languages": np.tile(np.array([0, 1], np.int8), 40),
    }  # fmt: skip
    damage(file, name, at, value)

    def read_all() -> None:
        stream, _ = streams_of(file, 7, num_epochs=1)
        index = _native.ListedSamples(np.zeros(57, np.int32), np.arange(57))
        reader = _native.BatchReader(
            index=index, streams=[stream], seq_length=7, padding_token=0, reset_position_ids=True, eod_mask_loss=True
        )
        reader.read(np.arange(57), {key: np.zeros((57, 7), dtype=dtype) for key, dtype in FIELDS.items()})

    with pytest.raises(FormatError, match=words):
        read_all()


def test_pointers_out_of_order_are_met_where_documents_have_no_lengths() -> None:
    file = make_file([10] * 40, "all", "uint16", 0, by_lengths=False)
    damage(file, "pointers", 20, 5)
    with pytest.raises(FormatError, match=r"document (19|20) lies in bytes"):
        streams_of(file, 16)


def test_an_index_of_another_file_is_refused_or_met() -> None:
    file = make_file([10] * 100, "all", "uint16", 0)
    stream, _ = streams_of(file, 16, num_epochs=1)
    stream.set_keys(1, 5, 6)
    with pytest.raises(ValueError, match="2 numbers; 5 are expected"):
        stream.use_starts(1, np.array([0, 1000]))
    with pytest.raises(ValueError, match="another number of tokens"):
        stream.use_starts(1, np.array([0, 320, 640, 960, 999]))
    with pytest.raises(ValueError, match="do not go from 0"):
        stream.use_starts(1, np.array([1, 320, 640, 960, 1000]))
    stream.use_starts(1, np.array([0, 100, 200, 300, 1000]))
    with pytest.raises(FormatError, match="does not fit the file"):
        for draw in range(stream.num_windows(0), 2 * stream.num_windows(0)):
            stream.window(draw)
        stream.count_epoch(1, 1)


def test_a_packing_of_another_file_is_refused_or_met() -> None:
    file = make_file([10] * 100, "all", "uint16", 0)
    stream, _ = streams_of(file, 25, whole_documents=True, num_epochs=1)
    stream.set_keys(1, 5, 6)
    with pytest.raises(ValueError, match="do not go from 0"):
        stream.use_packing(1, np.arange(4), np.array([0, 2, 5]))
    stream.use_packing(1, np.array([0, 100, 1, 2, 3, -1]), np.array([0, 2, 5, 5, 4, 6]))
    first = stream.num_windows(0)
    errors = 0
    for draw in range(first, first + 5):
        try:
            assert len(stream.window(draw)) in (0, 1)
        except FormatError:
            errors += 1
    assert errors >= 3


def arguments(**changed: Any) -> dict[str, Any]:
    file = make_file([3, 4], "all", "uint16", 0)
    cut = {"seq_length": 2, "whole_documents": False, "split_key": None, "part": (0, 2)}
    return file.arrays | cut | changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seq_length": 0}, r"seq_length=0 is outside 1\.\.2147483647"),
        ({"seq_length": 2**31}, "seq_length=2147483648"),
        ({"part": (1, 3)}, r"documents 1\.\.3 are not all in tokens/fin, which has 2"),
        ({"part": (-1, 1)}, r"documents -1\.\.1"),
        ({"part": (2, 1)}, r"documents 2\.\.1"),
        ({"tokens": np.zeros(7)}, "dtype float64"),
        ({"tokens": np.zeros((7, 1), np.uint16)}, "one contiguous row"),
        ({"lengths": np.zeros(3, np.int32)}, "lengths has 3 items; 2 are expected"),
        ({"pointers": np.zeros(2, np.int32)}, "pointers has dtype int32"),
        ({"content": "some"}, "content='some'"),
        ({"content": "spans", "span_ends": np.zeros(2, np.int64), "span_languages": np.zeros(3, np.int8)}, "3 items"),
        ({"run_language": np.zeros(2, np.int8)}, "there is one language"),
        ({"run_language": np.zeros(0, np.int8)}, "1 to 127 languages"),
        ({"run_language": np.array([-1], np.int8)}, "negative"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_wrong_arguments_are_value_errors_that_name_them(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _native.SourceStream(**arguments(**changed))


def test_epochs_are_told_their_keys_once() -> None:
    stream = _native.SourceStream(**arguments())
    with pytest.raises(LookupError, match="epoch 0 of tokens/fin"):
        stream.build_starts(0, 1)
    with pytest.raises(ValueError, match="epoch=-1"):
        stream.set_keys(-1, 1, 2)
    with pytest.raises(ValueError, match="epoch=1048576"):
        stream.set_keys(1 << 20, 1, 2)
    stream.set_keys(0, 1, 2)
    stream.set_keys(0, 1, 2)
    with pytest.raises(ValueError, match="epoch 0 has other keys"):
        stream.set_keys(0, 1, 3)
    assert (stream.has_keys(0), stream.has_windows(0), stream.has_keys(1)) == (True, False, False)
    with pytest.raises(ValueError, match="have no packing"):
        stream.use_packing(0, np.zeros(0, np.int64), np.zeros(1, np.int64))


def test_buffers_that_do_not_fit_are_refused() -> None:
    stream, _ = streams_of(make_file([9] * 9, "all", "uint16", 0), 4, num_epochs=1)
    index = _native.ListedSamples(np.zeros(2, np.int32), np.arange(2))
    reader = _native.BatchReader(
        index=index, streams=[stream], seq_length=4, padding_token=0, reset_position_ids=False, eod_mask_loss=False
    )
    good = {name: np.zeros((2, 4), dtype=dtype) for name, dtype in FIELDS.items()}
    assert reader.read(np.arange(2), good) == []
    fixed = np.zeros((2, 4), np.int64)
    fixed.flags.writeable = False
    for changed, words in (
        ({"tokens": np.zeros((2, 4), np.int32)}, "tokens has dtype int32"),
        ({"labels": np.zeros((2, 5), np.int64)}, r"labels is \[2, 5\]; \[2, 4\]"),
        ({"labels": np.zeros((3, 4), np.int64)}, r"labels is \[3, 4\]"),
        ({"tokens": np.zeros((4, 2), np.int64).T}, "not contiguous"),
        ({"tokens": fixed}, "cannot be written"),
    ):
        with pytest.raises(ValueError, match=words):
            reader.read(np.arange(2), good | changed)
    del good["source_ids"]
    with pytest.raises(ValueError, match="no array source_ids"):
        reader.read(np.arange(2), good)
    for wrong in (2, -1):
        with pytest.raises(IndexError, match=f"sample {wrong} of 2"):
            reader.read(np.array([wrong]), {name: np.zeros((1, 4), dtype=dtype) for name, dtype in FIELDS.items()})
    with pytest.raises(ValueError, match="negative source or draw"):
        _native.ListedSamples(np.array([-1], np.int32), np.zeros(1, np.int64))

"""Opening at once, reading what was not checked, and files made to harm a reader."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file import (
    TokenFile,
    check_token_file,
    companion,
    merge_token_files,
    read_manifest,
    read_token_file,
    token_file_statistics,
    verify_token_file,
)

KINDS = ("bin", "idx", "spans", "manifest.json")


# --- opened by sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentences", [False, True])
def test_a_file_opened_by_its_sizes_reads_as_one_whose_index_is_checked(
    tmp_path: Path, token_files, sentences: bool
) -> None:
    documents = token_files.documents(2, 80)
    token_files.write(tmp_path / "x", documents, sentences=sentences)
    checked, opened = (read_token_file(tmp_path / "x", check=check) for check in ("index", "sizes"))
    assert len(opened) == 80 and opened.languages == checked.languages and opened.origin == "parallel"
    for index in (*range(80), -1, -80):
        assert opened[index].tolist() == checked[index].tolist() == token_files.ids(documents[index])
        assert np.array_equal(opened.language_ids(index), checked.language_ids(index))
    for begin in range(81):
        for end in (begin, min(begin + 7, 80), 80):
            assert np.array_equal(opened.document_offsets(begin, end), checked.offsets[begin : end + 1])
    assert "offsets" not in vars(opened)
    assert (opened.num_tokens, opened.num_sequences, opened.num_spans, opened.eod, opened.dtype) == (
        len(checked.tokens), read_manifest(tmp_path / "x")["sequences"], sum(map(len, documents)), 0, np.uint16,
    )
    assert np.array_equal(opened.pointers_D, checked.offsets[:-1] * 2)
    if sentences:
        assert opened.lengths_D is None and not opened.one_sequence_per_document
    else:
        assert opened.lengths_D is not None and opened.lengths_D.dtype == np.int32
        assert np.array_equal(opened.lengths_D, checked.sequence_lengths)
        assert np.shares_memory(opened.lengths_D, opened.sequence_lengths_Q)
    assert opened.span_ends is not None and opened.span_ends.flags.aligned
    assert opened.span_ends[-1] == opened.num_tokens and opened.span_languages is not None
    for array in (opened.tokens, opened.sequence_pointers_Q, opened.span_ends, opened.span_languages):
        assert not array.flags.writeable
    assert np.array_equal(opened.offsets, checked.offsets)
    for bad in ((-1, 2), (3, 2), (0, 81)):
        with pytest.raises(ValueError, match="are outside"):
            opened.document_offsets(*bad)
    with pytest.raises(ValueError, match="neither 'index' nor 'sizes'"):
        read_token_file(tmp_path / "x", check="all")


def test_megatrons_own_files_open_by_their_sizes(tmp_path: Path, megatron_builder) -> None:
    # As many documents as sequences, and still not one each.
    megatron_builder(tmp_path / "m", [[[1, 2], [3, 0]], [], [[4, 0]]])
    megatron_builder(tmp_path / "n", [[[1, 2, 0]], [[3, 0]]])
    file = read_token_file(tmp_path / "m", "und", eod=0, check="sizes")
    assert [document.tolist() for document in file] == [[1, 2, 3, 0], [], [4, 0]]
    assert file.lengths_D is None and file.pointers_D.tolist() == [0, 8, 8]
    assert file.span_ends is None and file.span_languages is None and not file.content_is_regular
    assert file.language_ids_flat(0, 6).tolist() == [0, 0, 0, -1, 0, -1]
    file = read_token_file(tmp_path / "n", "und", check="sizes")
    assert file.lengths_D is not None and file.lengths_D.tolist() == [3, 2]
    assert file.sequence_lengths_Q.tolist() == [3, 2] and file.document_indices_M.tolist() == [0, 1, 2]


def test_a_pickled_file_opens_as_it_was_opened(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "x", token_files.documents(1, 5))
    file = pickle.loads(pickle.dumps(read_token_file(tmp_path / "x", check="sizes")))
    assert "offsets" not in vars(file) and file[4].size


def huge(prefix: Path, documents: int) -> None:
    """Two hundred million documents of one token each, as files that take no room on the disk."""
    manifest = read_manifest(prefix)
    with companion(prefix, "bin").open("wb") as file:
        file.truncate(2 * documents)
    with companion(prefix, "idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        file.truncate(34 + 20 * documents + 8)
        file.seek(34 + 4 * documents - 4)
        file.write(struct.pack("<i", 1))
        file.seek(34 + 12 * documents - 8)
        file.write(struct.pack("<q", 2 * documents - 2))
        file.seek(34 + 20 * documents)
        file.write(struct.pack("<q", documents))
    header = companion(prefix, "spans").read_bytes()
    at = struct.unpack_from("<I", header, 12)[0]
    with companion(prefix, "spans").open("wb") as file:
        file.write(struct.pack("<8sIIQQQ", b"XASPANS\0", 1, at, documents, documents, documents) + header[40:at])
        file.truncate(at + 9 * documents)
        file.seek(at + 8 * documents - 8)
        file.write(struct.pack("<q", documents))
    for kind, stated in manifest["files"].items():
        stated["bytes"] = companion(prefix, kind).stat().st_size
    manifest |= dict.fromkeys(("documents", "sequences", "tokens", "spans"), documents)
    manifest |= {"content_tokens": 0, "tokens_by_language": {"fin_Latn": 0}}
    companion(prefix, "manifest.json").write_text(json.dumps(manifest))


def test_opening_by_sizes_takes_the_same_time_and_memory_for_any_size(tmp_path: Path, token_files) -> None:
    document = [([5], 0)]
    token_files.write(tmp_path / "x", [document], languages=["fin_Latn"], origin="monolingual")
    huge(tmp_path / "x", 200_000_000)
    tracemalloc.start()
    begin = time.process_time()
    file = read_token_file(tmp_path / "x", check="sizes")
    assert len(file) == file.num_spans == 200_000_000
    assert file.lengths_D is not None and len(file.lengths_D) == len(file.pointers_D) == 200_000_000
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Reading 5.8 GB takes seconds on any machine, their offsets 1.6 GB.
    assert seconds < 1.0 and peak < 1_000_000, (seconds, peak)
    # All of it is zeros but the ends.
    assert file[7].size == 0 and file[-1].size == 1


def test_damage_that_was_not_looked_for_is_met_where_it_is_read(tmp_path: Path, token_files) -> None:
    document = [([5, 6], 0), ([7], 1), ([0], -1)]

    def damaged(kind: str, at: int, number: int, width: str) -> TokenFile:
        token_files.write(tmp_path / "x", [document] * 5)
        data = bytearray(companion(tmp_path / "x", kind).read_bytes())
        struct.pack_into(width, data, at, number)
        companion(tmp_path / "x", kind).write_bytes(data)
        with pytest.raises(FormatError):
            read_token_file(tmp_path / "x")
        return read_token_file(tmp_path / "x", check="sizes")

    pointers = 34 + 4 * 5
    for number in (-8, 3, 1 << 40, 1 << 62):
        file = damaged("idx", pointers + 8 * 2, number, "<q")
        assert file[0].tolist() == [5, 6, 7, 0]
        with pytest.raises(FormatError, match="pointers do not rise"):
            file[2]
        with pytest.raises(FormatError):
            file.offsets  # noqa: B018 (checks the index)
    spans = struct.unpack_from("<I", companion(tmp_path / "x", "spans").read_bytes(), 12)[0]
    for number in (2, -2, 127, -128):
        file = damaged("spans", spans + 8 * 15 + 7, number, "b")
        with pytest.raises(FormatError, match="is damaged near token"):
            file.language_ids(2)
        for index in (0, 1, 3, 4):
            assert file.language_ids(index).tolist() == [0, 0, 1, -1]
    for number in (-5, 9, 1 << 50, -(1 << 63), (1 << 63) - 1):
        file = damaged("spans", spans + 8 * 7, number, "<q")
        assert file[2].tolist() == [5, 6, 7, 0]
        for index in range(5):
            with suppress(FormatError):
                # Which languages it says may be wrong, not how many.
                assert file.language_ids(index).size == 4


def test_a_document_of_more_tokens_than_int32_counts_is_refused(tmp_path: Path) -> None:
    """Two sequences of 2**30 one-byte tokens, in one document and in two."""
    half = 1 << 30
    with companion(tmp_path / "x", "bin").open("wb") as file:
        file.truncate(2 * half)
    for documents, good in (([0, 2], False), ([0, 1, 2], True)):
        companion(tmp_path / "x", "idx").write_bytes(
            struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, 2, len(documents))
            + struct.pack("<iiqq", half, half, 0, half) + struct.pack(f"<{len(documents)}q", *documents)
        )
        for check in ("index", "sizes"):
            if good:
                assert len(read_token_file(tmp_path / "x", "und", check=check)[1]) == half
            else:
                with pytest.raises(FormatError, match="a document of more than 2,147,483,647 tokens"):
                    read_token_file(tmp_path / "x", "und", check=check)[0]


def test_many_open_files_hold_neither_maps_nor_descriptors(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "x", token_files.documents(1, 3))
    before = len(list(Path("/proc/self/fd").iterdir()))
    files = [read_token_file(tmp_path / "x", check="sizes") for _ in range(1000)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before and len(files) == 1000


def test_what_the_manifest_says_and_spans_do_not_hold_is_found_when_opened(tmp_path: Path, token_files) -> None:
    documents = [[([5, 6], 0), ([0], -1)], [([7], 0), ([0, 0], -1)], [([0], -1)], [([7], 0), ([0], -1), ([5], 0)]]
    manifest = token_files.write(tmp_path / "x", documents, languages=["fin_Latn"], origin="monolingual")
    assert (manifest["spans"], manifest["content_tokens"]) == (8, 5) and manifest["tokens"] == 10
    manifest = {**manifest, "content_is_regular": True, "content_tokens": 6, "tokens_by_language": {"fin_Latn": 6}}
    companion(tmp_path / "x", "manifest.json").write_text(json.dumps(manifest))
    assert read_token_file(tmp_path / "x", check="sizes").content_is_regular
    with pytest.raises(FormatError, match="says every document is text and one token of no language"):
        read_token_file(tmp_path / "x")
    problems = [problem.message for problem in check_token_file(tmp_path / "x").problems]
    assert any("content_is_regular False; its manifest says True" in message for message in problems)


def test_manifests_of_earlier_versions_without_the_newer_counts_are_read(tmp_path: Path, token_files) -> None:
    manifest = token_files.write(tmp_path / "x", token_files.documents(3, 9))
    newer = (
        "sequences", "spans", "documents_by_language", "shortest_document_tokens", "longest_document_tokens",
        "content_is_regular",
    )
    for name in newer:
        manifest.pop(name)
    companion(tmp_path / "x", "manifest.json").write_text(json.dumps(manifest))
    assert verify_token_file(tmp_path / "x")["documents"] == 9
    assert not read_token_file(tmp_path / "x", check="sizes").content_is_regular


# --- files made to harm -----------------------------------------------------------------------------------------------


def use(prefix: Path) -> None:
    """Everything that reads a token file; each must say FormatError, or read."""
    for check in ("index", "sizes"):
        try:
            file = read_token_file(prefix, check=check)
            for index in range(min(len(file), 50)):
                assert file[index].size == file.language_ids(index).size
            file.document_offsets(0, min(len(file), 1000))
            assert len(file.sequence_lengths) == len(file)
        except FormatError:
            pass
    report = check_token_file(prefix, progress=False)
    json.dumps(report.to_tree()).encode("utf-8")
    with suppress(FormatError):
        json.dumps(token_file_statistics(prefix, progress=False))
    out = prefix.with_name("out")
    try:
        merge_token_files([prefix], out, progress=False)
    except FormatError:
        assert not list(prefix.parent.glob("*out*"))
    else:
        # What passes all checksums of its own manifest may be wrong in other ways, but not unreadable.
        read_token_file(out)
        for kind in KINDS:
            companion(out, kind).unlink()


numbers = st.sampled_from(
    [0, 1, 2, 7, 255, 256, (1 << 15) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 62) // 12, 1 << 60,
     (1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8]
)
change = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 4000), st.integers(0, 7)),
    st.tuples(st.just("number"), st.integers(0, 500), numbers, st.sampled_from("QIH"), st.booleans()),
    st.tuples(st.just("cut"), st.integers(0, 4000)),
    st.tuples(st.just("grow"), st.integers(1, 64)),
    st.tuples(st.just("swap"), st.integers(0, 500), st.integers(0, 500)),
)
json_value = st.one_of(
    st.none(), st.booleans(), numbers, st.integers(-5, 5), st.floats(), st.text(max_size=3), st.just([]), st.just({}),
    st.just([["x"]]), st.just("\ud800"), st.just(10**400), st.just(["eng_Latn"]), st.just({"eng_Latn": -1}),
)
change_of_manifest = st.tuples(st.integers(0, 60), st.one_of(json_value, st.just("remove")))


def changed(data: bytes, what: tuple) -> bytes:
    data = bytearray(data)
    kind, *rest = what
    if kind == "flip":
        at, bit = rest
        data[at % len(data)] ^= 1 << bit
    elif kind == "number":
        at, number, width, in_step = rest
        size = struct.calcsize(width)
        # Fields of headers lie at 9, 17, 18, 26 and 34; elsewhere any place will do.
        at = (at * (8 if in_step else 1) + (2 if in_step else 0)) % max(len(data) - size, 1)
        data[at : at + size] = (number % (1 << (8 * size))).to_bytes(size, "little")
    elif kind == "cut":
        del data[rest[0] % len(data) :]
    elif kind == "grow":
        data += bytes(rest[0])
    else:
        a, b = (8 * (at % max(len(data) // 8 - 1, 1)) + 2 for at in rest)
        data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]
    return bytes(data)


def places(tree: object) -> list[tuple[object, object]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[object, object]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(tree, key), *places(value)]
    return found


@pytest.fixture(scope="module")
def originals(tmp_path_factory, token_files) -> list[dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("originals")
    made = []
    for sentences in (False, True):
        prefix = folder / f"s{sentences}"
        shards = [{"name": "a", "documents": 6, "tokens": 4, "sha256": "0" * 64}]
        token_files.write(prefix, token_files.documents(4, 6), sentences=sentences, shards=shards)
        made.append({kind: companion(prefix, kind).read_bytes() for kind in KINDS})
    return made


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sentences=st.booleans(), kind=st.sampled_from(KINDS[:3]), changes=st.lists(change, min_size=1, max_size=3),
    consistent=st.booleans(),
)
def test_no_damage_to_index_spans_or_tokens_does_more_than_raise(
    tmp_path: Path, originals, sentences: bool, kind: str, changes: list, consistent: bool
) -> None:
    """``consistent``: the manifest has the checksums of the damaged file, so that only its content can give it away."""
    for name, data in originals[sentences].items():
        companion(tmp_path / "x", name).write_bytes(data)
    data = originals[sentences][kind]
    for what in changes:
        if data:
            data = changed(data, what)
    companion(tmp_path / "x", kind).write_bytes(data)
    if consistent:
        manifest = json.loads(originals[sentences]["manifest.json"])
        manifest["files"][kind] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        companion(tmp_path / "x", "manifest.json").write_text(json.dumps(manifest))
    use(tmp_path / "x")
    if data != originals[sentences][kind] and not consistent:
        with pytest.raises(FormatError):
            verify_token_file(tmp_path / "x", progress=False)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(sentences=st.booleans(), changes=st.lists(change_of_manifest, min_size=1, max_size=3))
def test_no_manifest_does_more_than_raise(tmp_path: Path, originals, sentences: bool, changes: list) -> None:
    for name, data in originals[sentences].items():
        companion(tmp_path / "x", name).write_bytes(data)
    manifest = json.loads(originals[sentences]["manifest.json"])
    for at, value in changes:
        found = places(manifest)
        if not found:
            break
        container, key = found[at % len(found)]
        if value == "remove":
            del container[key]
        else:
            container[key] = copy.deepcopy(value)
    companion(tmp_path / "x", "manifest.json").write_text(json.dumps(manifest))
    use(tmp_path / "x")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(change, min_size=1, max_size=4), sentences=st.booleans())
def test_no_index_of_megatrons_kind_does_more_than_raise(
    tmp_path: Path, originals, token_files, changes: list, sentences: bool
) -> None:
    for kind in ("bin", "idx"):
        data = originals[sentences][kind]
        for what in changes if kind == "idx" else ():
            data = changed(data, what) if data else data
        companion(tmp_path / "m", kind).write_bytes(data)
    tokenizer = token_files.Tokenizer()
    for check in ("index", "sizes"):
        try:
            file = read_token_file(tmp_path / "m", "und", eod=0, check=check)
            for index in range(min(len(file), 50)):
                assert file[index].size == file.language_ids(index).size
            assert file.lengths_D is None or len(file.lengths_D) == len(file)
            assert len(file.pointers_D) == len(file)
        except FormatError:
            pass
    json.dumps(check_token_file(tmp_path / "m", tokenizer, progress=False).to_tree())
    for job in (
        lambda: token_file_statistics(tmp_path / "m", tokenizer=tokenizer, progress=False),
        lambda: merge_token_files(
            [tmp_path / "m"], tmp_path / "out", language="und", tokenizer=tokenizer, replace=True, progress=False
        ),
    ):
        with suppress(FormatError):
            job()


LIMITED = """
import resource, signal, struct, sys
from pathlib import Path
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file import *
import numpy
prefix = Path(sys.argv[1])
# Whatever a file of a few hundred bytes says, there is no memory for it, and no time.
resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
signal.alarm(100)
whole = {kind: companion(prefix, kind).read_bytes() for kind in ("idx", "spans")}
refused = 0
headers = {"idx": ((9, 8), (17, 1), (18, 8), (26, 8)), "spans": ((8, 4), (12, 4), (16, 8), (24, 8), (32, 8))}
for kind, fields in headers.items():
    for at, size in fields:
        for shift in range(8 * size):
            for more in (-1, 0, 1):
                number = ((1 << shift) + more) % (1 << (8 * size))
                data = bytearray(whole[kind])
                if data[at : at + size] == number.to_bytes(size, "little"):
                    continue
                data[at : at + size] = number.to_bytes(size, "little")
                companion(prefix, kind).write_bytes(data)
                for check in ("index", "sizes"):
                    try:
                        read_token_file(prefix, check=check)
                    except FormatError:
                        refused += 1
                assert check_token_file(prefix, progress=False).problems
    companion(prefix, kind).write_bytes(whole[kind])
read_token_file(prefix)
print("refused", refused)
"""


def test_no_count_of_a_header_is_believed_before_it_is_checked(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "x", token_files.documents(4, 6))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "x")], env=environment, timeout=120, check=False,
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 1500


def test_pipes_folders_and_devices_are_not_opened(tmp_path: Path, token_files) -> None:
    for kind in KINDS:
        token_files.write(tmp_path / "x", token_files.documents(4, 2))
        path = companion(tmp_path / "x", kind)
        for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
            path.unlink()
            make(path)
            with pytest.raises(FormatError, match="is not a regular file"):
                read_token_file(tmp_path / "x")
            assert not check_token_file(tmp_path / "x").good
            path.rmdir() if path.is_dir() else path.unlink()
            path.touch()
        path.unlink()


def test_a_deeply_nested_or_huge_manifest_is_an_error(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "x", token_files.documents(4, 2))
    path = companion(tmp_path / "x", "manifest.json")
    for text in (b"[" * 200_000, b'{"a":' * 100_000, b"[" * 500 + b"1" * 10_000 + b"]" * 500, b"\xff"):
        path.write_bytes(text)
        with pytest.raises(FormatError):
            read_token_file(tmp_path / "x")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="not the manifest of a token file"):
        read_token_file(tmp_path / "x")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', '{"\\udfff": 1}'])
def test_a_manifest_with_what_cannot_be_written_again_is_an_error(tmp_path: Path, token_files, value: str) -> None:
    token_files.write(tmp_path / "x", token_files.documents(4, 2), more="here")
    path = companion(tmp_path / "x", "manifest.json")
    path.write_text(path.read_text().replace('"here"', value))
    with pytest.raises(FormatError, match="holds what no JSON file may"):
        read_token_file(tmp_path / "x")


def test_a_disk_that_fails_while_reading_is_an_error(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_files.write(tmp_path / "x", token_files.documents(4, 20))
    real, left = os.preadv, 0

    def failing(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    for moment in range(100):
        left = moment
        try:
            verify_token_file(tmp_path / "x")
            break
        except FormatError as error:
            assert "the disk reports an error" in str(error)
    assert moment > 8


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch) -> None:
    token_files.write(tmp_path / "x", token_files.documents(4, 20))
    real = os.preadv

    def cutting(descriptor, buffers, at):
        return 0 if at > 100 else real(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(FormatError, match="was cut short while it was read"):
        read_token_file(tmp_path / "x")


def test_too_many_open_files_is_an_error_with_a_way_out(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_files.write(tmp_path / "x", token_files.documents(4, 3))
    file = read_token_file(tmp_path / "x", check="sizes")

    def full(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(np, "memmap", full)
    with pytest.raises(FormatError, match="too many files are open; raise the limit"):
        file[0]


def test_a_writer_and_a_reader_agree_on_a_name_with_dots_and_other_scripts(tmp_path: Path, token_files) -> None:
    for name in ("a.b.c", "suomi ä", "ไทย", "x.bin", ".hidden"):
        token_files.write(tmp_path / "f" / name, token_files.documents(1, 3))
        assert len(read_token_file(tmp_path / "f" / name)) == 3
        assert verify_token_file(str(tmp_path / "f" / name))["documents"] == 3

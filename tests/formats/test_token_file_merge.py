"""Joined token files against one writer that was given everything, and against Megatron's own builder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats import (
    token_file_columns,
    token_file_layout,
    token_file_merge,
    token_file_statistics,
    token_file_structure,
)
from megatron_xalign.formats.atomic import remove_abandoned
from megatron_xalign.formats.token_file import (
    TokenFileWriter,
    companion,
    merge_token_files,
    read_manifest,
    read_token_file,
    verify_token_file,
)

KINDS = ("bin", "idx", "spans")


def same_bytes(a: Path, b: Path, kinds: tuple[str, ...] = KINDS) -> bool:
    return all(companion(a, kind).read_bytes() == companion(b, kind).read_bytes() for kind in kinds)


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Whole files in pieces of a few items, so that documents, sequences and spans are cut everywhere."""
    monkeypatch.setattr(token_file_layout.chunks, "__defaults__", (size, 0))
    for module in (token_file_columns, token_file_merge, token_file_statistics, token_file_structure):
        monkeypatch.setattr(module, "CHUNK", size)


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("piece", [1 << 20, 1, 2, 3, 5, 8])
def test_joined_files_are_what_one_writer_makes_of_all_documents(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch, piece: int, sentences: bool
) -> None:
    groups = [token_files.documents(seed, count) for seed, count in enumerate((9, 1, 0, 14, 3))]
    for number, group in enumerate(groups):
        token_files.write(tmp_path / f"part-{number}", group, sentences=sentences)
    everything = [document for group in groups for document in group]
    whole = token_files.write(tmp_path / "whole", everything, sentences=sentences)
    small_pieces(monkeypatch, piece)
    merged = merge_token_files([tmp_path / f"part-{number}" for number in range(5)], tmp_path / "merged")
    assert same_bytes(tmp_path / "merged", tmp_path / "whole")
    shards = merged.pop("shards")
    assert {**merged, "name": "whole"} == whole
    assert [(shard["name"], shard["documents"]) for shard in shards] == [
        (f"part-{number}", len(group)) for number, group in enumerate(groups)
    ]
    for number, shard in enumerate(shards):
        data = companion(tmp_path / f"part-{number}", "bin").read_bytes()
        assert (shard["tokens"], shard["sha256"]) == (len(data) // 2, hashlib.sha256(data).hexdigest())
    verify_token_file(tmp_path / "merged")


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("piece", [1 << 20, 1, 2, 3, 7])
def test_dropped_documents_are_as_if_they_had_never_been(
    tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch, piece: int, sentences: bool
) -> None:
    rng = np.random.default_rng(piece)
    groups = [token_files.documents(seed, count) for seed, count in enumerate((20, 6, 1, 11))]
    drops = [rng.random(20) < 0.5, None, np.array([True]), np.zeros(11, dtype=bool)]
    for number, group in enumerate(groups):
        token_files.write(tmp_path / f"part-{number}", group, sentences=sentences)
    kept = [
        document
        for group, drop in zip(groups, drops, strict=True)
        for document, gone in zip(group, np.zeros(len(group)) if drop is None else drop, strict=True)
        if not gone
    ]
    whole = token_files.write(tmp_path / "whole", kept, sentences=sentences)
    small_pieces(monkeypatch, piece)
    merged = merge_token_files([tmp_path / f"part-{n}" for n in range(4)], tmp_path / "merged", drop=drops)
    assert same_bytes(tmp_path / "merged", tmp_path / "whole")
    shards = merged.pop("shards")
    assert {**merged, "name": "whole"} == whole
    data, at = companion(tmp_path / "merged", "bin").read_bytes(), 0
    for shard in shards:
        stretch = data[2 * at : 2 * (at + shard["tokens"])]
        assert hashlib.sha256(stretch).hexdigest() == shard["sha256"]
        at += shard["tokens"]
    assert 2 * at == len(data) and shards[2]["documents"] == 0


part = st.tuples(st.integers(0, 6), st.integers(0, 10_000), st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(part, min_size=1, max_size=5), piece=st.integers(1, 40), data=st.data())
def test_any_parts_and_any_drop_lists_join_to_what_one_writer_makes(
    tmp_path_factory, token_files, parts: list, piece: int, data
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    kept, drops = [], []
    for number, (count, seed, sentences) in enumerate(parts):
        documents = token_files.documents(seed, count, num_languages=2)
        token_files.write(folder / f"p{number}", documents, sentences=sentences)
        drop = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
        drops.append(None if drop is None else np.array(drop, dtype=bool))
        gone = drop or [False] * count
        kept += [(document, sentences) for document, out in zip(documents, gone, strict=True) if not out]
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, piece)
        names = [folder / f"p{number}" for number in range(len(parts))]
        if not kept and any(count for count, _, _ in parts):
            with pytest.raises(CorpusError, match="no document to write"):
                merge_token_files(names, folder / "out", drop=drops)
            return
        merge_token_files(names, folder / "out", drop=drops)
    tokenizer = token_files.Tokenizer()
    with TokenFileWriter(
        folder / "whole", tokenizer=tokenizer, origin="parallel", languages=["eng_Latn", "fin_Latn"]
    ) as writer:
        for document, sentences in kept:
            ids = token_files.ids(document)
            writer.add_documents(
                np.array(ids), np.array([len(ids)]), np.cumsum([len(piece) for piece, _ in document]),
                np.array([language for _, language in document]),
                np.array(token_files.sentences(document)) if sentences else None,
            )
        writer.finish(allow_empty=True)
    assert same_bytes(folder / "out", folder / "whole")
    if kept:
        verify_token_file(folder / "out")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatrons_builder_joins_to_the_same_bytes(tmp_path: Path, token_files, dtype) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    vocab_size = 1000 if dtype is np.uint16 else 100_000
    tokenizer = token_files.Tokenizer(vocab_size=vocab_size)
    for number in range(3):
        documents = token_files.documents(number, 20 + number, vocab_size=vocab_size)
        token_files.write(tmp_path / f"p{number}", documents, tokenizer=tokenizer, sentences=number != 1)
    names = [tmp_path / f"p{number}" for number in range(3)]
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for name in names:
        builder.add_index(str(name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_token_files(names, tmp_path / "ours")
    assert same_bytes(tmp_path / "ours", tmp_path / "theirs", ("bin", "idx"))
    theirs, file = indexed_dataset.IndexedDataset(str(tmp_path / "ours")), read_token_file(tmp_path / "ours")
    assert len(theirs) == file.num_sequences > len(file) == 63
    at = theirs.document_indices
    for index, document in enumerate(file):
        assert np.array_equal(np.concatenate(theirs[int(at[index]) : int(at[index + 1])]), document)


@pytest.mark.parametrize("piece", [1 << 20, 1, 3, 4])
def test_megatrons_own_files_are_joined_with_a_language(
    tmp_path: Path, token_files, megatron_builder, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    documents = [[[5, 6, 0]], [[7], [8, 9, 0]], [[0]], [[1, 0, 2]], [[3], [4]]]
    megatron_builder(tmp_path / "a", documents)
    megatron_builder(tmp_path / "b", [[[11, 12]], [[0, 0]]])
    tokenizer = token_files.Tokenizer()
    small_pieces(monkeypatch, piece)
    names = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(FormatError, match="language='fin_Latn'"):
        merge_token_files(names, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="nothing says which tokenizer"):
        merge_token_files(names, tmp_path / "out", language="fin_Latn")
    merge_token_files(names, tmp_path / "out", language="fin_Latn", tokenizer=tokenizer)
    data = companion(tmp_path / "a", "bin").read_bytes() + companion(tmp_path / "b", "bin").read_bytes()
    assert companion(tmp_path / "out", "bin").read_bytes() == data
    file = read_token_file(tmp_path / "out")
    assert file.languages == ["fin_Latn"] and file.num_sequences == 9
    before = [read_token_file(name, "fin_Latn", eod=0) for name in names]
    assert [document.tolist() for document in file] == [document.tolist() for half in before for document in half]
    ids = [half.language_ids_flat(0, half.num_tokens) for half in before]
    assert np.array_equal(file.language_ids_flat(0, file.num_tokens), np.concatenate(ids))
    # A file of ours among them says which tokenizer it is.
    token_files.write(tmp_path / "c", [[([9, 9], 0), ([0], -1)]], languages=["eng_Latn"], origin="monolingual")
    drop = [np.array([True, False, False, True, True]), None, None]
    merge_token_files([*names, tmp_path / "c"], tmp_path / "mixed", language="fin_Latn", drop=drop)
    mixed = read_token_file(tmp_path / "mixed")
    assert [document.tolist() for document in mixed] == [[7, 8, 9, 0], [0], [11, 12], [0, 0], [9, 9, 0]]
    assert mixed.languages == ["fin_Latn", "eng_Latn"]
    assert mixed.language_ids_flat(0, 12).tolist() == [0, 0, 0, -1, -1, 0, 0, -1, -1, 1, 1, -1]
    assert mixed.manifest["tokens_by_language"] == {"fin_Latn": 5, "eng_Latn": 2}
    assert mixed.manifest["documents_by_language"] == {"fin_Latn": 2, "eng_Latn": 1}


def test_empty_documents_of_megatrons_files_are_left_out_and_counted(
    tmp_path: Path, token_files, megatron_builder
) -> None:
    megatron_builder(tmp_path / "a", [[], [[5, 0]], [], [], [[], [6, 0], []], []])
    manifest = merge_token_files(
        [tmp_path / "a"], tmp_path / "out", language="fin_Latn", tokenizer=token_files.Tokenizer()
    )
    assert manifest["left_out_empty_documents"] == 4
    assert [document.tolist() for document in read_token_file(tmp_path / "out")] == [[5, 0], [6, 0]]
    assert verify_token_file(tmp_path / "out")["sequences"] == 2


def test_an_id_outside_the_vocabulary_and_another_width_are_refused(
    tmp_path: Path, token_files, megatron_builder
) -> None:
    megatron_builder(tmp_path / "large", [[[5, 1000, 0]]])
    megatron_builder(tmp_path / "wide", [[[5, 6, 0]]], np.int32)
    for name, said in (("large", "token 1 is 1000, outside the vocabulary of 1000"), ("wide", "has int32 tokens")):
        with pytest.raises(FormatError, match=said):
            merge_token_files([tmp_path / name], tmp_path / "out", language="und", tokenizer=token_files.Tokenizer())
    assert not list(tmp_path.glob("*out*"))


def test_languages_are_united_in_order_of_appearance(tmp_path: Path, token_files) -> None:
    write = token_files.write
    write(tmp_path / "a", [[([5], 0), ([6], 1), ([0], -1)]], languages=["deu_Latn", "eng_Latn"])
    write(tmp_path / "b", [[([7], 0), ([8], 1), ([0], -1)]], languages=["eng_Latn", "zho_Hans"])
    manifest = merge_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert manifest["languages"] == ["deu_Latn", "eng_Latn", "zho_Hans"]
    assert manifest["tokens_by_language"] == {"deu_Latn": 1, "eng_Latn": 2, "zho_Hans": 1}
    assert read_token_file(tmp_path / "c").language_ids_flat(0, 6).tolist() == [0, 1, -1, 1, 2, -1]


def test_more_languages_than_an_index_can_name_are_refused(tmp_path: Path, token_files) -> None:
    for name, first in (("a", 0), ("b", 100)):
        codes = [f"l{number:03d}" for number in range(first, first + 100)]
        token_files.write(tmp_path / name, [[([5], 99), ([0], -1)]], languages=codes)
    with pytest.raises(FormatError, match="200 languages; a token file holds up to 127"):
        merge_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_what_does_not_belong_together_is_refused_and_leaves_nothing(tmp_path: Path, token_files) -> None:
    write, fake = token_files.write, token_files.Tokenizer
    document = [([5], 0), ([0], -1)]
    write(tmp_path / "a", [document])
    write(tmp_path / "other-tokenizer", [document], tokenizer=fake(sha256="cd" * 32))
    write(tmp_path / "other-end", [[([5], 0), ([1], -1)]], tokenizer=fake(eod=1))
    write(tmp_path / "monolingual", [document], origin="monolingual")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, said in (
        ("other-tokenizer", "was made with tokenizer cdcdcdcdcdcd"), ("other-end", "end 1"),
        ("monolingual", "is monolingual, .*a parallel"),
    ):
        with pytest.raises(FormatError, match=said):
            merge_token_files([tmp_path / "a", tmp_path / name], tmp_path / "c")
    with pytest.raises(FormatError, match="not with the one named, efefefefefef"):
        merge_token_files([tmp_path / "a"], tmp_path / "c", tokenizer=fake(sha256="ef" * 32))
    with pytest.raises(ConfigError, match="is named twice"):
        merge_token_files([tmp_path / "a", tmp_path / "." / "a"], tmp_path / "c")
    with pytest.raises(ConfigError, match="is the result and an input"):
        merge_token_files([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(ConfigError, match="is the result and an input"):
        merge_token_files([tmp_path / "a"], tmp_path / "a", replace=True)
    with pytest.raises(ConfigError, match="is there already"):
        merge_token_files([tmp_path / "a"], tmp_path / "monolingual")
    with pytest.raises(FormatError, match="does not exist"):
        merge_token_files([tmp_path / "nothing"], tmp_path / "c")
    for drop in ([np.array([True, False])], [np.array([1])], [], [None, None]):
        with pytest.raises(ValueError, match="drop list"):
            merge_token_files([tmp_path / "a"], tmp_path / "c", drop=drop)
    with pytest.raises(CorpusError, match="no document to write"):
        merge_token_files([tmp_path / "a"], tmp_path / "c", drop=[np.array([True])])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_input_linked_to_the_result_or_to_another_is_found(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "a", token_files.documents(1, 3))
    for kind in (*KINDS, "manifest.json"):
        companion(tmp_path / "b", kind).symlink_to(companion(tmp_path / "a", kind))
    with pytest.raises(ConfigError, match="is named twice"):
        merge_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(ConfigError, match="is the result and an input"):
        merge_token_files([tmp_path / "a"], tmp_path / "b", replace=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropping", [False, True])
def test_a_damaged_input_is_found_and_nothing_is_made_of_it(
    tmp_path: Path, token_files, kind: str, dropping: bool
) -> None:
    for number in range(2):
        token_files.write(tmp_path / f"p{number}", token_files.documents(number, 5))
    path = companion(tmp_path / "p1", kind)
    whole = path.read_bytes()
    before = sorted(item.name for item in tmp_path.iterdir())
    names = [tmp_path / "p0", tmp_path / "p1"]
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FormatError):
            merge_token_files(names, tmp_path / "out", drop=[None, np.arange(5) == 2] if dropping else None)
        assert sorted(item.name for item in tmp_path.iterdir()) == before


def test_manifests_are_combined(tmp_path: Path, token_files) -> None:
    for name, read, extra in (("a", 5, {"seed": 1}), ("b", 7, {"seed": 2, "only": True})):
        token_files.write(
            tmp_path / name, token_files.documents(read, 3), template="{source} {target}", inputs=[{"path": name}],
            counts={"read": read, "skipped_lines": {"bad": 1, name: 1}}, recipe={"x": 1}, **extra,
        )
    names = [tmp_path / "a", tmp_path / "b"]
    manifest = merge_token_files(names, tmp_path / "c")
    assert manifest["inputs"] == [{"path": "a"}, {"path": "b"}] and manifest["template"] == "{source} {target}"
    assert manifest["counts"] == {"read": 12, "skipped_lines": {"bad": 2, "a": 1, "b": 1}}
    assert not {"recipe", "seed", "only"} & manifest.keys()
    assert read_manifest(tmp_path / "c") == manifest
    manifest = merge_token_files(names, tmp_path / "d", details={"counts": {"read": 1}})
    assert manifest["counts"] == {"read": 1} and "template" not in manifest and len(manifest["shards"]) == 2


def test_a_finished_file_is_replaced_only_when_told_and_an_unfinished_one_always(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "a", token_files.documents(1, 3))
    token_files.write(tmp_path / "out", token_files.documents(2, 30))
    merge_token_files([tmp_path / "a"], tmp_path / "out", replace=True)
    assert len(read_token_file(tmp_path / "out")) == 3
    companion(tmp_path / "out", "manifest.json").unlink()
    merge_token_files([tmp_path / "a"], tmp_path / "out")
    assert len(read_token_file(tmp_path / "out")) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_xalign.formats import atomic, token_file_columns
from megatron_xalign.formats.token_file import merge_token_files
moment, folder = int(sys.argv[1]), Path(sys.argv[2])
steps = 0
def step(function):
    def counted(*args, **kwargs):
        global steps
        if steps == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return function(*args, **kwargs)
    return counted
columns = token_file_columns.TokenFileColumns
for name in ("put_token_bytes", "put_sequences", "put_documents", "put_spans", "finish"):
    setattr(columns, name, step(getattr(columns, name)))
atomic.os.replace = step(os.replace)
atomic.os.fsync = step(os.fsync)
merge_token_files([folder / "a", folder / "b"], folder / "out")
print("steps", steps)
"""


def test_a_merge_killed_at_any_moment_leaves_nothing_that_is_read_and_no_litter_after_the_next(
    tmp_path: Path, token_files
) -> None:
    for number, name in enumerate("ab"):
        token_files.write(tmp_path / name, token_files.documents(number, 4))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    moment = 0
    while True:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(moment), str(tmp_path)], env=environment, timeout=300, check=False,
            capture_output=True, text=True,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if companion(tmp_path / "out", "manifest.json").exists():
            # The last rename is done; only the folder was not synced yet.
            verify_token_file(tmp_path / "out")
            for kind in (*KINDS, "manifest.json"):
                companion(tmp_path / "out", kind).unlink()
        else:
            for language in (None, "und"):
                with pytest.raises(FormatError):
                    read_token_file(tmp_path / "out", language)
        moment += 1
    assert moment >= 15 and f"steps {moment}" in done.stdout
    verify_token_file(tmp_path / "out")
    assert remove_abandoned(tmp_path)
    names = {f"{stem}.{kind}" for stem in ("a", "b", "out") for kind in (*KINDS, "manifest.json")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_result_is_json_and_verifies_with_its_shards(tmp_path: Path, token_files) -> None:
    for number in range(3):
        token_files.write(tmp_path / f"p{number}", token_files.documents(number, 5))
    merge_token_files([tmp_path / f"p{number}" for number in range(3)], tmp_path / "out")
    json.dumps(verify_token_file(tmp_path / "out"))
    path = companion(tmp_path / "out", "bin")
    data = bytearray(path.read_bytes())
    first = companion(tmp_path / "p0", "bin").stat().st_size
    data[first + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="The damage is in what came from 'p1'"):
        verify_token_file(tmp_path / "out")


def test_a_part_without_documents_is_a_part(tmp_path: Path, token_files) -> None:
    token_files.write(tmp_path / "empty", [])
    assert len(read_token_file(tmp_path / "empty")) == 0
    manifest = merge_token_files([tmp_path / "empty"], tmp_path / "still")
    assert manifest["documents"] == 0 and verify_token_file(tmp_path / "still")["documents"] == 0

"""What verify finds, all of it, and what it shows."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.errors import FormatError
from megatron_xalign.formats import token_file_check, token_file_layout, token_file_structure
from megatron_xalign.formats.token_file import (
    NO_LANGUAGE,
    TokenFileWriter,
    check_token_file,
    companion,
    read_token_file,
    sample_documents,
    verify_token_file,
)


def damage(path: Path, at: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def checks(prefix: Path, *arguments, **more) -> list[str]:
    return [problem.check for problem in check_token_file(prefix, *arguments, **more).problems]


@pytest.fixture(params=[1 << 20, 1, 3, 8])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in pieces of a few items."""
    monkeypatch.setattr(token_file_layout.chunks, "__defaults__", (request.param, 0))
    for module in (token_file_check, token_file_structure):
        monkeypatch.setattr(module, "CHUNK", request.param)


@pytest.mark.parametrize("sentences", [False, True])
def test_a_good_file_is_good_and_its_counts_are_those_of_a_plain_loop(
    tmp_path: Path, token_files, pieces, sentences: bool
) -> None:
    documents = token_files.documents(6, 40)
    manifest = token_files.write(tmp_path / "x", documents, sentences=sentences)
    report = check_token_file(tmp_path / "x", token_files.Tokenizer())
    assert report.good and report.to_tree()["problems"] == []
    lengths = [len(token_files.ids(document)) for document in documents]
    assert report.facts == {
        "prefix": str(tmp_path / "x"), "companions": True, "origin": "parallel", "documents": 40,
        "sequences": sum(len(token_files.sentences(document)) for document in documents) if sentences else 40,
        "tokens": sum(lengths), "content_tokens": manifest["content_tokens"],
        "tokens_by_language": manifest["tokens_by_language"], "dtype": "uint16", "shortest": min(lengths),
        "documents_by_language": manifest["documents_by_language"], "longest": max(lengths),
        "largest_id": max(token for document in documents for token in token_files.ids(document)),
        "checked": [
            "sizes", "index", "checksums", "manifest", "spans", "token ids", "end of document", "tokenizer",
        ],
    }
    assert verify_token_file(tmp_path / "x") == {**report.facts, "checked": report.facts["checked"][:-1],
                                                 "sample": report.sample}


def test_all_problems_are_found_at_once(tmp_path: Path, token_files, pieces) -> None:
    fake = token_files.Tokenizer
    documents = [[([5, 6], 0), ([0], -1)], [([7], 0), ([8], 0)], [([9], 1), ([0], 1)], [([3], 1), ([4], 0)]]
    token_files.write(tmp_path / "x", documents)
    damage(companion(tmp_path / "x", "bin"), 3, 0x80)  # id 6 becomes 32774
    path = companion(tmp_path / "x", "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["tokens_by_language"]["eng_Latn"] += 1
    manifest["longest_document_tokens"] = 99
    path.write_text(json.dumps(manifest))
    report = check_token_file(tmp_path / "x", fake(sha256="cd" * 32))
    found = {(problem.check, problem.count): problem.message for problem in report.problems}
    assert [problem.check for problem in report.problems] == [
        "checksums", "tokenizer", "token ids", "end of document", "end of document", "manifest", "manifest",
    ]
    assert "x.bin has SHA-256" in report.problems[0].message
    assert "was made with tokenizer abababababab" in found["tokenizer", 1]
    assert "token 1 (document 0) is 32774, outside the vocabulary of 1000." in found["token ids", 1]
    assert "document 1 does not end in the end-of-document token (0); 2 documents do not" in report.problems[3].message
    assert "gives an end-of-document token a language (3 documents)" in found["end of document", 3]
    assert report.sample == [] and not report.good
    with pytest.raises(FormatError, match=r"SHA-256 .* 6 more found: tokenizer, token ids, end of document, manifest"):
        verify_token_file(tmp_path / "x", fake(sha256="cd" * 32))
    json.dumps(report.to_tree())


@pytest.mark.parametrize(
    ("kind", "at", "expected"),
    [
        ("idx", 3, ["checksums", "sizes"]),  # magic
        ("idx", 17, ["checksums", "sizes"]),  # dtype
        ("idx", 19, ["checksums", "sizes"]),  # sequences
        ("spans", 2, ["checksums", "spans"]),  # magic
        ("spans", 20, ["checksums", "spans"]),  # documents
    ],
)
def test_a_broken_header_does_not_hide_what_is_wrong_elsewhere(
    tmp_path: Path, token_files, kind: str, at: int, expected: list[str]
) -> None:
    token_files.write(tmp_path / "x", token_files.documents(6, 9))
    damage(companion(tmp_path / "x", kind), at, 0x40)
    assert checks(tmp_path / "x")[:2] == expected
    damage(companion(tmp_path / "x", "bin"), 2, 0x80)
    assert checks(tmp_path / "x")[:3] == ["checksums", *expected]


def test_lengths_pointers_and_document_indices_are_checked(tmp_path: Path, token_files, pieces) -> None:
    documents = token_files.documents(6, 9)
    sentences = sum(len(token_files.sentences(document)) for document in documents)
    for at, said in (
        (34 + 4 * 3, "sequences? .*(disagree|tokens)"),
        (34 + 4 * 3 + 3, "sequences? .*(disagree|has -)"),
        (34 + 4 * sentences + 8 * 2, "pointers and lengths of sequences disagree at sequence 2"),
        (34 + 12 * sentences + 8 * 4 + 1, "document indices do not rise"),
    ):
        token_files.write(tmp_path / "x", documents, sentences=True)
        damage(companion(tmp_path / "x", "idx"), at, 0x81)
        report = check_token_file(tmp_path / "x")
        assert {problem.check for problem in report.problems} >= {"checksums", "index"}
        with pytest.raises(FormatError, match=said):
            read_token_file(tmp_path / "x")


def test_missing_and_unfinished_files_are_problems_not_exceptions(tmp_path: Path, token_files) -> None:
    assert checks(tmp_path / "nothing") == ["files"]
    for kind in ("bin", "idx", "spans", "manifest.json"):
        token_files.write(tmp_path / "x", token_files.documents(6, 2))
        companion(tmp_path / "x", kind).unlink()
        assert checks(tmp_path / "x") == ["files"]
    token_files.write(tmp_path / "x", token_files.documents(6, 2))
    companion(tmp_path / "x", "manifest.json").write_text("{")
    assert checks(tmp_path / "x") == ["manifest"]


def test_megatrons_own_files_are_checked_as_far_as_can_be(
    tmp_path: Path, token_files, megatron_builder, pieces
) -> None:
    megatron_builder(tmp_path / "m", [[[5, 6], [7, 0]], [], [[0]], [[2000], [3]]])
    report = check_token_file(tmp_path / "m", language="fin_Latn")
    assert report.good and report.facts["checked"] == ["sizes", "index"]
    assert report.facts["tokens_by_language"] == {"fin_Latn": 7}
    assert (report.facts["shortest"], report.facts["longest"], report.facts["largest_id"]) == (0, 4, 2000)
    report = check_token_file(tmp_path / "m", token_files.Tokenizer(), language="fin_Latn")
    assert report.facts["checked"] == ["sizes", "index", "token ids", "end of document"]
    assert report.facts["tokens_by_language"] == {"fin_Latn": 5}
    assert [(problem.check, problem.count) for problem in report.problems] == [("token ids", 1), ("end of document", 2)]
    assert "token 5 (document 3) is 2000" in report.problems[0].message
    assert "document 1 does not end" in report.problems[1].message


def test_documents_without_tokens_are_counted_once(tmp_path: Path, token_files, megatron_builder, pieces) -> None:
    megatron_builder(tmp_path / "m", [[], [[5]], [], [], [[6, 0]], [], [[7]], []])
    report = check_token_file(tmp_path / "m", token_files.Tokenizer())
    assert [(problem.check, problem.count) for problem in report.problems] == [("end of document", 7)]
    assert "document 0 does not end" in report.problems[0].message


def test_a_negative_id_is_a_problem_with_or_without_a_vocabulary(
    tmp_path: Path, token_files, megatron_builder
) -> None:
    megatron_builder(tmp_path / "m", [[[5, -3, 0]]], np.int32)
    for tokenizer in (None, token_files.Tokenizer()):
        report = check_token_file(tmp_path / "m", tokenizer)
        assert [problem.check for problem in report.problems] == ["token ids"]
        assert "token 1 (document 0) is -3" in report.problems[0].message


def test_documents_written_without_an_end_have_none_to_check(tmp_path: Path, token_files) -> None:
    documents = [[([5, 6], 0)], [([7], 1)]]
    token_files.write(tmp_path / "x", documents, append_eod=False)
    report = check_token_file(tmp_path / "x")
    assert report.good and "end of document" not in report.facts["checked"]
    token_files.write(tmp_path / "x", documents, append_eod=True)
    assert checks(tmp_path / "x") == ["end of document", "end of document"]


def test_shards_that_do_not_add_up_are_a_problem(tmp_path: Path, token_files) -> None:
    shards = [{"name": "a", "documents": 2, "tokens": 1, "sha256": "0" * 64}]
    token_files.write(tmp_path / "x", token_files.documents(6, 3), shards=shards)
    report = check_token_file(tmp_path / "x")
    assert [problem.check for problem in report.problems] == ["manifest", "manifest"]
    assert "has 3 documents, the shards of its manifest 2" in report.problems[0].message


def test_a_sample_is_some_documents_spread_over_the_file(tmp_path: Path, token_files) -> None:
    documents = token_files.documents(8, 30)
    token_files.write(tmp_path / "x", documents)
    file = read_token_file(tmp_path / "x", check="sizes")
    shown = sample_documents(file, 4, most_tokens=5)
    assert [item["document"] for item in shown] == [0, 9, 19, 29]
    codes = ["eng_Latn", "fin_Latn", None]
    for item in shown:
        document = documents[item["document"]]
        assert item["tokens"] == len(token_files.ids(document))
        assert item["ids"] == token_files.ids(document)[:5]
        assert item["languages"] == [codes[language] for ids, language in document for _ in ids][:5]
    assert [item["document"] for item in sample_documents(file, 1000)] == list(range(30))
    assert sample_documents(file, 0) == []
    assert verify_token_file(tmp_path / "x")["sample"] == sample_documents(file)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, token_files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file_layout.chunks, "__defaults__", (1 << 12, 0))
    for module in (token_file_check, token_file_structure):
        monkeypatch.setattr(module, "CHUNK", 1 << 12)
    monkeypatch.setattr(token_file_check, "_HASHED_BYTES", 1 << 14)

    def peak(count: int) -> int:
        lengths = np.full(count, 5)
        tokens = np.tile([1, 2, 3, 4, 0], count)
        ends = np.stack([lengths.cumsum() - 1, lengths.cumsum()], axis=1).ravel()
        with TokenFileWriter(
            tmp_path / "x", tokenizer=token_files.Tokenizer(), origin="monolingual", languages=["fin_Latn"]
        ) as writer:
            writer.add_documents(tokens, lengths, ends, np.tile([0, NO_LANGUAGE], count))
            writer.finish()
        tracemalloc.start()
        assert verify_token_file(tmp_path / "x")["documents"] == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(30_000), peak(300_000)
    assert many < few + 200_000, (few, many)


def test_a_bar_is_shown_only_when_asked_for(
    tmp_path: Path, token_files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XALIGN_PROGRESS", "1")
    token_files.write(tmp_path / "x", token_files.documents(8, 3))
    verify_token_file(tmp_path / "x", progress=False)
    assert capsys.readouterr().err == ""
    verify_token_file(tmp_path / "x")
    assert "verify x: 100%" in capsys.readouterr().err

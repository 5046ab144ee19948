"""Token files against Megatron's own writer and reader, and against a plain loop over the tokenizer's own library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from preprocess_jobs import documents, monolingual_job, pairs, pairs_job, write_lines

from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.job_settings import SentenceSettings
from megatron_xalign.data.preprocess import preprocess
from megatron_xalign.data.sentences import SentenceSplitter
from megatron_xalign.data.tokenizer import train_tokenizer

tokenizers = pytest.importorskip("tokenizers")
indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

ODD = [
    "A NUL \0 inside",
    "שלום עולם",
    "สวัสดีชาวโลก",
    "e\u0301 and \u00e9",
    "\u200f\u202e right to left",
    "x",
    "a" * 5000,
    "\n\n",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {"eng_Latn": [item["text"] for item in documents(100, "eng_Latn")]}
    return train_tokenizer(texts, tmp_path_factory.mktemp("t") / "tokenizer", 600) / "tokenizer.json"


def by_megatron(prefix: Path, sequences: list[list[list[int]]]) -> tuple[bytes, bytes]:
    """What Megatron's builder writes of documents of sequences of ids."""
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in sequences:
        builder.add_document([token for sequence in document for token in sequence], [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("engine", ["reference", "gigatoken"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_are_those_of_a_plain_loop_and_megatrons_builder(
    tmp_path: Path, tokenizer: Path, engine: str, append_eod: bool
) -> None:
    if engine == "gigatoken":
        pytest.importorskip("gigatoken")
    records = [*documents(200, "eng_Latn"), *documents(100, "fin_Latn"), *({"text": text} for text in ODD)]
    lines = write_lines(tmp_path / "text.jsonl", records)
    preprocess(
        monolingual_job(
            [lines],
            tmp_path / "ours",
            tokenizer,
            "und",
            engine=engine,
            append_eod=append_eod,
            workers=2,
            part_bytes=20_000,
            keep_blank=True,
        )
    )
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    end = [library.token_to_id("<|endoftext|>")] if append_eod else []
    expected = [[library.encode(record["text"], add_special_tokens=False).ids + end] for record in records]
    assert by_megatron(tmp_path / "theirs", expected) == tuple(
        (tmp_path / f"ours.{kind}").read_bytes() for kind in ("bin", "idx")
    )
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(expected)
    assert all(theirs[n].tolist() == document[0] for n, document in enumerate(expected))


def test_pairs_are_those_of_a_plain_loop_and_megatrons_builder(tmp_path: Path, tokenizer: Path) -> None:
    records = pairs(150)
    lines = write_lines(tmp_path / "pairs.jsonl", records)
    preprocess(pairs_job([lines], tmp_path / "ours", tokenizer, direction="backward", workers=2, part_bytes=5_000))
    library = tokenizers.Tokenizer.from_file(str(tokenizer))

    def ids(text: str) -> list[int]:
        return list(library.encode(text, add_special_tokens=False).ids)

    expected = [
        [[*ids(record["texts"]["fin_Latn"]), *ids("\n"), *ids(record["texts"]["eng_Latn"]), 0]] for record in records
    ]
    assert by_megatron(tmp_path / "theirs", expected) == tuple(
        (tmp_path / f"ours.{kind}").read_bytes() for kind in ("bin", "idx")
    )


def test_sentences_are_those_of_a_plain_loop_and_megatrons_builder(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("nltk")
    texts = [
        f"{a['text']} {b['text']} Dr. {n} came."
        for n, (a, b) in enumerate(zip(documents(60, "eng_Latn"), documents(60, "eng_Latn", 1), strict=True))
    ]
    lines = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    splitter = SentenceSplitter.train(texts, "eng_Latn")
    splitter.model.write(tmp_path / "punkt")
    job = monolingual_job(
        [lines],
        tmp_path / "ours",
        tokenizer,
        "eng_Latn",
        sentences=SentenceSettings(model=str(tmp_path / "punkt")),
        workers=2,
        part_bytes=5_000,
    )
    preprocess(job)
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    expected = []
    for text in texts:
        sentences = [list(library.encode(piece, add_special_tokens=False).ids) for piece in splitter.split(text)]
        assert all(sentences)
        sentences[-1].append(0)
        expected.append(sentences)
    assert max(map(len, expected)) > 2
    assert by_megatron(tmp_path / "theirs", expected) == tuple(
        (tmp_path / f"ours.{kind}").read_bytes() for kind in ("bin", "idx")
    )


def test_several_keys_of_a_record_become_token_files_of_the_same_documents(tmp_path: Path, tokenizer: Path) -> None:
    from megatron_xalign.cli import main

    records = [{"text": item["text"], "title": f"Title {n}"} for n, item in enumerate(documents(40, "eng_Latn"))]
    lines = write_lines(tmp_path / "text.jsonl", records)
    words = ["preprocess", str(lines), "--language", "eng_Latn", "--tokenizer", str(tokenizer), "--workers", "1"]
    assert main(argv=[*words, "--json-keys", "text", "title", "--output-prefix", str(tmp_path / "both")]) == 0
    for key in ("text", "title"):
        fields = Fields(kind="monolingual", language="eng_Latn", text_key=key)
        preprocess(monolingual_job([lines], tmp_path / "one", tokenizer, fields=fields))
        for kind in ("bin", "idx", "spans"):
            assert (tmp_path / f"both_{key}.{kind}").read_bytes() == (tmp_path / f"one.{kind}").read_bytes()
        assert json.loads((tmp_path / f"both_{key}.manifest.json").read_text())["documents"] == 40

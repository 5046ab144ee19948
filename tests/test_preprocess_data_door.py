"""``tools/preprocess_data.py`` writes the bytes of Megatron-LM's tool.

The oracle is what that tool does, as a plain loop: a line at a time through Megatron-Core's own tokenizer class, nltk
for sentences, Megatron-Core's ``IndexedDatasetBuilder`` for the files. (The tool itself is not in the pip package; the
docs say how it was compared by hand.)
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.cli import main
from megatron_xalign.data.sentences import PunktModel, train_model
from megatron_xalign.formats.token_file import read_token_file, verify_token_file

ROOT = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"
SENTENCES = [
    "The river is approx. 40 km long.", "Is it?", "Dr. Smith (of St. Petersburg) says so!", "He said “Yes.” She left.",
    "Joki on esim. pitkä.", "Vuonna 1990. luvulla satoi.", "这是一句话。是吗？", "نص قصير؟ نعم.",
    "It cost 3.5 e.g. $4.",
]

Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(11)
    made = []
    for _ in range(300):
        sentences = rng.choices(SENTENCES, k=rng.randrange(1, 30))
        made.append("".join(sentence + rng.choice([" ", "\n", "  ", "\n\n"]) for sentence in sentences))
    made[5] = "  \n "
    made[6] = f"A text that spells {END} in the middle."
    made[7] = "x" * 20_000
    made[8] = "\u0000 control \u2028 separator \ufeff mark"
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"text": text, "title": text[:40] or "-", "n": 1}, ensure_ascii=number % 2 == 0)
             for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``save_pretrained`` writes it."""
    return make_tokenizer(tmp_path_factory.mktemp("hf"))


def make_tokenizer(folder: Path, *, begin: str | None = None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    special = [END, *([begin] if begin else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(SENTENCES * 5, trainer)
    if begin:
        engine.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, engine.token_to_id(begin))])
    engine.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("punkt") / "english"
    train_model([" ".join(random.Random(seed).choices(SENTENCES, k=40)) for seed in range(50)]).write(folder)
    return folder


def write_as_megatron(
    path: Path, key: str, prefix: Path, encode: Encode, vocab_size: int, eod: int | None,
    split: Callable[[str], list[str]] | None = None,
) -> None:
    """What the tool does with one key, a line at a time."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    with path.open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)[key]
            pieces = [text]
            if split is not None:
                slices = [text[begin : begin + 1_000_000] for begin in range(0, len(text), 1_000_000)]
                pieces = [part for piece in slices for part in split(piece)]
            ids: list[int] = []
            lengths = []
            for piece in pieces:
                if found := encode(piece):
                    ids += found
                    lengths.append(len(found))
            if ids and eod is not None:
                ids.append(eod)
                lengths[-1] += 1
            builder.add_document(np.array(ids), lengths)
    builder.finalize(f"{prefix}.idx")


def assert_same(ours: Path, theirs: Path) -> None:
    for kind in ("bin", "idx"):
        assert Path(f"{ours}.{kind}").read_bytes() == Path(f"{theirs}.{kind}").read_bytes(), kind


def run(*arguments: object) -> int:
    return main("preprocess_data", [str(argument) for argument in arguments])


def megatron_tokenizer(library: str, path: Path, **options: Any) -> Any:
    tokenizers = pytest.importorskip("megatron.core.tokenizers")
    return tokenizers.MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path), metadata_path={"library": library}, **options
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("eod", [True, False])
def test_a_hugging_face_tokenizer_and_two_keys(
    tmp_path: Path, corpus: Path, hugging_face: Path, eod: bool, workers: int
) -> None:
    pytest.importorskip("transformers")
    tokenizer = megatron_tokenizer("huggingface", hugging_face)
    code = run(
        "--input", corpus, "--output-prefix", tmp_path / "ours", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", hugging_face, "--json-keys", "text", "title", "--workers", workers,
        *(["--append-eod"] if eod else []),
    )
    assert code == 0
    for key in ("text", "title"):
        theirs = tmp_path / f"theirs_{key}"
        write_as_megatron(corpus, key, theirs, tokenizer.tokenize, tokenizer.vocab_size, tokenizer.eod if eod else None)
        ours = tmp_path / f"ours_{key}_document"
        assert_same(ours, theirs)
        verify_token_file(ours)
    # The text that spells the end of a document ends one, as in Megatron-LM; white space alone is a document.
    file = read_token_file(tmp_path / "ours_text_document")
    assert len(file) == 300
    assert (file[6] == tokenizer.eod).sum() == 1 + eod


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentences(tmp_path: Path, corpus: Path, hugging_face: Path, punkt: Path, keep_newlines: bool) -> None:
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer

    class SpaceAfterSentence(PunktLanguageVars):
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    variables = SpaceAfterSentence() if keep_newlines else PunktLanguageVars()
    splitter = PunktSentenceTokenizer(PunktModel.read(punkt).parameters(), lang_vars=variables)
    code = run(
        "--input", corpus, "--output-prefix", tmp_path / "ours", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", hugging_face, "--workers", 2, "--append-eod", "--split-sentences", "--lang", "english",
        "--punkt-model", punkt.parent, *(["--keep-newlines"] if keep_newlines else []),
    )
    assert code == 0
    theirs, ours = tmp_path / "theirs", tmp_path / "ours_text_sentence"
    # A text of white space alone has no sentence, so no token; their empty document is left out by ours.
    without = tmp_path / "without_blank.jsonl"
    lines = corpus.read_text(encoding="utf-8").split("\n")
    without.write_text("\n".join(lines[:5] + lines[6:]), encoding="utf-8")
    write_as_megatron(
        without, "text", theirs, lambda text: engine.encode(text).ids, engine.get_vocab_size(), engine.token_to_id(END),
        splitter.tokenize,
    )
    assert_same(ours, theirs)
    assert read_token_file(ours).manifest["sequences"] > 2000


def test_a_tokenizer_with_a_begin_token_must_be_told_what_to_do(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "hf"
    folder.mkdir()
    make_tokenizer(folder, begin="<s>")
    arguments = (
        "--input", corpus, "--output-prefix", tmp_path / "ours", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", folder, "--workers", 1, "--append-eod",
    )
    assert run(*arguments) == 1
    assert "--tokenizer-hf-include-special-tokens or --tokenizer-hf-no-include" in capsys.readouterr().err
    engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for flag, include in (
        ("--tokenizer-hf-include-special-tokens", True), ("--tokenizer-hf-no-include-special-tokens", False)
    ):
        assert run(*arguments, flag) == 0

        def encode(text: str, include: bool = include) -> list[int]:
            return engine.encode(text, add_special_tokens=include).ids

        write_as_megatron(
            corpus, "text", tmp_path / "theirs", encode, engine.get_vocab_size(), engine.token_to_id(END)
        )
        assert_same(tmp_path / "ours_text_document", tmp_path / "theirs")


@pytest.mark.parametrize("tokenizer_type", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece(tmp_path: Path, corpus: Path, texts: list[str], tokenizer_type: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "train.txt").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "train.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=400, model_type="bpe",
        byte_fallback=True, character_coverage=0.9995, minloglevel=2,
    )
    tokenizer = megatron_tokenizer("sentencepiece", tmp_path / "sp.model")
    code = run(
        "--input", corpus, "--output-prefix", tmp_path / "ours", "--tokenizer-type", tokenizer_type,
        "--tokenizer-model", tmp_path / "sp.model", "--workers", 2, "--append-eod",
    )
    assert code == 0
    write_as_megatron(
        drop_empty(corpus, tmp_path, tokenizer.tokenize), "text", tmp_path / "theirs", tokenizer.tokenize,
        tokenizer.vocab_size, tokenizer.eod,
    )
    assert_same(tmp_path / "ours_text_document", tmp_path / "theirs")


def drop_empty(corpus: Path, folder: Path, encode: Encode) -> Path:
    """Without the texts of which the tokenizer makes nothing: their documents without sequences."""
    lines = [line for line in corpus.read_text(encoding="utf-8").split("\n")[:-1] if encode(json.loads(line)["text"])]
    (folder / "some.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "some.jsonl"


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken(tmp_path: Path, corpus: Path, pattern: str) -> None:
    pytest.importorskip("tiktoken")
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"er", b" is", "这".encode(), b"\n\n"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(ranks)
    ]
    (tmp_path / "vocabulary.json").write_text(json.dumps(entries), encoding="utf-8")
    options = {"pattern": pattern, "vocab_size": len(ranks) + 10, "num_special_tokens": 10}
    tokenizer = megatron_tokenizer("tiktoken", tmp_path / "vocabulary.json", **options)
    code = run(
        "--input", corpus, "--output-prefix", tmp_path / "ours", "--tokenizer-type", "TikTokenizer",
        "--tokenizer-model", tmp_path / "vocabulary.json", "--workers", 1, "--append-eod",
        "--tiktoken-pattern", pattern, "--vocab-size", len(ranks) + 10, "--tiktoken-num-special-tokens", 10,
    )
    assert code == 0
    write_as_megatron(
        corpus, "text", tmp_path / "theirs", tokenizer.tokenize, tokenizer.vocab_size, tokenizer.eod
    )
    assert_same(tmp_path / "ours_text_document", tmp_path / "theirs")


def test_compressed_files_by_a_pattern_and_partitions_keep_the_order(
    tmp_path: Path, corpus: Path, hugging_face: Path
) -> None:
    from tokenizers import Tokenizer

    lines = corpus.read_bytes().splitlines(keepends=True)
    for name, part in (("a", lines[:100]), ("b", lines[100:])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wb") as file:
            file.writelines(part)
    code = run(
        "--input", tmp_path / "*.jsonl.gz", "--output-prefix", tmp_path / "ours", "--tokenizer-type",
        "HuggingFaceTokenizer", "--tokenizer-model", hugging_face, "--workers", 2, "--partitions", 2,
        "--keep-sequential-samples", "--append-eod", "--log-interval", 10,
    )
    assert code == 0
    engine = Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    write_as_megatron(
        corpus, "text", tmp_path / "theirs", lambda text: engine.encode(text).ids, engine.get_vocab_size(),
        engine.token_to_id(END),
    )
    assert_same(tmp_path / "ours_text_document", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--find-optimal-num-workers"], "--find-optimal-num-workers"),
        (["--legacy-tokenizer"], "--legacy-tokenizer"),
        (["--trust-remote-code"], "--trust-remote-code"),
        (["--vocab-file", "vocab.json"], "--vocab-file"),
        (["--tokenizer-hf"], "--tokenizer-hf"),
        (["--tokenizer-type", "BertWordPieceCase"], "BertWordPieceCase"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "GPT2BPETokenizer"),
        (["--keep-newlines"], "--keep-newlines"),
        (["--vocab-size", "1000"], "--vocab-size"),
        (["--partitions", "2", "--workers", "3"], "--partitions"),
        (["--json-keys", "text", "text"], "--json-keys"),
    ],
)
def test_what_is_not_carried_or_does_not_fit_is_an_error_that_names_the_flag(
    tmp_path: Path, corpus: Path, hugging_face: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str],
    message: str,
) -> None:
    code = run(
        "--input", corpus, "--output-prefix", tmp_path / "ours", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", hugging_face, "--workers", 1, *flags,
    )
    assert code in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("ours*"))


def test_a_bad_line_stops_it_with_file_and_line(
    tmp_path: Path, hugging_face: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', encoding="utf-8")
    code = run(
        "--input", tmp_path / "bad.jsonl", "--output-prefix", tmp_path / "ours", "--tokenizer-type",
        "HuggingFaceTokenizer", "--tokenizer-model", hugging_face, "--workers", 2,
    )
    assert code == 1
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert not list(tmp_path.glob("ours*.bin"))


def test_the_script_is_the_door(tmp_path: Path, corpus: Path, hugging_face: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), "--output-prefix",
            str(tmp_path / "ours"), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hugging_face),
            "--workers", "1", "--append-eod",
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours_text_document.bin").stat().st_size > 0
    assert str(tmp_path / "ours_text_document") in done.stdout

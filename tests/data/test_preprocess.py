"""Documents to token files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.data import preprocess as preprocess_module
from megatron_xalign.data.documents import pair_order
from megatron_xalign.data.preprocess import preprocess_monolingual, preprocess_pairs
from megatron_xalign.data.tokenizer import Tokenizer, train_tokenizer
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.token_file import read_token_file, verify_token_file

LANGUAGES = ("eng_Latn", "fin_Latn")
FINNISH = ["Kissa istuu puussa.", "Koira nukkuu, ja lintu laulaa.", "漢字 😀 äöå", "", "  \n", "Viides rivi.\nKuudes."]
PAIRS = [(f"The cat sits in tree {n}.", f"Kissa istuu puussa {n}.") for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = {"eng_Latn": [a for a, _ in PAIRS], "fin_Latn": [*FINNISH, *(b for _, b in PAIRS)]}
    return Tokenizer.load(train_tokenizer(texts, tmp_path_factory.mktemp("t") / "tokenizer", 350))


@pytest.fixture
def finnish(tmp_path: Path) -> Path:
    path = tmp_path / "fin_Latn.jsonl"
    lines = [json.dumps({"id": f"f{n}", "text": text}, ensure_ascii=False) for n, text in enumerate(FINNISH)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"id": f"p{n}", "texts": {"eng_Latn": a, "fin_Latn": b}}) for n, (a, b) in enumerate(PAIRS)]
    lines.append(json.dumps({"id": "half", "texts": {"eng_Latn": "No translation", "fin_Latn": ""}}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_monolingual_documents_come_back_as_their_text(tmp_path: Path, finnish: Path, tokenizer: Tokenizer) -> None:
    manifest = preprocess_monolingual([finnish, finnish], tmp_path / "tokens" / "fin", tokenizer, "fin_Latn")
    file = read_token_file(tmp_path / "tokens" / "fin")
    kept = [text for text in FINNISH if text.strip()] * 2
    assert [tokenizer.decode(document[:-1]) for document in file] == kept
    assert all(document[-1] == tokenizer.eod for document in file)
    assert all(file.language_ids(n).tolist() == [0] * (len(file[n]) - 1) + [-1] for n in range(len(file)))
    assert manifest["counts"] == {"read": 12, "written": 8, "empty": 4, "skipped_lines": {}}
    assert manifest["origin"] == "monolingual" and manifest["template"] is None
    assert [item["bytes"] for item in manifest["inputs"]] == [finnish.stat().st_size] * 2
    assert verify_token_file(tmp_path / "tokens" / "fin", tokenizer)["documents"] == 8


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
def test_each_side_of_a_pair_keeps_its_language_exactly(
    tmp_path: Path, pairs: Path, tokenizer: Tokenizer, direction: str
) -> None:
    prefix = tmp_path / direction
    manifest = preprocess_pairs([pairs], prefix, tokenizer, LANGUAGES, direction=direction, seed=3)
    file = read_token_file(prefix)
    assert len(file) == len(PAIRS) and manifest["counts"]["empty"] == 1
    for n, pair in enumerate(PAIRS):
        order = pair_order(f"p{n}", direction, 3)
        tokens, languages = file[n], file.language_ids(n)
        for side in (0, 1):
            assert tokenizer.decode(tokens[languages == side]) == pair[side]
        assert tokenizer.decode(tokens[languages == -1]) == "\n" + "<|endoftext|>"
        assert languages[0] == order[0] and languages[-2] == order[1]
        # The default template's tokens are those of the rendered text as a whole.
        whole = tokenizer.encode([f"{pair[order[0]]}\n{pair[order[1]]}"])[0]
        assert np.array_equal(tokens[:-1], whole)
    assert verify_token_file(prefix, tokenizer)["tokens_by_language"] == manifest["tokens_by_language"]


def test_the_second_language_may_come_first(tmp_path: Path, pairs: Path, tokenizer: Tokenizer) -> None:
    preprocess_pairs([pairs], tmp_path / "a", tokenizer, LANGUAGES, direction="backward")
    preprocess_pairs([pairs], tmp_path / "b", tokenizer, LANGUAGES[::-1], direction="forward")
    a, b = read_token_file(tmp_path / "a"), read_token_file(tmp_path / "b")
    assert np.array_equal(a.tokens, b.tokens) and a.languages == b.languages[::-1]


def test_batches_change_nothing(
    tmp_path: Path, pairs: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess_pairs([pairs], tmp_path / "a", tokenizer, LANGUAGES)
    monkeypatch.setattr(preprocess_module, "_BATCH_DOCUMENTS", 7)
    preprocess_pairs([pairs], tmp_path / "b", tokenizer, LANGUAGES)
    for kind in ("bin", "idx", "spans"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_finished_file_is_kept_until_something_that_matters_changes(
    tmp_path: Path, pairs: Path, tokenizer: Tokenizer
) -> None:
    prefix = tmp_path / "x"

    def made(**options: object) -> bool:
        before = (tmp_path / "x.bin").stat().st_mtime_ns if (tmp_path / "x.bin").exists() else 0
        preprocess_pairs([pairs], prefix, tokenizer, LANGUAGES, **options)
        return (tmp_path / "x.bin").stat().st_mtime_ns != before

    assert made()
    assert not made()
    assert made(seed=9)
    assert made(direction="forward", seed=1)
    assert not made(direction="forward", seed=2)  # the seed is of the random direction only
    (tmp_path / "x.spans").write_bytes(b"")
    assert made(direction="forward")
    pairs.write_text(pairs.read_text() + json.dumps({"id": "q", "texts": {"eng_Latn": "a", "fin_Latn": "b"}}) + "\n")
    assert made(direction="forward")
    assert len(read_token_file(prefix)) == len(PAIRS) + 1


def test_inputs_that_cannot_be_used_are_corpus_errors_and_leave_nothing(
    tmp_path: Path, pairs: Path, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CorpusError, match="does not exist"):
        preprocess_monolingual([tmp_path / "nothing.jsonl"], out / "x", tokenizer, "fin_Latn")
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n\n')
    with pytest.raises(CorpusError, match=r"no document with text \(1 read, 1 empty, 1 lines left out\)"):
        preprocess_monolingual([tmp_path / "empty.jsonl"], out / "x", tokenizer, "fin_Latn")
    (tmp_path / "bad.jsonl").write_text(pairs.read_text() + "oops\n")
    with pytest.raises(CorpusError, match=rf"bad\.jsonl:{len(PAIRS) + 2}: not JSON"):
        preprocess_pairs([tmp_path / "bad.jsonl"], out / "x", tokenizer, LANGUAGES)
    with pytest.raises(ConfigError, match="template"):
        preprocess_pairs([pairs], out / "x", tokenizer, LANGUAGES, template="{source}")
    assert not list(out.iterdir())
    manifest = preprocess_pairs([tmp_path / "bad.jsonl"], out / "x", tokenizer, LANGUAGES, on_error="skip")
    assert manifest["counts"]["skipped_lines"] == {"not JSON": 1}

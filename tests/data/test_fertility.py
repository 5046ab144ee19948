"""What a tokenizer spends on a language, by the command line and against plain counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from preprocess_jobs import documents, write_lines

from megatron_xalign.cli import main
from megatron_xalign.data.fertility import ids_of_partial_characters
from megatron_xalign.data.tokenizer import Tokenizer, train_tokenizer

pytest.importorskip("tokenizers")


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_parts_of_characters_are_the_ids_that_decode_to_no_character(tmp_path: Path, model: str) -> None:
    texts = [*(item["text"] for item in documents(60, "fin_Latn")), "漢字かな" * 20, "🙂" * 30]
    tokenizer = Tokenizer.load(train_tokenizer({"fin_Latn": texts}, tmp_path / "t", 500, model=model))  # type: ignore[arg-type]
    found = ids_of_partial_characters(tokenizer.model)
    names = {token: tokenizer.model.name_of(token) or "" for token in range(tokenizer.vocab_size)}
    if model == "unigram":
        assert found == {token for token, name in names.items() if name.startswith("<0x")}
    else:
        assert found == {token for token in names if token != tokenizer.eod and "\ufffd" in tokenizer.decode([token])}
    assert found
    spelt = tokenizer.encode(["ꙮ"])[0].tolist()
    assert len(spelt) == 3 and set(spelt) <= found
    assert not found & set(tokenizer.encode([texts[0]])[0].tolist())


def test_the_report_is_what_a_plain_loop_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    english, finnish = ([item["text"] for item in documents(40, code)] for code in ("eng_Latn", "fin_Latn"))
    folder = train_tokenizer({"eng_Latn": english}, tmp_path / "t", 400)
    records = [{"text": text, "lang": code} for code, texts in (("en", english), ("fi", finnish)) for text in texts]
    lines = write_lines(tmp_path / "both.jsonl", [*records, "oops"])
    words = ["tokenizer", "fertility", str(folder), str(lines), "--language-key", "lang", "--language-map",
             "en=eng_Latn,fi=fin_Latn", "--json"]
    assert main(argv=words) == 1
    assert f"{lines}:81: not JSON" in capsys.readouterr().err
    assert main(argv=[*words, "--on-error", "skip"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped_lines"] == {"not JSON": 1} and len(report["examples_of_skipped"]) == 1
    tokenizer = Tokenizer.load(folder)
    assert (report["sha256"], report["eod"]) == (tokenizer.sha256, tokenizer.eod)
    for code, texts in (("eng_Latn", english), ("fin_Latn", finnish)):
        facts = report["languages"][code]
        tokens = sum(len(tokenizer.encode([text])[0]) for text in texts)
        assert (facts["texts"], facts["tokens"]) == (len(texts), tokens)
        assert facts["tokens_per_word"] == pytest.approx(tokens / sum(len(text.split()) for text in texts), abs=1e-4)


def test_a_tokenizer_is_trained_on_lines_that_can_be_read_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "text.jsonl", [*documents(30, "eng_Latn"), "oops"])
    out = tmp_path / "t"
    words = ["tokenizer", "train", str(lines), str(out), "--language", "eng_Latn", "--vocab-size", "300"]
    assert main(argv=[*words, "--dry-run"]) == 0
    assert f"{lines}: jsonl" in capsys.readouterr().out and not out.exists()
    assert main(argv=words) == 1
    assert "text.jsonl:31: not JSON" in capsys.readouterr().err and not out.exists()
    assert main(argv=[*words, "--on-error", "skip"]) == 0
    assert json.loads((out / "manifest.json").read_text())["skipped_lines"] == {"not JSON": 1}
    assert "line skipped: not JSON" in capsys.readouterr().out

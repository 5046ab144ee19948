"""Training, saving and loading tokenizers, against Hugging Face transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xalign.data.tokenizer import END_OF_DOCUMENT, Tokenizer, fertility, train_tokenizer
from megatron_xalign.errors import ConfigError, CorpusError, FormatError

ENGLISH = [f"The {noun} is {place} the house number {n}." for n, (noun, place) in enumerate(
    (noun, place) for noun in ("cat", "dog", "bird", "child", "table") for place in ("in", "behind", "near", "above")
)]
FINNISH = [f"{noun} on {place} numero {n}." for n, (noun, place) in enumerate(
    (noun, place) for noun in ("Kissa", "Koira", "Lintu", "Lapsi", "Pöytä")
    for place in ("talossa", "talon takana", "talon lähellä", "talon yllä")
)]
TEXTS = {"eng_Latn": ENGLISH, "fin_Latn": FINNISH}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / request.param, 400, model=request.param)


def test_its_folder_loads_in_transformers_and_gives_the_same_ids(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    texts = [*ENGLISH, *FINNISH, "漢字 😀 \n\n tab\t", " leading", "1234567 don't"]
    assert [ids.tolist() for ids in ours.encode(texts)] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert theirs.eos_token_id == ours.eod == 0 and theirs.eos_token == END_OF_DOCUMENT
    assert len(theirs) == ours.vocab_size
    ids = theirs(texts[0])["input_ids"]
    assert theirs.decode(ids) == ours.decode(ids) == texts[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_every_text_has_a_spelling_and_comes_back_unchanged(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.load(folder)
    (ids,) = tokenizer.encode([text])
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text


def test_text_that_spells_the_end_of_document_does_not_end_it(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    (ids,) = tokenizer.encode([f"before {END_OF_DOCUMENT} after"])
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == f"before {END_OF_DOCUMENT} after"


def test_training_again_gives_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "manifest.json").read_text())["model"]
    again = train_tokenizer({code: iter(texts) for code, texts in TEXTS.items()}, tmp_path / "t", 400, model=model)
    assert Tokenizer.load(again).sha256 == Tokenizer.load(folder).sha256


def test_the_manifest_states_size_hash_and_fertility_per_language(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = Tokenizer.load(folder)
    assert manifest["vocab_size"] == tokenizer.vocab_size <= 400
    assert (manifest["sha256"], manifest["eod"]) == (tokenizer.sha256, 0)
    for language, texts in TEXTS.items():
        tokens = sum(len(ids) for ids in tokenizer.encode(texts))
        stated = manifest["languages"][language]
        assert stated["tokens_per_word"] == pytest.approx(tokens / sum(len(t.split()) for t in texts), abs=1e-4)
        assert stated["tokens_per_character"] == pytest.approx(tokens / sum(map(len, texts)), abs=1e-4)


def test_balance_decides_whose_words_get_tokens(tmp_path: Path) -> None:
    texts = {"eng_Latn": ENGLISH * 50, "fin_Latn": FINNISH[:5]}
    tokens = {}
    for balance in (0.0, 1.0):
        tokenizer = Tokenizer.load(train_tokenizer(texts, tmp_path / f"{balance}", 320, balance=balance))
        tokens[balance] = fertility(tokenizer, FINNISH[:5])["tokens"]
    assert tokens[0.0] < tokens[1.0]
    shares = json.loads((tmp_path / "0.0" / "manifest.json").read_text())["languages"]
    assert shares["fin_Latn"]["share_of_training_bytes"] == pytest.approx(0.5, abs=0.02)


def test_a_changed_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("tokenizer.json", "manifest.json"):
        (changed / name).write_bytes((folder / name).read_bytes())
    (changed / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(FormatError, match="changed after it was trained"):
        Tokenizer.load(changed)


def test_a_bare_tokenizer_json_needs_a_token_that_ends_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models

    vocabulary = {"a": 0, "b": 1, "</s>": 2, "stop": 5}
    Engine(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.eod == 2 and tokenizer.vocab_size == 6
    assert Tokenizer.load(tmp_path, "stop").eod == 5
    with pytest.raises(FormatError, match="no token <end>"):
        Tokenizer.load(tmp_path, "<end>")


def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_too_small_a_vocabulary_and_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=256"):
        train_tokenizer(TEXTS, tmp_path / "t", 256)
    with pytest.raises(CorpusError, match="no fin_Latn text"):
        train_tokenizer({"eng_Latn": ENGLISH, "fin_Latn": [""]}, tmp_path / "t", 400)
    assert not list(tmp_path.iterdir())


def test_more_text_than_allowed_is_drawn_from_all_of_it(tmp_path: Path) -> None:
    early, late = ["early words " * 20] * 200, ["later tokens " * 20] * 200
    train_tokenizer({"eng_Latn": [*early, *late]}, tmp_path / "t", 300, max_bytes_per_language=20_000)
    tokenizer = Tokenizer.load(tmp_path / "t")
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["languages"]["eng_Latn"]["characters"] <= 20_000
    assert all(ids.size <= 2 for ids in tokenizer.encode([" words", " tokens"]))

"""Training tokenizers: what they learn, the ids they give, the report, and the same bytes every time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from multilingual import ALL_LINES, LINES, ODD_TEXTS

from megatron_xalign.data.fertility import fertility
from megatron_xalign.data.split_patterns import TRAINING_SPLITS
from megatron_xalign.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer
from megatron_xalign.data.training_text import draw_texts, shares_of
from megatron_xalign.errors import ConfigError, CorpusError

TEXTS = {language: lines * 3 for language, lines in LINES.items()}
WAYS = [("bpe", "gpt2"), ("bpe", "llama3"), ("bpe", "o200k"), ("bpe", "llama3-lines"), ("unigram", "gpt2")]


@pytest.fixture(scope="module", params=WAYS, ids=["-".join(way) for way in WAYS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, split = request.param
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("t") / f"{model}-{split}", 900, model=model, split=split)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("t") / "default", 900)


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_its_folder_loads_in_transformers_and_gives_the_same_ids(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    texts = [text for text in [*ALL_LINES, *ODD_TEXTS] if END_OF_DOCUMENT not in text]
    assert [ids.tolist() for ids in ours.encode(texts)] == theirs(texts, add_special_tokens=False)["input_ids"]
    parsing = Tokenizer.load(folder, parse_special_tokens=True, add_special_tokens=True)
    texts = [*ALL_LINES, *ODD_TEXTS]
    assert [ids.tolist() for ids in parsing.encode(texts)] == theirs(texts)["input_ids"]
    assert theirs.eos_token_id == ours.eod == 0 and theirs.eos_token == END_OF_DOCUMENT
    assert len(theirs) == ours.vocab_size == 900
    ids = theirs(ALL_LINES[0])["input_ids"]
    assert theirs.decode(ids) == ours.decode(ids) == ALL_LINES[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_every_text_has_a_spelling_and_comes_back_unchanged(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.load(folder)
    (ids,) = tokenizer.encode([text])
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids and tokenizer.model.unknown_id is None


def test_odd_texts_and_unseen_scripts_come_back_unchanged_without_unknowns(tmp_path: Path) -> None:
    english = {"eng_Latn": LINES["eng_Latn"] * 3}
    for model in ("bpe", "unigram"):
        tokenizer = Tokenizer.load(train_tokenizer(english, tmp_path / model, 500, model=model))  # type: ignore[arg-type]
        texts = [*ALL_LINES, *ODD_TEXTS, "<0x41>", "<unk>", "▁ ▁▁", "<0xE6><0xBC><0xA2>"]
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
        unknown = tokenizer.model.id_of("<unk>")
        assert unknown is None or all(unknown not in ids for ids in tokenizer.encode(texts))


def test_text_that_spells_the_end_of_document_does_not_end_it(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    (ids,) = tokenizer.encode([f"before {END_OF_DOCUMENT} after"])
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == f"before {END_OF_DOCUMENT} after"


@pytest.mark.parametrize("split", ["gpt2", "llama3-lines"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.text(st.sampled_from("aé漢7.,!?'\"-) \n\u0301😀"), min_size=1, max_size=12),
    target=st.text(st.sampled_from("aé漢7.,!?'\"-( \n\u0301😀"), min_size=1, max_size=12),
)
def test_a_line_break_never_joins_what_precedes_it(
    split: Any, source: str, target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So the sides of a pair, tokenised one by one around a line break, have the tokens of the whole text."""
    assume(not source[-1].isspace() and not target[0].isspace())
    folder = tmp_path_factory.getbasetemp() / f"lines-{split}"
    if not folder.exists():
        # Text in which a mark and a line break would be worth a token, if the pattern let them join.
        train_tokenizer({"eng_Latn": [f"{line}.\n{line}!\n" for line in ALL_LINES] * 5}, folder, 900, split=split)
    whole, *parts = Tokenizer.load(folder).encode([f"{source}\n{target}", source, "\n", target])
    assert whole.tolist() == np.concatenate(parts).tolist()


def test_the_split_of_llama3_does_join_them(tmp_path: Path) -> None:
    texts = {"eng_Latn": [f"{line}.\n{line}!\n" for line in ALL_LINES] * 5}
    tokenizer = Tokenizer.load(train_tokenizer(texts, tmp_path / "t", 900, split="llama3"))
    whole, *parts = tokenizer.encode(["so.\nit", "so.", "\n", "it"])
    assert whole.tolist() != np.concatenate(parts).tolist()


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_training_again_gives_the_same_bytes_with_other_threads_and_hashes(model: str, tmp_path: Path) -> None:
    code = (
        "import sys; from multilingual import LINES; from megatron_xalign.data.tokenizer import train_tokenizer;"
        "train_tokenizer({k: v * 3 for k, v in LINES.items()}, sys.argv[1], 900, model=sys.argv[2])"
    )
    digests = set()
    for number, threads in enumerate(("1", "3", "1")):
        environment = {
            **os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(number + 1), "XALIGN_PROGRESS": "0",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        out = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", code, str(out), model], env=environment, check=True, timeout=300)
        digests.add(b"".join(path.read_bytes() for path in sorted(out.iterdir())))
    assert len(digests) == 1


# --- special tokens and sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_special_tokens_get_the_stated_ids(model: Any, tmp_path: Path) -> None:
    stated = {"<|pad|>": 1, END_OF_DOCUMENT: 3, "<|im_start|>": 700, "<|last|>": 799}
    out = train_tokenizer(TEXTS, tmp_path / "t", 800, model=model, special_tokens=stated)
    tokenizer = Tokenizer.load(out)
    assert {name: tokenizer.model.id_of(name) for name in stated} == stated == manifest_of(out)["special_tokens"]
    assert (tokenizer.eod, tokenizer.vocab_size) == (3, 800)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(ALL_LINES)] == ALL_LINES
    ids = Tokenizer.load(out, parse_special_tokens=True).encode(["a<|im_start|>b<|last|>"])[0]
    assert {700, 799} < set(ids.tolist())
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == (END_OF_DOCUMENT, "<|pad|>")
    in_order = train_tokenizer(TEXTS, tmp_path / "o", 800, model=model, special_tokens=["<|a|>", END_OF_DOCUMENT])
    assert manifest_of(in_order)["special_tokens"] == {"<|a|>": 0, END_OF_DOCUMENT: 1}
    assert Tokenizer.load(in_order).eod == 1


def test_moving_special_tokens_moves_ids_and_nothing_else(tmp_path: Path, default: Path) -> None:
    moved = Tokenizer.load(train_tokenizer(TEXTS, tmp_path / "t", 900, special_tokens={END_OF_DOCUMENT: 899}))
    usual = Tokenizer.load(default)
    for ours, theirs in zip(moved.encode(ALL_LINES), usual.encode(ALL_LINES), strict=True):
        assert np.array_equal(ours, theirs - 1)


def test_a_small_corpus_fills_the_gap_before_a_stated_id_with_reserved_tokens(tmp_path: Path) -> None:
    texts = {"eng_Latn": ["one two", "two one"]}
    tokenizer = Tokenizer.load(train_tokenizer(texts, tmp_path / "t", 400, special_tokens={END_OF_DOCUMENT: 350}))
    assert (tokenizer.eod, tokenizer.vocab_size) == (350, 351)
    names = [tokenizer.model.name_of(index) for index in range(351)]
    assert None not in names and len(set(names)) == 351
    reserved = [name for name in names if name and name.startswith("<|reserved_")]
    assert reserved == [f"<|reserved_{index}|>" for index in range(len(reserved))] == names[350 - len(reserved) : 350]


@pytest.mark.parametrize(
    ("special", "options", "message"),
    [
        ({END_OF_DOCUMENT: 0, "<|a|>": 0}, {}, "not different numbers"),
        ({END_OF_DOCUMENT: -1}, {}, "not different numbers"),
        ({END_OF_DOCUMENT: 900}, {}, "beyond the ids of vocab_size=900"),
        ([END_OF_DOCUMENT, END_OF_DOCUMENT], {}, "hold a name twice"),
        (["<|a|>"], {}, "not among the special tokens"),
        ([END_OF_DOCUMENT, " <|a|>"], {}, "white space around"),
        ([END_OF_DOCUMENT, "a"], {}, "also a piece of ordinary text"),
        ([END_OF_DOCUMENT, "<0x41>"], {"model": "unigram"}, "reserved"),
        ([END_OF_DOCUMENT], {"temperature": 0.5}, "temperature=0.5 is below 1"),
        ([END_OF_DOCUMENT], {"temperature": math.nan}, "temperature=nan"),
        ([END_OF_DOCUMENT], {"split": "gpt5"}, "split=gpt5 is unknown"),
        ([END_OF_DOCUMENT], {"model": "words"}, "model=words"),
        ([END_OF_DOCUMENT], {"make_vocab_size_divisible_by": 0}, "must be at least 1"),
    ],
)
def test_what_contradicts_itself_is_refused(
    special: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(TEXTS, tmp_path / "t", 900, special_tokens=special, **options)
    assert not list(tmp_path.iterdir())


def test_too_small_a_vocabulary_and_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=256 is below 257"):
        train_tokenizer(TEXTS, tmp_path / "t", 256)
    with pytest.raises(ConfigError, match="vocab_size=258 is below 259"):
        train_tokenizer(TEXTS, tmp_path / "t", 258, model="unigram")
    with pytest.raises(CorpusError, match="no fin_Latn text"):
        train_tokenizer({"eng_Latn": ALL_LINES, "fin_Latn": [""]}, tmp_path / "t", 400)
    with pytest.raises(CorpusError, match="there is no text"):
        train_tokenizer(iter([]), tmp_path / "t", 400)
    with pytest.raises(CorpusError, match="text 2 of eng_Latn is not valid Unicode"):
        train_tokenizer({"eng_Latn": ["fine", "bad\ud800"]}, tmp_path / "t", 400)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("divisible_by", "tensor_size"), [(128, 1), (128, 4), (100, 3)])
def test_the_manifest_states_the_rows_that_megatron_will_have(
    divisible_by: int, tensor_size: int, tmp_path: Path
) -> None:
    options: dict[str, int] = {
        "make_vocab_size_divisible_by": divisible_by, "tensor_model_parallel_size": tensor_size
    }
    multiple = divisible_by * tensor_size
    out = train_tokenizer(TEXTS, tmp_path / "a", 500, **options)  # type: ignore[arg-type]
    # Megatron's own arithmetic: up to the next multiple.
    rows = 500
    while rows % multiple:
        rows += 1
    assert manifest_of(out)["padded_vocab"] == {"size": rows, **options}
    filled = train_tokenizer(TEXTS, tmp_path / "b", 500, fill_vocab=True, **options)  # type: ignore[arg-type]
    assert Tokenizer.load(filled).vocab_size == rows == manifest_of(filled)["padded_vocab"]["size"]
    ids = [Tokenizer.load(path).encode(ALL_LINES) for path in (out, filled)]
    assert all(np.array_equal(first, second) for first, second in zip(*ids, strict=True))


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10 / 3, math.inf])
def test_shares_of_the_training_text_follow_the_temperature(temperature: float, tmp_path: Path) -> None:
    texts = {
        "eng_Latn": [f"number {index}" for index in range(3_000)],
        "fin_Latn": [f"luku {index}" for index in range(300)],
        "zho_Hans": [f"数 {index}" for index in range(30)],
    }
    out = train_tokenizer(texts, tmp_path / "t", 400, temperature=temperature)
    sizes = {language: sum(len(text.encode()) for text in items) for language, items in texts.items()}
    powers = {language: math.exp(math.log(size) / temperature) for language, size in sizes.items()}
    for language, facts in manifest_of(out)["languages"].items():
        assert facts["bytes_read"] == sizes[language] and facts["texts_read"] == len(texts[language])
        assert facts["share_of_corpus"] == pytest.approx(sizes[language] / sum(sizes.values()), abs=1e-6)
        assert facts["share_of_training_bytes"] == pytest.approx(powers[language] / sum(powers.values()), abs=5e-4)
    assert manifest_of(out)["temperature"] == ("inf" if temperature == math.inf else temperature)


def test_temperature_decides_whose_words_get_tokens(tmp_path: Path) -> None:
    texts = {"eng_Latn": LINES["eng_Latn"] * 50, "fin_Latn": LINES["fin_Latn"]}
    tokens = {}
    for temperature in (1.0, math.inf):
        tokenizer = Tokenizer.load(train_tokenizer(texts, tmp_path / f"{temperature}", 320, temperature=temperature))
        tokens[temperature] = fertility(tokenizer.model, LINES["fin_Latn"])["tokens"]
    assert tokens[math.inf] < tokens[1.0]


def test_huge_sizes_do_not_overflow() -> None:
    shares = shares_of({"a": 10**15, "b": 1}, 1.0)
    assert shares["a"] == pytest.approx(1.0) and shares["b"] == pytest.approx(1e-15)


def test_a_draw_is_uniform_bounded_and_blind_to_other_languages() -> None:
    texts = [f"{number:05d} padding of one size" for number in range(4_000)]
    size = len(texts[0])
    drawn = draw_texts((("eng_Latn", text) for text in texts), size * 400, seed=3)["eng_Latn"]
    kept = [*drawn.texts, *drawn.held_out]
    assert len(kept) == 400 == len(set(kept)) and set(kept) <= set(texts)
    # Halves, tenths: each about its share of 400; four standard deviations of the hypergeometric draw.
    by_tenth = Counter(int(text[:5]) // 400 for text in kept)
    assert all(abs(by_tenth[tenth] - 40) <= 4 * math.sqrt(40 * 0.9 * 0.9) for tenth in range(10))
    assert set(drawn.texts).isdisjoint(drawn.held_out) and len(drawn.held_out) == 20
    mixed = ((language, text) for text in texts for language in ("fin_Latn", "eng_Latn"))
    again = draw_texts(mixed, size * 400, seed=3)
    assert list(again) == ["eng_Latn", "fin_Latn"] and again["eng_Latn"] == drawn
    assert again["fin_Latn"].texts != drawn.texts
    assert draw_texts((("eng_Latn", text) for text in texts), size * 400, seed=4)["eng_Latn"].texts != drawn.texts


def test_a_few_long_documents_lend_lines_to_measure_on() -> None:
    documents = [("eng_Latn", "".join(f"line {number} of document {name}\n" for number in range(200))) for name in "ab"]
    drawn = draw_texts(documents, 10**9, seed=0)["eng_Latn"]
    assert 5 <= len(drawn.held_out) <= 20
    assert sorted([*drawn.texts, *drawn.held_out]) == sorted(
        line for _, text in documents for line in text.splitlines(keepends=True)
    )
    assert draw_texts([("eng_Latn", "one line")], 100, seed=0)["eng_Latn"].held_out == []


def test_memory_is_bounded_by_the_cap_not_by_the_corpus() -> None:
    def corpus() -> Iterator[tuple[str, str]]:
        for number in range(300):
            yield "eng_Latn", f"{number} " + "word " * 20_000  # 30 MB in all
        yield "eng_Latn", "x" * 20_000_000

    tracemalloc.start()
    drawn = draw_texts(corpus(), 2_000_000, seed=0)["eng_Latn"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn.bytes_read > 50_000_000 and drawn.num_bytes <= 2_000_000
    assert peak < 30_000_000  # the longest text, and the cap


def test_more_text_than_allowed_is_drawn_from_all_of_it(tmp_path: Path) -> None:
    early, late = ["early words " * 20] * 200, ["later tokens " * 20] * 200
    train_tokenizer({"eng_Latn": [*early, *late]}, tmp_path / "t", 300, max_bytes_per_language=20_000)
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert manifest_of(tmp_path / "t")["languages"]["eng_Latn"]["bytes_drawn"] <= 20_000
    assert all(ids.size <= 2 for ids in tokenizer.encode([" words", " tokens"]))


def test_pairs_of_language_and_text_train_what_a_mapping_trains(tmp_path: Path, default: Path) -> None:
    pairs = ((language, text) for language, texts in TEXTS.items() for text in texts)
    assert Tokenizer.load(train_tokenizer(pairs, tmp_path / "t", 900)).sha256 == Tokenizer.load(default).sha256


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_manifest_states_size_hash_and_fertility_per_language(folder: Path) -> None:
    manifest = manifest_of(folder)
    tokenizer = Tokenizer.load(folder)
    assert manifest["vocab_size"] == tokenizer.vocab_size == 900
    assert (manifest["sha256"], manifest["eod"]) == (tokenizer.sha256, 0)
    assert f"{manifest['model']}-{manifest['split']}" == folder.name and manifest["split"] in TRAINING_SPLITS
    assert set(manifest["languages"]) == set(LINES)
    samples = draw_texts(((language, text) for language, texts in TEXTS.items() for text in texts), 10**9, 0)
    for language, sample in samples.items():
        texts = sample.held_out or sample.texts
        stated = manifest["languages"][language]
        assert stated["held_out"] == bool(sample.held_out) and stated["texts"] == len(texts)
        tokens = sum(len(ids) for ids in tokenizer.encode(texts))
        words, characters = sum(len(text.split()) for text in texts), sum(len(text) for text in texts)
        assert stated["tokens_per_word"] == pytest.approx(tokens / words, abs=1e-4)
        assert stated["tokens_per_character"] == pytest.approx(tokens / characters, abs=1e-4)
        assert stated["bytes_per_token"] == pytest.approx(len("".join(texts).encode()) / tokens, abs=1e-4)
        assert stated["unknown_rate"] == 0


def test_unknowns_and_single_bytes_are_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers

    engine = Engine(models.WordLevel({"[UNK]": 0, "known": 1, "</s>": 2}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "tokenizer.json"))
    facts = fertility(Tokenizer.load(tmp_path).model, ["known new new", "known"])
    assert (facts["tokens"], facts["unknown_rate"]) == (4, 0.5)
    trained = Tokenizer.load(train_tokenizer({"eng_Latn": LINES["eng_Latn"]}, tmp_path / "u", 500, model="unigram"))
    byte_ids = frozenset(trained.model.id_of(f"<0x{byte:02X}>") for byte in range(256))
    facts = fertility(trained.model, ["漢字漢字漢字"], byte_ids)  # type: ignore[arg-type]
    assert (facts["tokens"], facts["byte_rate"], facts["unknown_rate"]) == (18, 1.0, 0.0)

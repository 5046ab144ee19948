"""Engines: flat ids, equal to the library's own; a faster one only after proof, and never where it would differ."""

from __future__ import annotations

import json
import multiprocessing
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from multilingual import ALL_LINES, ODD_TEXTS
from tokenizer_files import hf_folder, ranks_of, sentencepiece_model, tiktoken_file

from megatron_xalign.data import engines
from megatron_xalign.data.engine_proof import adversarial_texts, first_difference
from megatron_xalign.data.engines import GigatokenEngine, choose_engine, engine_named, reference_engine
from megatron_xalign.data.packed_texts import PackedTexts
from megatron_xalign.data.tokenizer import TiktokenSettings, Tokenizer, UnencodableTextError, train_tokenizer
from megatron_xalign.errors import ConfigError

TEXTS = [*ALL_LINES, *ODD_TEXTS, "\n".join(ALL_LINES)]
REAL_TEXT = Path(__file__).resolve().parents[3] / "shared" / "data"
FAST = ["gpt2", "llama3", "o200k", "spm", "spm-trims", "tiktoken"]
# Letters of Unicode 17; Python 3.11 and 3.12 do not know them, gigatoken and tokenizers disagree on them.
NEW_LETTERS = ["\u088f", "\ua7ce", "\U00010940"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One tokenizer of each kind that gigatoken knows, and one of a kind that it does not."""
    pytest.importorskip("gigatoken")
    pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("engines")
    made = {
        split: Tokenizer.load(train_tokenizer({"eng_Latn": ALL_LINES}, folder / split, 700, split=split))
        for split in ("gpt2", "llama3", "o200k", "llama3-lines")
    }
    options: dict[str, Any] = {"normalization_rule_name": "identity", "user_defined_symbols": ["<sep>"]}
    made["spm-trims"] = Tokenizer.load(sentencepiece_model(folder / "trims.model", **options))
    options["remove_extra_whitespaces"] = False
    made["spm"] = Tokenizer.load(sentencepiece_model(folder / "spm.model", **options))
    made["spm-nfkc"] = Tokenizer.load(sentencepiece_model(folder / "nfkc.model"))
    made["unigram"] = Tokenizer.load(sentencepiece_model(folder / "u.model", model_type="unigram"))
    ranks = tiktoken_file(folder / "x.tiktoken", ranks_of(hf_folder(folder / "hf")))
    made["tiktoken"] = Tokenizer.load(ranks, tiktoken=TiktokenSettings(split="gpt2", special_tokens=["<|endoftext|>"]))
    return made


def oracle(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids as the library gives them for one text at a time."""
    engine: Any = tokenizer.model
    if tokenizer.kind == "tokenizers":
        return [engine.engine.encode(text, add_special_tokens=False).ids for text in texts]
    if tokenizer.kind == "sentencepiece":
        return [engine.processor.encode_as_ids(text) for text in texts]
    return [engine.encoding.encode_ordinary(text) for text in texts]


def rows(flat: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, lengths = flat
    assert ids.dtype == np.int32 and lengths.dtype == np.int64 and lengths.sum() == ids.size
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] if lengths.size else []


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAST, "unigram", "spm-nfkc", "llama3-lines"])
def test_the_reference_gives_the_ids_of_the_library(tokenizers: dict[str, Tokenizer], name: str) -> None:
    engine = reference_engine(tokenizers[name])
    assert rows(engine.encode_flat(TEXTS)) == oracle(tokenizers[name], TEXTS)
    assert rows(engine.encode_flat(tuple(TEXTS[:3]))) == oracle(tokenizers[name], TEXTS[:3])


@pytest.mark.parametrize("name", FAST)
def test_gigatoken_gives_the_ids_of_the_library(tokenizers: dict[str, Tokenizer], name: str) -> None:
    engine = GigatokenEngine(tokenizers[name])
    assert rows(engine.encode_flat(TEXTS)) == oracle(tokenizers[name], TEXTS)
    assert rows(engine.encode_flat(tuple(TEXTS[:3]))) == oracle(tokenizers[name], TEXTS[:3])
    texts = adversarial_texts(["<|endoftext|>", "</s>"])
    assert rows(engine.encode_flat(texts)) == oracle(tokenizers[name], texts)
    assert engine.failure is None


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=30), max_size=6))
@example(texts=[])
@example(texts=["", "", ""])
@example(texts=["", "<|endoftext|>", "", "a</s>b<s>", ""])
@example(texts=[*NEW_LETTERS, "", *NEW_LETTERS])
def test_any_texts_get_the_ids_of_the_library(
    tokenizers: dict[str, Tokenizer], name: str, texts: list[str]
) -> None:
    assert rows(GigatokenEngine(tokenizers[name]).encode_flat(texts)) == oracle(tokenizers[name], texts)


def test_texts_that_gigatoken_would_read_otherwise_go_to_the_reference(tmp_path: Path) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    # Letters that share their first byte with the new ones, and no more, after an "a": that is worth a token.
    words = " ".join(f"a{letter}" for letter in "अঅਅઅଅஅఅಅഅก" + "ꀀꙁꨀ가ꝏꠀꔀ" + "𐌰𝐀𠀀𓀀𒀀𖠀")
    tokenizer = Tokenizer.load(train_tokenizer({"mul_Zzzz": [words] * 50}, tmp_path / "t", 300))
    raw = gigatoken.Tokenizer.from_json(tokenizer.path.read_bytes())
    texts = ["plain", "an <|endoftext|> inside", *(f"an a{letter}b" for letter in NEW_LETTERS), "", "plain"]
    right = oracle(tokenizer, texts)
    # Each guard stands for a difference that is real; when a newer gigatoken has none, this says so.
    differ = [place for place, text in enumerate(texts) if raw.encode(text).tolist() != right[place]]
    assert differ == [1, 2, 3, 4]
    assert all(unicodedata.category(letter) == "Cn" for letter in NEW_LETTERS)
    engine = GigatokenEngine(tokenizer)
    assert rows(engine.encode_flat(texts)) == right and engine.texts_by_reference == 4


def test_white_space_at_an_end_goes_to_sentencepiece_where_that_trims(tokenizers: dict[str, Tokenizer]) -> None:
    texts = ["\ta", "a\n", " a ", "a\u3000", "▁a", "a\tb", "a<sep>b", "\n"]
    for name, by_reference in (("spm-trims", 7), ("spm", 1)):
        engine = GigatokenEngine(tokenizers[name])
        assert rows(engine.encode_flat(texts)) == oracle(tokenizers[name], texts)
        assert engine.texts_by_reference == by_reference


@pytest.mark.parametrize("name", ["reference", "gigatoken"])
def test_half_a_character_is_refused_with_its_place(tokenizers: dict[str, Tokenizer], name: Any) -> None:
    engine = engine_named(tokenizers["gpt2"], name)
    with pytest.raises(UnencodableTextError, match=r"U\+D800 at character 1") as caught:
        engine.encode_flat(["good", "漢", "x\ud800"])
    assert caught.value.index == 2


def test_tokens_around_every_text_are_added_by_both_engines(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    from tokenizers.processors import TemplateProcessing

    template = TemplateProcessing(single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = Tokenizer.load(hf_folder(tmp_path, post_processor=template), add_special_tokens=True)
    texts = [*TEXTS, "", "with </s> inside", NEW_LETTERS[0]]
    engine = GigatokenEngine(tokenizer)
    assert rows(engine.encode_flat(texts)) == rows(reference_engine(tokenizer).encode_flat(texts))
    assert rows(engine.encode_flat(["a"]))[0][:2] == [0, 0] and rows(engine.encode_flat([""])) == [[0, 0, 1]]
    parsing = Tokenizer.load(tmp_path, add_special_tokens=True, parse_special_tokens=True)
    assert rows(GigatokenEngine(parsing).encode_flat(texts)) == rows(reference_engine(parsing).encode_flat(texts))


def test_what_gigatoken_remembers_is_bounded_and_changes_no_id(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = GigatokenEngine(tokenizers["gpt2"])
    first = engine._engine
    engine.encode_flat(ALL_LINES)
    assert engine._engine is first
    monkeypatch.setattr(engines, "_MIN_BYTES_BETWEEN", 1_000)
    monkeypatch.setattr(engines, "_MAX_GROWTH_BYTES", -(1 << 40))
    for texts in (ALL_LINES, TEXTS, ALL_LINES):
        assert rows(engine.encode_flat(texts)) == oracle(tokenizers["gpt2"], texts)
    assert engine._engine is not first


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="real text lies beside the project only where it is developed")
@pytest.mark.parametrize("model", ["gpt2", "llama3", "sentencepiece"])
def test_real_text_in_six_languages_gets_the_same_ids(model: str, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    import zstandard

    texts = []
    for path in sorted(REAL_TEXT.glob("*/docs.*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line, _ in zip(lines, range(120), strict=False)]
    assert len(texts) > 700
    if model == "sentencepiece":
        file = sentencepiece_model(
            tmp_path / "x.model", texts=texts[::7], vocab_size=8_000, normalization_rule_name="identity"
        )
        tokenizer = Tokenizer.load(file)
    else:
        split: Any = model
        tokenizer = Tokenizer.load(train_tokenizer({"mul_Zzzz": texts[::7]}, tmp_path / "t", 8_000, split=split))
    engine, facts = choose_engine(tokenizer, texts[:50])
    assert facts["name"] == "gigatoken"
    assert rows(engine.encode_flat(texts)) == oracle(tokenizer, texts)


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_a_proved_engine_is_chosen_and_says_what_was_proved(tokenizers: dict[str, Tokenizer], name: str) -> None:
    sample = [*ALL_LINES, "with <|endoftext|> and </s>", "half \ud800"]
    engine, facts = choose_engine(tokenizers[name], sample)
    assert engine.name == facts["name"] == "gigatoken" and facts["library"].startswith("gigatoken 0.")
    proved = facts["proved"]
    assert proved["documents"] == len(sample) - 1 and proved["bytes"] == sum(len(t.encode()) for t in sample[:-1])
    assert proved["built_in_texts"] > 10_000 and proved["reference"] == tokenizers[name].model.library
    assert proved["documents_by_reference"] == 1
    assert json.loads(json.dumps(facts)) == facts
    assert rows(engine_named(tokenizers[name], facts["name"]).encode_flat(TEXTS)) == oracle(tokenizers[name], TEXTS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama3-lines", "Unknown pre_tokenizer Split"), ("unigram", "unigram"),
        # It takes this one, and then composes accents otherwise than SentencePiece does.
        ("spm-nfkc", "gives other ids"),
    ],
)
def test_what_gigatoken_does_not_know_is_tokenised_by_the_reference(
    tokenizers: dict[str, Tokenizer], name: str, reason: str
) -> None:
    engine, facts = choose_engine(tokenizers[name], ALL_LINES)
    assert engine.name == facts["name"] == "reference" and reason in facts["reason"]
    assert facts["library"] == tokenizers[name].model.library
    with pytest.raises(ConfigError, match="gigatoken cannot be used"):
        choose_engine(tokenizers[name], ALL_LINES, "gigatoken")


def test_the_reference_is_used_where_it_is_asked_for_or_nothing_can_be_proved(tokenizers: dict[str, Tokenizer]) -> None:
    assert choose_engine(tokenizers["gpt2"], ALL_LINES, "reference")[1]["reason"] == "the reference was asked for"
    for sample in ([], ["", ""], ["\ud800"]):
        engine, facts = choose_engine(tokenizers["gpt2"], sample)
        assert engine.name == "reference" and "no text to prove" in facts["reason"]
    with pytest.raises(ValueError, match="none of auto"):
        choose_engine(tokenizers["gpt2"], ALL_LINES, "fastest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither reference nor gigatoken"):
        engine_named(tokenizers["gpt2"], "fastest")  # type: ignore[arg-type]


def test_without_gigatoken_the_reference_is_used_and_the_way_to_install_it_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(hf_folder(tmp_path))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    engine, facts = choose_engine(tokenizer, ALL_LINES)
    assert engine.name == "reference" and "pip install 'megatron-xalign[gigatoken]'" in facts["reason"]
    for ask in (lambda: choose_engine(tokenizer, ALL_LINES, "gigatoken"), lambda: engine_named(tokenizer, "gigatoken")):
        with pytest.raises(ConfigError, match="pip install"):
            ask()


class _Lying:
    """gigatoken, but for one word, which it takes for another; or it raises there."""

    def __init__(self, engine: Any, word: str, error: BaseException | None = None) -> None:
        self.engine, self.word, self.error = engine, word, error

    def encode_batch(self, texts: list[str], *, parallel: bool) -> Any:
        assert parallel is False
        if self.error and any(self.word in text for text in texts):
            raise self.error
        return self.engine.encode_batch([text.replace(self.word, "other") for text in texts], parallel=False)

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode() if isinstance(text, str) else text
        if self.error and self.word.encode() in data:
            raise self.error
        ids: np.ndarray = self.engine.encode(data.replace(self.word.encode(), b"other"))
        return ids


def test_one_wrong_id_in_the_sample_is_found_and_named(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loader = engines._loader
    monkeypatch.setattr(engines, "_loader", lambda *given: lambda: _Lying(loader(*given)(), "xylophone"))
    sample = [*ALL_LINES, "She plays the xylophone."]
    engine, facts = choose_engine(tokenizers["gpt2"], sample)
    assert engine.name == "reference" and "gives other ids: from token" in facts["reason"]
    assert "She plays the xylophone." in facts["reason"] and "She plays the xylophone." in caplog.text
    with pytest.raises(ConfigError, match="gives other ids"):
        choose_engine(tokenizers["gpt2"], sample, "gigatoken")
    assert choose_engine(tokenizers["gpt2"], ALL_LINES)[0].name == "gigatoken"


class PanicException(BaseException):
    """What gigatoken's panics are called; not an ``Exception``."""


@pytest.mark.parametrize("error", [RuntimeError("no more memory"), PanicException("index out of bounds")])
def test_a_failure_keeps_it_from_being_chosen_and_later_costs_time_but_no_id(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    loader = engines._loader
    monkeypatch.setattr(engines, "_loader", lambda *given: lambda: _Lying(loader(*given)(), "xylophone", error))
    engine, facts = choose_engine(tokenizers["gpt2"], ["xylophone"])
    assert engine.name == "reference" and facts["reason"].endswith(f"failed: {error}")
    engine, _ = choose_engine(tokenizers["gpt2"], ALL_LINES)
    assert engine.name == "gigatoken"
    texts = ["a xylophone", *ALL_LINES]
    assert rows(engine.encode_flat(texts)) == oracle(tokenizers["gpt2"], texts)
    assert str(error) in caplog.text


def test_an_id_beyond_the_vocabulary_is_a_failure_too(
    tokenizers: dict[str, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizers["gpt2"]
    engine = GigatokenEngine(tokenizer)
    right = engine._engine
    engine._engine = SimpleNamespace(encode=lambda data: right.encode(data) + np.uint32(tokenizer.vocab_size))
    assert rows(engine.encode_flat(ALL_LINES)) == oracle(tokenizer, ALL_LINES)
    assert engine.failure is not None and "leaves the vocabulary" in caplog.text


def test_texts_in_one_stretch_get_the_ids_that_each_has_alone(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gpt2"]
    engine = GigatokenEngine(tokenizer)
    assert engine.separator == tokenizer.eod_token.encode()
    plain = [*ALL_LINES, "", " ", "\n", "new \u0378 character", "\U0001f9d1", "x" * 3000]
    for texts in (plain, [*plain, f"it spells {tokenizer.eod_token} out", "after it"], [""], [tokenizer.eod_token]):
        expected = [[*row, tokenizer.eod] for row in oracle(tokenizer, texts)]
        ids, lengths = engine.encode_ended(PackedTexts.of(texts, engine.separator))
        assert [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])] == expected
        assert rows(engine.encode_flat(texts)) == oracle(tokenizer, texts)
    with pytest.raises(UnencodableTextError, match=r"text 1 of the batch .* U\+DC41"):
        engine.encode_ended(PackedTexts.of(["a", "b\udc41"], engine.separator))


def test_an_interrupt_is_not_taken_for_a_failure(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = engines._loader
    monkeypatch.setattr(engines, "_loader", lambda *given: lambda: _Lying(loader(*given)(), "x", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        GigatokenEngine(tokenizers["gpt2"]).encode_flat(["x"])


def test_a_difference_names_text_and_ids() -> None:
    class Fixed:
        def __init__(self, ids: list[list[int]]) -> None:
            self.ids = ids

        def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.array([len(row) for row in self.ids])
            return np.array([token for row in self.ids for token in row], dtype=np.int32), lengths

    right = Fixed([[1, 2], [], [3, 4, 5]])
    assert first_difference(right, right, ["a", "", "b"]) is None
    assert first_difference(Fixed([]), Fixed([]), []) is None
    found = first_difference(right, Fixed([[1, 2], [], [3, 9, 5]]), ["a", "", "b"])
    assert found is not None and (found.text, found.at, found.reference, found.other) == ("b", 1, [4, 5], [9, 5])
    # The same ids in a row, cut at another place.
    found = first_difference(right, Fixed([[1], [2], [3, 4, 5]]), ["a", "", "b"])
    assert found is not None and (found.text, found.at, found.reference, found.other) == ("a", 1, [2], [])


def test_the_proof_covers_what_tokenizers_trip_over() -> None:
    texts = adversarial_texts(["<|sep|>"])
    joined = "".join(texts)
    assert adversarial_texts(["<|sep|>"]) == texts
    pieces = ("\x00", "\u3000", "\u0301", "👨\u200d👩", "١٢٣", "हिन्दी", "漢字", "\r\n", "a<|sep|>b", "\ufeff")
    assert all(piece in joined for piece in pieces)
    assert "" in texts and max(map(len, texts)) >= 20_000
    assigned = {c for c in map(chr, range(0x3000)) if unicodedata.category(c) not in ("Cn", "Cs")}
    assert assigned <= set(joined)


def _encode_in_worker(tokenizer: Tokenizer, name: Any, queue: Any) -> None:
    queue.put(rows(engine_named(tokenizer, name).encode_flat(TEXTS)))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_worker_process_gives_the_same_ids(tokenizers: dict[str, Tokenizer], method: Any) -> None:
    engine, facts = choose_engine(tokenizers["gpt2"], ALL_LINES)
    here = rows(engine.encode_flat(TEXTS))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    for name in ("reference", facts["name"]):
        process = context.Process(target=_encode_in_worker, args=(tokenizers["gpt2"], name, queue))
        process.start()
        assert queue.get(timeout=120) == here
        process.join(timeout=300)

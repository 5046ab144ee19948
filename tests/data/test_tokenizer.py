"""Loading tokenizers of three kinds, against their own libraries and Megatron-Core's wrappers of them."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multilingual import ALL_LINES, ODD_TEXTS
from tokenizer_files import hf_folder, megatron_ranks, ranks_of, sentencepiece_model, tiktoken_file

from megatron_xalign.data import tokenizer_models
from megatron_xalign.data.split_patterns import PATTERNS
from megatron_xalign.data.tokenizer import TiktokenSettings, Tokenizer, UnencodableTextError
from megatron_xalign.errors import ConfigError, FormatError

TEXTS = [*ALL_LINES, *ODD_TEXTS, "\n".join(ALL_LINES)]
GPT2 = TiktokenSettings(split="gpt2", special_tokens=["<|endoftext|>", "</s>"])


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("hf"), {"eos_token": "</s>", "bos_token": "<s>"})


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="module")
def ranks(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tiktoken")
    return tiktoken_file(tmp_path_factory.mktemp("tiktoken") / "own.tiktoken", ranks_of(hf))


def as_lists(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode(texts)]


# --- ids --------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(hf: Path) -> None:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_file(str(hf / "tokenizer.json"))
    engine.encode_special_tokens = True
    tokenizer = Tokenizer.load(hf)
    assert tokenizer.kind == "tokenizers"
    assert as_lists(tokenizer, TEXTS) == [engine.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert tokenizer.vocab_size == max(engine.get_vocab().values()) + 1


@pytest.mark.parametrize("options", [{}, {"model_type": "unigram"}, {"remove_extra_whitespaces": False}])
def test_a_model_gives_the_ids_of_the_sentencepiece_library(tmp_path: Path, options: dict[str, Any]) -> None:
    file = sentencepiece_model(tmp_path / "m.model", **options)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.load(file)
    assert tokenizer.kind == "sentencepiece"
    assert as_lists(tokenizer, TEXTS) == [processor.encode_as_ids(text) for text in TEXTS]
    assert (tokenizer.vocab_size, tokenizer.eod) == (processor.get_piece_size(), processor.eos_id())
    with_first = Tokenizer.load(file, add_special_tokens=True)
    assert as_lists(with_first, TEXTS) == [[processor.bos_id(), *processor.encode_as_ids(text)] for text in TEXTS]


def test_a_rank_file_gives_the_ids_of_the_tiktoken_library(ranks: Path, hf: Path) -> None:
    import tiktoken

    tokens = ranks_of(hf)
    ids = {token: rank for rank, token in enumerate(tokens)}
    special = {"<|endoftext|>": len(tokens), "</s>": len(tokens) + 1}
    encoding = tiktoken.Encoding("x", pat_str=PATTERNS["gpt2"], mergeable_ranks=ids, special_tokens=special)
    tokenizer = Tokenizer.load(ranks, tiktoken=GPT2)
    assert tokenizer.kind == "tiktoken" and tokenizer.eod == len(tokens)
    assert as_lists(tokenizer, TEXTS) == [encoding.encode_ordinary(text) for text in TEXTS]
    parsing = Tokenizer.load(ranks, tiktoken=GPT2, parse_special_tokens=True)
    assert as_lists(parsing, TEXTS) == [encoding.encode(text, allowed_special="all") for text in TEXTS]
    # The same merges as the tokenizer.json that the ranks came from; its three special tokens come first there.
    assert [ids + 3 for ids in tokenizer.encode(ALL_LINES)][5].tolist() == as_lists(Tokenizer.load(hf), ALL_LINES)[5]


@pytest.mark.parametrize("split", sorted(PATTERNS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_long_text_worked_on_in_pieces_has_the_ids_of_the_whole(
    split: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tokenizers import Regex, pre_tokenizers

    folder = tmp_path_factory.getbasetemp() / f"long-{split}"
    if not folder.exists():
        cut = pre_tokenizers.Split(Regex(PATTERNS[split]), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hf_folder(folder, pre_tokenizer=pre_tokenizers.Sequence([cut, bytes_]))
    model = Tokenizer.load(folder).model
    words = st.sampled_from([*" ".join(ALL_LINES).split()[::40], "a", "7", "B2", "'s", "'", "...", "<|endoftext|>"])
    gaps = st.sampled_from(
        [" ", " ", " ", "\n", "  ", "\n\n", " \n", "\n ", "\t", "", "\r\n", "\u3000", ". ", ".\n", "\x1c"]
    )
    text = "".join(data.draw(st.lists(st.tuples(words, gaps).map("".join), min_size=20, max_size=60)))
    (whole,) = np.split(model.encode_flat([text])[0], [])
    pieces = list(tokenizer_models._cut_at_spaces(text, 30))
    assert "".join(pieces) == text
    assert np.array_equal(np.concatenate([model.encode_flat([piece])[0] for piece in pieces]), whole)


def test_a_line_of_megabytes_is_cut_only_where_that_is_known_to_be_exact(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import normalizers

    text = "\n".join(ALL_LINES)
    whole = as_lists(Tokenizer.load(hf), [text, "short", text])
    normalised = Tokenizer.load(hf_folder(tmp_path / "n", normalizer=normalizers.NFKC()))
    whole_normalised = as_lists(normalised, [text])
    monkeypatch.setattr(tokenizer_models, "_BATCH_CHARACTERS", 500)
    tokenizer = Tokenizer.load(hf)
    assert len(list(tokenizer.model._batches([text]))) >= 8  # type: ignore[attr-defined]
    assert len(list(normalised.model._batches([text]))) == 1  # type: ignore[attr-defined]
    assert as_lists(tokenizer, [text, "short", text]) == whole
    assert as_lists(normalised, [text]) == whole_normalised


def test_truncation_and_padding_in_the_file_change_nothing(hf: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_file(str(hf / "tokenizer.json"))
    engine.enable_truncation(4)
    engine.enable_padding(length=8)
    engine.save(str(tmp_path / "tokenizer.json"))
    assert as_lists(Tokenizer.load(tmp_path), TEXTS) == as_lists(Tokenizer.load(hf), TEXTS)


def test_no_texts_and_empty_texts(hf: Path, spm: Path, ranks: Path) -> None:
    for tokenizer in (Tokenizer.load(hf), Tokenizer.load(spm), Tokenizer.load(ranks, tiktoken=GPT2)):
        assert tokenizer.encode([]) == []
        assert as_lists(tokenizer, ["", "a", ""])[::2] == [[], []]
        ids, lengths = tokenizer.model.encode_flat(["", ""])
        assert (ids.dtype, lengths.dtype, ids.size, lengths.tolist()) == (np.int32, np.int64, 0, [0, 0])


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_text_that_spells_a_special_token_is_text_unless_asked_otherwise(hf: Path, ranks: Path) -> None:
    text = "before </s> after <|endoftext|>"
    for path, settings_ in ((hf, None), (ranks, GPT2)):
        (ids,) = Tokenizer.load(path, tiktoken=settings_).encode([text])
        special = Tokenizer.load(path, tiktoken=settings_).model.special_ids
        assert not special & set(ids.tolist())
        assert Tokenizer.load(path, tiktoken=settings_).decode(ids) == text
        parsing = Tokenizer.load(path, tiktoken=settings_, parse_special_tokens=True)
        (ids,) = parsing.encode([text])
        assert len(special & set(ids.tolist())) == 2 and parsing.decode(ids) == text
        assert parsing.options["parse_special_tokens"]
        assert parsing.sha256 == Tokenizer.load(path, tiktoken=settings_).sha256


def test_the_post_processor_adds_its_tokens_only_when_asked(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    template = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    folder = hf_folder(tmp_path, post_processor=template)
    plain, added = Tokenizer.load(folder), Tokenizer.load(folder, add_special_tokens=True)
    assert as_lists(added, TEXTS) == [[0, *ids, 1] for ids in as_lists(plain, TEXTS)]


def test_megatron_core_gives_the_same_ids_with_the_options_named_for_it(hf: Path, spm: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    libraries = pytest.importorskip("megatron.core.tokenizers.text.libraries")
    from tokenizers.processors import TemplateProcessing

    with_template = hf_folder(
        tmp_path / "t", {"eos_token": "</s>", "bos_token": "<s>"},
        post_processor=TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
    )
    texts = [text for text in TEXTS if text]
    for folder in (hf, with_template):
        for include in (False, True):
            theirs = libraries.HuggingFaceTokenizer(str(folder), use_fast=True, include_special_tokens=include)
            ours = Tokenizer.load(folder, parse_special_tokens=True, add_special_tokens=include)
            assert as_lists(ours, texts) == [theirs.text_to_ids(text) for text in texts]
            assert (ours.eod, ours.vocab_size) == (theirs.eod, theirs.vocab_size)
    theirs = libraries.SentencePieceTokenizer(str(spm))
    ours = Tokenizer.load(spm)
    assert as_lists(ours, texts) == [theirs.text_to_ids(text) for text in texts]
    assert (ours.eod, ours.vocab_size) == (theirs.eod, theirs.vocab_size)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_megatron_core_gives_the_same_ids_of_its_tiktoken_list(hf: Path, tmp_path: Path, pattern: str) -> None:
    pytest.importorskip("tiktoken")
    libraries = pytest.importorskip("megatron.core.tokenizers.text.libraries")
    tokens = sorted(ranks_of(hf), key=lambda token: token if len(token) == 1 else b"\xff\xff")  # it wants bytes first
    file = megatron_ranks(tmp_path / "ranks.json", tokens)
    size = len(tokens) - 10 + 50
    theirs = libraries.TikTokenTokenizer(str(file), num_special_tokens=50, pattern=pattern, vocab_size=size)
    how = TiktokenSettings.of_megatron(f"megatron-{pattern}", num_special_tokens=50, vocab_size=size)
    ours = Tokenizer.load(file, tiktoken=how, parse_special_tokens=True)
    texts = [*TEXTS, "a <SPECIAL_12> b"]
    assert as_lists(ours, texts) == [theirs.text_to_ids(text) for text in texts]
    assert (ours.eod, ours.vocab_size) == (theirs.eod, theirs.vocab_size)


def test_options_that_a_kind_does_not_have_are_refused(spm: Path, ranks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="control pieces never come from text"):
        Tokenizer.load(spm, parse_special_tokens=True)
    with pytest.raises(ConfigError, match="nothing that add_special_tokens could add"):
        Tokenizer.load(ranks, tiktoken=GPT2, add_special_tokens=True)
    without_first = sentencepiece_model(tmp_path / "x.model", bos_id=-1)
    with pytest.raises(ConfigError, match="the model has none"):
        Tokenizer.load(without_first, add_special_tokens=True)


# --- end of document --------------------------------------------------------------------------------------------------


def test_the_end_of_document_is_what_the_folder_names(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, {"eos_token": {"content": "<s>", "lstrip": False}})
    assert (Tokenizer.load(folder).eod, Tokenizer.load(folder).eod_token) == (0, "<s>")
    assert Tokenizer.load(folder, "</s>").eod == 1
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer.load(folder).eod == 1
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.load(folder).eod_token == "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(FormatError, match="no token <stop> to end a document"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FormatError, match="not a JSON object"):
        Tokenizer.load(folder)


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


def test_a_model_without_an_end_needs_one_named(tmp_path: Path) -> None:
    file = sentencepiece_model(tmp_path / "x.model", eos_id=-1, user_defined_symbols=["<stop>"])
    with pytest.raises(FormatError, match="to end a document with"):
        Tokenizer.load(file)
    assert Tokenizer.load(file, "<stop>").decode([Tokenizer.load(file, "<stop>").eod]) == "<stop>"


# --- back to text -----------------------------------------------------------------------------------------------------


def test_ids_become_text_again_and_special_tokens_show_as_their_names(hf: Path, spm: Path, ranks: Path) -> None:
    for tokenizer in (Tokenizer.load(hf), Tokenizer.load(ranks, tiktoken=GPT2)):
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS
        (ids,) = tokenizer.encode(["one "])
        assert tokenizer.decode([*ids, tokenizer.eod]) == f"one {tokenizer.eod_token}"
    tokenizer = Tokenizer.load(spm)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(ALL_LINES)] == ALL_LINES
    one, two = tokenizer.encode(["one", "two"])
    assert tokenizer.decode([*one, tokenizer.eod, *two]) == "one</s>two"


def test_scripts_never_seen_have_a_spelling_where_there_is_byte_fallback(tmp_path: Path, hf: Path, spm: Path) -> None:
    unseen = ["ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "𒀀𒁀𒂀", "ꦗꦮ", "\U0001f9a4"]
    for tokenizer in (Tokenizer.load(hf), Tokenizer.load(spm)):
        assert tokenizer.model.unknown_id is None
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(unseen)] == unseen
    without = Tokenizer.load(sentencepiece_model(tmp_path / "x.model", byte_fallback=False))
    assert all(without.model.unknown_id in ids for ids in without.encode(unseen))


def test_half_a_character_is_refused_with_its_place(hf: Path, spm: Path, ranks: Path) -> None:
    for tokenizer in (Tokenizer.load(hf), Tokenizer.load(spm), Tokenizer.load(ranks, tiktoken=GPT2)):
        with pytest.raises(UnencodableTextError, match=r"text 1 .* U\+DC80 at character 3") as caught:
            tokenizer.encode(["good", "bad\udc80", "漢"])
        assert caught.value.index == 1


def test_what_tiktoken_gives_up_on_is_an_error_with_its_place(ranks: Path) -> None:
    with pytest.raises(UnencodableTextError, match="text 1 of the batch cannot be tokenised: tiktoken says"):
        Tokenizer.load(ranks, tiktoken=GPT2).encode(["fine", " " * 1_000_000])


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_stands_for_the_tokenizer_in_it(hf: Path, spm: Path, ranks: Path, tmp_path: Path) -> None:
    assert Tokenizer.load(hf).path == hf / "tokenizer.json"
    assert Tokenizer.load(spm.parent).kind == "sentencepiece"
    assert Tokenizer.load(ranks.parent, tiktoken=GPT2).kind == "tiktoken"
    # Llama 3 calls its rank file tokenizer.model: the content decides.
    (tmp_path / "tokenizer.model").write_bytes(ranks.read_bytes())
    assert Tokenizer.load(tmp_path, tiktoken=GPT2).kind == "tiktoken"
    with pytest.raises(FormatError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="does not exist, nor"):
        Tokenizer.load(tmp_path / "empty")


def test_the_hash_is_of_all_that_decides_ids(hf: Path, spm: Path, ranks: Path) -> None:
    for path in (hf / "tokenizer.json", spm):
        assert Tokenizer.load(path).sha256 == sha256(path.read_bytes()).hexdigest()
    settings_ = [
        GPT2, TiktokenSettings(split="cl100k", special_tokens=["<|endoftext|>", "</s>"]),
        TiktokenSettings(split="gpt2", special_tokens=["</s>", "<|endoftext|>"]),
        TiktokenSettings(split="gpt2", special_tokens=["<|endoftext|>", "</s>"], num_special_tokens=3),
    ]
    assert len({Tokenizer.load(ranks, tiktoken=item).sha256 for item in settings_}) == 4


def test_a_changed_tokenizer_is_refused(hf: Path, tmp_path: Path) -> None:
    changed = hf_folder(tmp_path)
    own = {"format": "megatron-xalign tokenizer", "version": 2, "sha256": "0" * 64, "eod_token": "</s>"}
    (changed / "manifest.json").write_text(json.dumps(own))
    with pytest.raises(FormatError, match="changed after it was trained"):
        Tokenizer.load(changed)
    (changed / "manifest.json").write_text(json.dumps(own | {"version": 3}))
    with pytest.raises(FormatError, match="version 1 or 2"):
        Tokenizer.load(changed)
    (changed / "manifest.json").write_text(json.dumps({key: own[key] for key in ("format", "version")}))
    with pytest.raises(FormatError, match="lacks sha256"):
        Tokenizer.load(changed)
    # Another tool's manifest says nothing about the tokenizer.
    (changed / "manifest.json").write_text('{"files": []}')
    assert Tokenizer.load(changed).eod_token == "<|endoftext|>"


def _ids_in_worker(tokenizer: Tokenizer, queue: Any) -> None:
    queue.put([ids.tolist() for ids in tokenizer.encode(ALL_LINES)])


def test_another_process_gets_the_same_tokenizer_or_an_error(hf: Path, ranks: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for tokenizer in (
        Tokenizer.load(hf, "<s>", parse_special_tokens=True), Tokenizer.load(ranks, tiktoken=GPT2)
    ):
        queue = context.Queue()
        process = context.Process(target=_ids_in_worker, args=(tokenizer, queue))
        process.start()
        assert queue.get(timeout=300) == as_lists(tokenizer, ALL_LINES)
        process.join(timeout=300)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert (again.eod, again.options, again.sha256) == (tokenizer.eod, tokenizer.options, tokenizer.sha256)
    folder = hf_folder(tmp_path)
    pickled = pickle.dumps(Tokenizer.load(folder))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(FormatError, match="changed while a job was using it"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[1]", b'{"model": 3}', b"\n", b"aGk= 0\n", b"aGk= x\n", b"\x0a\xff"]
)
def test_what_is_not_a_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError):
        Tokenizer.load(tmp_path, tiktoken=GPT2)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_gives_ids(
    hf: Path, spm: Path, ranks: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from([hf / "tokenizer.json", spm, ranks])).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged").write_bytes(content)
    try:
        tokenizer = Tokenizer.load(tmp_path / "damaged", tiktoken=GPT2)
        ids = tokenizer.encode(["some text 漢字"])[0]
    except (FormatError, ConfigError):
        return
    assert ids.size and ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_missing_library_is_named_with_the_way_to_install_it(
    kind: str, spm: Path, ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"pip install 'megatron-xalign\[{kind}\]'"):
        Tokenizer.load(spm if kind == "sentencepiece" else ranks, tiktoken=GPT2)


# --- rank files -------------------------------------------------------------------------------------------------------


def test_settings_come_from_a_file_beside_the_ranks_or_from_a_published_name(ranks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds ranks alone"):
        Tokenizer.load(ranks)
    file = tmp_path / "x.tiktoken"
    file.write_bytes(ranks.read_bytes())
    beside = tmp_path / "x.tiktoken.json"
    beside.write_text('{"split": "gpt2", "special_tokens": {"<s>": 4999, "</s>": 5000}, "end_of_document": "</s>"}')
    tokenizer = Tokenizer.load(file)
    assert (tokenizer.eod, tokenizer.vocab_size) == (5000, 5001)
    assert as_lists(tokenizer, TEXTS) == as_lists(Tokenizer.load(ranks, tiktoken=GPT2), TEXTS)
    beside.write_text('{"split": "gpt2", "colour": "red"}')
    with pytest.raises(FormatError, match="does not hold the settings"):
        Tokenizer.load(file)
    beside.write_text('{"split": "gpt5"}')
    with pytest.raises(ConfigError, match="split=gpt5 is unknown"):
        Tokenizer.load(file)
    published = tmp_path / "cl100k_base.tiktoken"
    published.write_bytes(ranks.read_bytes())
    assert Tokenizer.load(published).eod == 100257


def test_malformed_ranks_are_refused(hf: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokens = ranks_of(hf)
    file = tmp_path / "x.tiktoken"
    with pytest.raises(FormatError, match="no rank for the byte 0x41"):
        Tokenizer.load(tiktoken_file(file, [token for token in tokens if token != b"A"]), tiktoken=GPT2)
    with pytest.raises(FormatError, match="comes twice"):
        Tokenizer.load(tiktoken_file(file, [*tokens, tokens[7]]), tiktoken=GPT2)
    tiktoken_file(file, tokens).write_bytes(file.read_bytes() + b"not a rank\n")
    with pytest.raises(FormatError, match=f"line {len(tokens) + 1}"):
        Tokenizer.load(file, tiktoken=GPT2)
    with pytest.raises(ConfigError, match="id 12, which is the rank of ordinary text"):
        Tokenizer.load(
            tiktoken_file(file, tokens), tiktoken=TiktokenSettings(split="gpt2", special_tokens={"<|endoftext|>": 12})
        )
    with pytest.raises(ConfigError, match="3 special tokens do not fit"):
        Tokenizer.load(
            file, tiktoken=TiktokenSettings(split="gpt2", special_tokens=["a", "b", "</s>"], num_special_tokens=2)
        )
    with pytest.raises(ConfigError, match="vocab_size=10000 asks for"):
        Tokenizer.load(file, tiktoken=TiktokenSettings.of_megatron(vocab_size=10_000))

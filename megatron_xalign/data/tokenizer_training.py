"""Train a tokenizer on text of several languages and write its folder.

A tokenizer folder holds ``tokenizer.json`` (Hugging Face ``tokenizers``), ``manifest.json`` (its hash, size, special
tokens and fertility per language) and the two small files that ``transformers.AutoTokenizer`` wants.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_xalign import __version__
from megatron_xalign.data.fertility import fertility, ids_of_partial_characters
from megatron_xalign.data.split_patterns import PATTERNS, TRAINING_SPLITS, TrainingSplit
from megatron_xalign.data.tokenizer_models import TokenizersModel
from megatron_xalign.data.training_text import LanguageSample, balanced_texts, draw_texts, shares_of
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.atomic import sha256_of, whole_folder, write_json
from megatron_xalign.progress import track

END_OF_DOCUMENT = "<|endoftext|>"
"""Ends every document; id 0 in tokenizers trained here unless another is stated."""
SMALLEST_VOCABULARY = 257
"""256 bytes and the end of document."""
MANIFEST_FORMAT = "megatron-xalign tokenizer"
DEFAULT_TEMPERATURE = 10 / 3
"""XLM-R and mT5 weigh languages by size ** 0.3 too: of two languages of 100 to 1, the small one gets a fifth, not a
hundredth, and its few texts are not repeated a hundred times as for equal shares."""

_UNKNOWN = "<unk>"
_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
# Characters beyond this share of the text are spelt in bytes by the unigram model, as in SentencePiece.
_CHARACTER_COVERAGE = 0.9995
_RESERVED = "<|reserved_{}|>"

Model = Literal["bpe", "unigram"]
Texts = Mapping[str, Iterable[str]] | Iterable[tuple[str, str]]


def train_tokenizer(
    texts: Texts,
    out: str | Path,
    vocab_size: int,
    *,
    model: Model = "bpe",
    split: TrainingSplit = "gpt2",
    temperature: float = DEFAULT_TEMPERATURE,
    special_tokens: Sequence[str] | Mapping[str, int] = (END_OF_DOCUMENT,),
    end_of_document: str = END_OF_DOCUMENT,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    fill_vocab: bool = False,
    max_bytes_per_language: int = 200_000_000,
    seed: int = 0,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Train a tokenizer in which every text has a spelling, and write its folder.

    The same texts in the same order give the same bytes. Memory is bounded by ``max_bytes_per_language``, not by the
    corpus.

    Args:
        texts: texts of each language code, or (language, text) pairs in any order; read once.
        out: folder to write, whole or not at all; one already there is replaced.
        vocab_size: ids wanted, special ones too; a small corpus may give fewer.
        model: ``bpe`` (merges of frequent neighbours, over bytes) or ``unigram`` (most likely pieces, over characters,
            with rare characters spelt in bytes).
        split: name of the pattern that cuts text into words.
        temperature: a language weighs bytes ** (1 / temperature): 1 as the corpus has it, ``math.inf`` all the same.
        special_tokens: names, which get the first ids, or the id of each name. Where text is too little to learn
            all tokens before a stated id, reserved ones fill the gap.
        end_of_document: the one of them that ends a document.
        make_vocab_size_divisible_by: the model's embedding has a multiple of this times
            ``tensor_model_parallel_size`` rows, as Megatron pads it; the manifest states the number.
        tensor_model_parallel_size: of the training to come.
        fill_vocab: add reserved tokens so that the vocabulary is such a multiple itself.
        max_bytes_per_language: texts are drawn at random down to this much.
        seed: of that draw and of the order.
        details: further fields of the manifest; looked at when all texts have been read.

    Returns:
        ``out``.

    Raises:
        ConfigError: the vocabulary is too small, or special tokens contradict one another or the text.
        CorpusError: a language has no text.
    """
    if model not in ("bpe", "unigram"):
        raise ConfigError(f"model={model} is neither bpe nor unigram.")
    if split not in TRAINING_SPLITS:
        raise ConfigError(f"split={split} is unknown; one of {', '.join(TRAINING_SPLITS)} is right.")
    if not temperature >= 1:
        raise ConfigError(f"temperature={temperature} is below 1, which would favour large languages even more.")
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    if multiple < 1:
        raise ConfigError(
            f"make_vocab_size_divisible_by={make_vocab_size_divisible_by} and "
            f"tensor_model_parallel_size={tensor_model_parallel_size} must be at least 1."
        )
    stated = _stated_ids(special_tokens, end_of_document, model)
    name, last = max(stated.items(), key=lambda item: item[1])
    if last >= vocab_size:
        raise ConfigError(f"special token {name} is to be id {last}, beyond the ids of vocab_size={vocab_size}.")
    learnt_size = vocab_size - len(stated) - (1 + len(_BYTE_PIECES) if model == "unigram" else 0)
    smallest = vocab_size - learnt_size + (256 if model == "bpe" else 1)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size={vocab_size} is below {smallest}: 256 bytes, {len(stated)} special token(s)"
            + (", the unknown piece and a learnt one." if model == "unigram" else ".")
        )
    samples = draw_texts(_with_languages(texts), max_bytes_per_language, seed)
    if not samples:
        raise CorpusError("there is no text to train a tokenizer on.")
    for language, sample in samples.items():
        if not sample.num_bytes:
            raise CorpusError(f"there is no {language} text to train a tokenizer on.")
    shares = shares_of({language: sample.bytes_read for language, sample in samples.items()}, temperature)
    training_texts, training_bytes = balanced_texts(samples, shares, seed)

    train = _train_bpe if model == "bpe" else _train_unigram
    engine = train(training_texts, learnt_size, split, stated, multiple if fill_vocab else 1)
    with whole_folder(out) as folder:
        file = folder / "tokenizer.json"
        engine.save(str(file))
        trained = TokenizersModel(file.read_bytes(), parse_special_tokens=False, add_special_tokens=False)
        partial = ids_of_partial_characters(trained)
        names = {"eos_token": end_of_document, "pad_token": _pad_token(stated, end_of_document)}
        if model == "unigram":
            names["unk_token"] = _UNKNOWN
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False},
        )
        write_json(folder / "special_tokens_map.json", names)
        write_json(
            folder / "manifest.json",
            {
                "format": MANIFEST_FORMAT,
                "version": 2,
                "model": model,
                "split": split,
                "sha256": sha256_of(file),
                "vocab_size": trained.vocab_size,
                "asked_vocab_size": vocab_size,
                "padded_vocab": {
                    "size": -(-trained.vocab_size // multiple) * multiple,
                    "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
                    "tensor_model_parallel_size": tensor_model_parallel_size,
                },
                "eod": trained.id_of(end_of_document),
                "eod_token": end_of_document,
                "special_tokens": stated,
                "temperature": temperature if math.isfinite(temperature) else "inf",
                "max_bytes_per_language": max_bytes_per_language,
                "seed": seed,
                "languages": _report(trained, samples, training_bytes, partial),
                **(details or {}),
                "library": trained.library,
                "package_version": __version__,
            },
        )
    return Path(out)


def _with_languages(texts: Texts) -> Iterator[tuple[str, str]]:
    """(language, text) pairs; a language without any text still appears, with an empty one."""
    if not isinstance(texts, Mapping):
        yield from track(texts, "read text", " texts")
        return
    for language, items in texts.items():
        yield language, ""
        for text in track(items, f"read {language}", " texts"):
            yield language, text


def _stated_ids(special_tokens: Sequence[str] | Mapping[str, int], end: str, model: Model) -> dict[str, int]:
    """Id of each special token, in order of id."""
    if isinstance(special_tokens, str):
        raise ValueError("special_tokens is one string; a list of names, or ids by name, is expected.")
    names = list(special_tokens)
    ids = dict(special_tokens) if isinstance(special_tokens, Mapping) else {name: i for i, name in enumerate(names)}
    if len(ids) != len(names):
        raise ConfigError(f"special tokens {', '.join(names)} hold a name twice.")
    if end not in ids:
        raise ConfigError(f"end_of_document={end} is not among the special tokens ({', '.join(names)}).")
    if any(index < 0 for index in ids.values()) or len(set(ids.values())) != len(ids):
        raise ConfigError(f"special token ids {ids} are not different numbers from 0 on.")
    taken = {"", *(_RESERVED.format(index) for index in range(10))}
    taken |= {_UNKNOWN, *_BYTE_PIECES} if model == "unigram" else set()
    for name in names:
        if name in taken or name != name.strip():
            raise ConfigError(f"special token {name!r} is empty, reserved, or has white space around it.")
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _pad_token(stated: Mapping[str, int], end: str) -> str:
    return next((name for name in stated if re.fullmatch(r"<\|?pad\|?>", name)), end)


def _train_bpe(texts: list[str], size: int, split: str, stated: dict[str, int], multiple: int) -> Any:
    """Merges of bytes; returns the finished ``tokenizers.Tokenizer``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = _words(split, of_bytes=True)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    engine.train_from_iterator(track(texts, "train bpe tokenizer", " texts", len(texts)), trainer, len(texts))
    tree = json.loads(engine.to_str())
    vocab: dict[str, int] = tree["model"]["vocab"]
    tokens, reserved = _in_place(sorted(vocab, key=vocab.__getitem__), stated, multiple)
    tree["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    return _with_special_tokens(tree, [*stated, *reserved])


def _train_unigram(texts: list[str], size: int, split: str, stated: dict[str, int], multiple: int) -> Any:
    """Likely pieces of characters, and bytes for rare ones; returns the finished ``tokenizers.Tokenizer``."""
    from tokenizers import Tokenizer, decoders, models, trainers

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    rare = _rare_characters(counts, max(size // 2, 1))
    engine = Tokenizer(models.Unigram())
    engine.pre_tokenizer = _words(split, of_bytes=False)
    # No piece may hold a rare character: text is cut there.
    cut = re.compile(f"[{''.join(map(re.escape, rare))}]+" if rare else r"(?!)")
    pieces = (piece for text in texts for piece in cut.split(text) if piece)
    trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False)
    engine.train_from_iterator(track(pieces, "train unigram tokenizer", " texts"), trainer)
    scores = _same_every_time(json.loads(engine.to_str())["model"]["vocab"], counts)
    lowest = min(scores.values(), default=0.0)
    learnt = sorted(scores, key=lambda piece: (-scores[piece], piece))
    tokens, reserved = _in_place([_UNKNOWN, *_BYTE_PIECES, *learnt], stated, multiple)
    # A byte's piece never comes from text that spells it: every pattern cuts <0x41> apart.
    finished = Tokenizer(
        models.Unigram(
            [(token, scores.get(token, lowest)) for token in tokens], tokens.index(_UNKNOWN), byte_fallback=True
        )
    )
    finished.pre_tokenizer = engine.pre_tokenizer
    finished.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _with_special_tokens(json.loads(finished.to_str()), [*stated, *reserved])


def _words(split: str, *, of_bytes: bool) -> Any:
    """What cuts text into words, and, for bytes, writes each byte as a letter."""
    from tokenizers import Regex, pre_tokenizers

    if of_bytes and split == "gpt2":
        # The library's own form of that pattern: the same cuts, a little faster, and known to every reader.
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = pre_tokenizers.Split(Regex(PATTERNS[split]), behavior="isolated")
    if not of_bytes:
        return cut
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _in_place(learnt: list[str], stated: Mapping[str, int], multiple: int) -> tuple[list[str], list[str]]:
    """All tokens by id: special ones at their stated ids, learnt ones in order between them, reserved ones in gaps.

    Returns:
        The tokens, and the reserved ones among them.
    """
    for name in stated:
        if name in learnt:
            raise ConfigError(
                f"special token {name!r} is also a piece of ordinary text; write it so that no text has it, like "
                f"<|{name}|>."
            )
    size = max(len(learnt) + len(stated), max(stated.values()) + 1)
    size = -(-size // multiple) * multiple
    name_of = {index: name for name, index in stated.items()}
    rest = iter(learnt)
    tokens: list[str] = []
    reserved: list[str] = []
    for index in range(size):
        token = name_of.get(index) or next(rest, None)
        if token is None:
            token = _RESERVED.format(len(reserved))
            reserved.append(token)
        tokens.append(token)
    return tokens, reserved


def _with_special_tokens(tree: dict[str, Any], names: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer

    engine = Tokenizer.from_str(json.dumps(tree))
    engine.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return engine


def _rare_characters(counts: Counter[str], most: int) -> list[str]:
    """Characters to spell in bytes: all after ``most``, and those beyond the coverage."""
    total = counts.total()
    covered = 0
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    for place, character in enumerate(ranked):
        if place >= most or covered >= _CHARACTER_COVERAGE * total:
            return ranked[place:]
        covered += counts[character]
    return []


def _same_every_time(pieces: list[list[Any]], counts: Counter[str]) -> dict[str, float]:
    """Scores of a trained unigram model without what the trainer leaves to chance.

    Its sums run in hash order, so scores differ in the last digits; and characters that it learnt no score for get the
    lowest score plus 0, 0.0001, 0.0002, ... in random order. Scores are rounded, and those characters take theirs in
    order of their counts.
    """
    scores = {piece: round(score, 9) for piece, score in pieces}
    lowest = min(scores.values())
    steps = {piece: (score - lowest) * 1e4 for piece, score in scores.items() if len(piece) == 1}
    unscored = [piece for piece, step in steps.items() if step < len(steps) and abs(step - round(step)) < 1e-3]
    free = sorted((scores[piece] for piece in unscored), reverse=True)
    unscored.sort(key=lambda character: (-counts[character], character))
    return scores | dict(zip(unscored, free, strict=True))


def _report(
    trained: TokenizersModel, samples: Mapping[str, LanguageSample], training_bytes: Mapping[str, int],
    partial: frozenset[int],
) -> dict[str, dict[str, Any]]:
    """What was read, drawn and measured, by language."""
    drawn = sum(training_bytes.values())
    read = sum(sample.bytes_read for sample in samples.values())
    return {
        language: {
            "texts_read": sample.texts_read,
            "bytes_read": sample.bytes_read,
            "bytes_drawn": sample.num_bytes,
            "share_of_corpus": round(sample.bytes_read / read, 6),
            "share_of_training_bytes": round(training_bytes[language] / drawn, 6),
            "held_out": bool(sample.held_out),
            **fertility(trained, sample.held_out or sample.texts[:10_000], partial),
        }
        for language, sample in samples.items()
    }

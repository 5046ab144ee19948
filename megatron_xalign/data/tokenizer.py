"""Train a tokenizer on the corpus, load it again, and count how many tokens it takes per word.

A tokenizer is a folder: ``tokenizer.json`` (Hugging Face ``tokenizers``), ``manifest.json`` (its hash, size,
end-of-document id and fertility) and the two small files that ``transformers.AutoTokenizer`` wants.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_xalign import __version__
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, whole_folder, write_json
from megatron_xalign.formats.token_file import check_same_tokenizer
from megatron_xalign.progress import track

if TYPE_CHECKING:
    import tokenizers

__all__ = ["END_OF_DOCUMENT", "Tokenizer", "check_same_tokenizer", "train_tokenizer"]

END_OF_DOCUMENT = "<|endoftext|>"
"""Ends every document; id 0 in tokenizers trained here."""
SMALLEST_VOCABULARY = 257
"""256 bytes and the end of document."""

# Where a ready-made tokenizer.json does not say which token ends a document.
_USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# The split of Llama 3 (words with the one character before them, digits in threes), but for one thing: there a line
# break joins the punctuation before it. Here it stands apart, so the sides of a pair, tokenised each by itself around a
# line break, have the tokens that the whole text has, and a prompt "source.\\n" ends in tokens seen in training.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FORMAT = "megatron-xalign tokenizer"


class Tokenizer:
    """A tokenizer ready for use: text to ids and back."""

    def __init__(self, engine: tokenizers.Tokenizer, eod: int, sha256: str, path: Path) -> None:
        # Text that spells a special token is text: a document must not be able to end itself.
        engine.encode_special_tokens = True
        self._engine = engine
        self.eod = eod
        """Id of the end-of-document token."""
        self.sha256 = sha256
        """Hash of ``tokenizer.json``."""
        self.path = path
        """The ``tokenizer.json`` it was read from."""
        self.vocab_size: int = max(engine.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id."""

    @classmethod
    def load(cls, path: str | Path, end_of_document: str | None = None) -> Tokenizer:
        """Load a folder written by :func:`train_tokenizer`, or any ``tokenizer.json``.

        Args:
            path: folder or file.
            end_of_document: token that ends a document; of our folders it is known, of others it is guessed from the
                usual names.

        Raises:
            FormatError: missing, unreadable, changed since its manifest was written, or without such a token.
        """
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FormatError(f"{file} does not exist; name a tokenizer.json or the folder that holds one.")
        sha256 = sha256_of(file)
        try:
            engine = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise FormatError(f"{file} is not a tokenizer of the tokenizers library: {error}.") from None
        manifest_path = file.with_name("manifest.json")
        if manifest_path.exists():
            manifest = _read_tokenizer_manifest(manifest_path)
            if manifest["sha256"] != sha256:
                raise FormatError(
                    f"{file} has SHA-256 {sha256}; its manifest says {manifest['sha256']}. It was changed after it was "
                    "trained: token files made with it no longer fit."
                )
            end_of_document = end_of_document or manifest["eod_token"]
        names = (end_of_document,) if end_of_document else _USUAL_ENDS
        eod = next((found for name in names if (found := engine.token_to_id(name)) is not None), None)
        if eod is None:
            raise FormatError(f"{file} has no token {' or '.join(names)} to end a document with; name its own.")
        return cls(engine, eod, sha256, file)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [T_i], without special tokens; many texts at once use all cores."""
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; special tokens show as their names."""
        return self._engine.decode([int(token) for token in ids], skip_special_tokens=False)


def train_tokenizer(
    texts_by_language: Mapping[str, Iterable[str]],
    out: str | Path,
    vocab_size: int,
    *,
    model: Literal["bpe", "unigram"] = "bpe",
    balance: float = 0.3,
    max_bytes_per_language: int = 200_000_000,
    seed: int = 0,
) -> Path:
    """Train a byte-level tokenizer, in which every text has a spelling, and write its folder.

    Args:
        texts_by_language: texts of each language code.
        out: folder to write, whole or not at all; one already there is replaced.
        vocab_size: ids wanted, at least 257; a small corpus may give fewer.
        model: ``bpe`` (merges of frequent neighbours) or ``unigram`` (most likely pieces), both over bytes.
        balance: a language weighs bytes ** balance: 1 as the corpus has it, 0 all the same.
        max_bytes_per_language: texts are drawn at random down to this much.
        seed: of that draw and of the order.

    Returns:
        ``out``.

    Raises:
        ConfigError: the vocabulary is too small.
        CorpusError: a language has no text.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size={vocab_size} is below {SMALLEST_VOCABULARY}: 256 bytes and the end of document.")
    if model not in ("bpe", "unigram"):
        raise ConfigError(f"model={model} is neither bpe nor unigram.")
    if not 0.0 <= balance <= 1.0:
        raise ConfigError(f"balance={balance} is outside [0, 1].")
    if not texts_by_language:
        raise ValueError("texts_by_language is empty.")
    samples = {
        language: _sample(track(texts, f"read {language}", " texts"), max_bytes_per_language, seed)
        for language, texts in texts_by_language.items()
    }
    sizes = {language: _num_bytes(texts) for language, texts in samples.items()}
    for language, size in sizes.items():
        if not size:
            raise CorpusError(f"there is no {language} text to train a tokenizer on.")
    training_texts, shares = _balanced(samples, sizes, balance, seed)

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine = Engine(models.BPE() if model == "bpe" else models.Unigram())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {
        "vocab_size": vocab_size, "special_tokens": [END_OF_DOCUMENT], "initial_alphabet": sorted(alphabet),
        "show_progress": False,
    }
    trainer = trainers.BpeTrainer(**options) if model == "bpe" else trainers.UnigramTrainer(**options)
    engine.train_from_iterator(
        track(training_texts, f"train {model} tokenizer", " texts", len(training_texts)), trainer, len(training_texts)
    )
    if model == "unigram":
        engine.model = _same_every_time(engine)
    with whole_folder(out) as folder:
        engine.save(str(folder / "tokenizer.json"))
        trained = Tokenizer.load(folder / "tokenizer.json", END_OF_DOCUMENT)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END_OF_DOCUMENT,
                "pad_token": END_OF_DOCUMENT,
                "clean_up_tokenization_spaces": False,
            },
        )
        write_json(folder / "special_tokens_map.json", {"eos_token": END_OF_DOCUMENT, "pad_token": END_OF_DOCUMENT})
        write_json(
            folder / "manifest.json",
            {
                "format": _FORMAT,
                "version": 1,
                "model": model,
                "sha256": trained.sha256,
                "vocab_size": trained.vocab_size,
                "asked_vocab_size": vocab_size,
                "eod": trained.eod,
                "eod_token": END_OF_DOCUMENT,
                "balance": balance,
                "seed": seed,
                "languages": {
                    language: {"share_of_training_bytes": shares[language], **fertility(trained, texts)}
                    for language, texts in samples.items()
                },
                "package_version": __version__,
            },
        )
    return Path(out)


def fertility(tokenizer: Tokenizer, texts: Sequence[str], max_texts: int = 10_000) -> dict[str, Any]:
    """How finely a tokenizer cuts texts: tokens per word (of whitespace) and per character.

    Args:
        tokenizer: the tokenizer.
        texts: some texts of one language; the first ``max_texts`` are counted.
        max_texts: bounds the time.

    Returns:
        ``texts, words, characters, tokens, tokens_per_word, tokens_per_character``.
    """
    texts = texts[:max_texts]
    words = sum(len(text.split()) for text in texts)
    characters = sum(map(len, texts))
    tokens = sum(ids.size for ids in tokenizer.encode(texts))
    return {
        "texts": len(texts),
        "words": words,
        "characters": characters,
        "tokens": tokens,
        "tokens_per_word": round(tokens / max(words, 1), 4),
        "tokens_per_character": round(tokens / max(characters, 1), 4),
    }


def _same_every_time(engine: tokenizers.Tokenizer) -> tokenizers.models.Unigram:
    """The trained unigram model without what the trainer leaves to chance.

    Its sums run in hash order, so scores differ in the last digits; and bytes that it learnt no score for get the
    lowest score plus 0, 0.0001, 0.0002, ... in random order. Scores are rounded, and those bytes take theirs in order.
    """
    from tokenizers import models

    pieces = [(piece, round(score, 9)) for piece, score in json.loads(engine.to_str())["model"]["vocab"]]
    special, learnt = pieces[:1], dict(pieces[1:])
    lowest = min(learnt.values())
    steps = {piece: (score - lowest) * 1e4 for piece, score in learnt.items() if len(piece) == 1}
    unscored = sorted(piece for piece, step in steps.items() if step < 256 and abs(step - round(step)) < 1e-3)
    scores = sorted((learnt[piece] for piece in unscored), reverse=True)
    learnt.update(zip(unscored, scores, strict=True))
    return models.Unigram([*special, *sorted(learnt.items(), key=lambda item: (-item[1], item[0]))])


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Texts in random order, a uniform draw of them if they exceed ``max_bytes``; memory stays near ``max_bytes``."""
    rng = random.Random(seed)
    heap: list[tuple[float, str]] = []
    total = 0
    for text in texts:
        if not text:
            continue
        # The texts with the smallest random numbers stay.
        heapq.heappush(heap, (-rng.random(), text))
        total += len(text.encode("utf-8"))
        while total > max_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1].encode("utf-8"))
    return [text for _, text in sorted(heap, reverse=True)]


def _balanced(
    samples: Mapping[str, list[str]], sizes: Mapping[str, int], balance: float, seed: int
) -> tuple[list[str], dict[str, float]]:
    """Texts repeated or left out so that languages weigh size ** balance, and the shares that came out."""
    total = sum(sizes.values())
    weights = {language: float(size) ** balance for language, size in sizes.items()}
    drawn: list[str] = []
    drawn_bytes = {}
    for language, texts in samples.items():
        wanted = total * weights[language] / sum(weights.values())
        taken, index = 0, 0
        while taken < wanted:
            text = texts[index % len(texts)]
            drawn.append(text)
            taken += len(text.encode("utf-8"))
            index += 1
        drawn_bytes[language] = taken
    random.Random(seed).shuffle(drawn)
    return drawn, {language: round(taken / sum(drawn_bytes.values()), 4) for language, taken in drawn_bytes.items()}


def _read_tokenizer_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT or manifest.get("version") != 1:
        raise FormatError(f"{path} is not the manifest of a tokenizer of version 1.")
    if not isinstance(manifest.get("sha256"), str) or not isinstance(manifest.get("eod_token"), str):
        raise FormatError(f"{path} lacks sha256 or eod_token.")
    return manifest

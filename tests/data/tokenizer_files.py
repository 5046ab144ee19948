"""Small tokenizers of every kind, made by the libraries themselves."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from multilingual import ALL_LINES


def hf_folder(path: Path, config: dict[str, Any] | None = None, **parts: Any) -> Path:
    """A Hugging Face folder: byte-level BPE with two special tokens, and what else is named (normalizer, ...)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = parts.pop("pre_tokenizer", None) or pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(engine, name, part)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    engine.train_from_iterator(ALL_LINES, trainer)
    path.mkdir(parents=True, exist_ok=True)
    engine.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config), encoding="utf-8"
        )
    return path


def sentencepiece_model(path: Path, texts: Sequence[str] = ALL_LINES, **options: Any) -> Path:
    """A SentencePiece ``.model``; byte fallback unless told otherwise."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings = {
        "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2,
        "character_coverage": 0.98,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **settings | options
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def ranks_of(folder: Path) -> list[bytes]:
    """Byte strings of a byte-level BPE's tokens, in order of rank; special tokens left out."""
    vocab: dict[str, int] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + place): byte for place, byte in enumerate(b for b in range(256) if b not in printable)}
    ordinary = sorted(vocab.keys() - {"<s>", "</s>", "<|endoftext|>"}, key=vocab.__getitem__)
    return [bytes(letters[letter] for letter in token) for token in ordinary]


def tiktoken_file(path: Path, ranks: list[bytes]) -> Path:
    """A ``.tiktoken`` rank file."""
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    return path


def megatron_ranks(path: Path, ranks: list[bytes]) -> Path:
    """The JSON list that Megatron-LM's TikTokenizer reads."""
    items = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("utf-8", "replace")}
        for rank, token in enumerate(ranks)
    ]
    path.write_text(json.dumps(items), encoding="utf-8")
    return path

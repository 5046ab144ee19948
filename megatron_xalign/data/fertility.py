"""How finely a tokenizer cuts a language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_xalign.data.tokenizer_models import TokenModel


def fertility(model: TokenModel, texts: Sequence[str], byte_ids: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Tokens per word, per character and per byte of some texts, and how much of them has no spelling.

    Words are what stands between white space; where a language writes none (Chinese, Japanese, Thai), only the figures
    per character and byte mean something.

    Args:
        model: the tokenizer's model, as ``Tokenizer.model`` holds it.
        texts: texts of one language.
        byte_ids: ids that spell a part of a character, as :func:`ids_of_partial_characters` finds them.

    Returns:
        ``texts, words, characters, bytes, tokens, tokens_per_word, tokens_per_character, bytes_per_token,
        unknown_rate`` (share of tokens that stand for text without a spelling) and ``byte_rate`` (share of tokens that
        are bytes of characters the vocabulary lacks).
    """
    ids_T, _ = model.encode_flat(texts)
    words = sum(len(text.split()) for text in texts)
    characters = sum(map(len, texts))
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    unknown = 0 if model.unknown_id is None else int((ids_T == model.unknown_id).sum())
    single_bytes = int(np.isin(ids_T, sorted(byte_ids)).sum()) if byte_ids else 0
    return {
        "texts": len(texts),
        "words": words,
        "characters": characters,
        "bytes": num_bytes,
        "tokens": ids_T.size,
        "tokens_per_word": round(ids_T.size / max(words, 1), 4),
        "tokens_per_character": round(ids_T.size / max(characters, 1), 4),
        "bytes_per_token": round(num_bytes / max(ids_T.size, 1), 4),
        "unknown_rate": round(unknown / max(ids_T.size, 1), 6),
        "byte_rate": round(single_bytes / max(ids_T.size, 1), 6),
    }


def ids_of_partial_characters(model: TokenModel) -> frozenset[int]:
    """Ids whose token is bytes and not whole characters: a script that is spelt with many of them is poorly covered.

    Those are the byte pieces of a model that falls back to bytes, and, where all tokens are made of bytes, those that
    are not UTF-8 by themselves.
    """
    return frozenset(token for token in range(model.vocab_size) if model.spells_part_of_character(token))

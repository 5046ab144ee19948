"""Named patterns that cut text into the words a byte-pair encoding works on, as regular expressions.

A token never crosses a cut, so the pattern decides what tokens can be. The names are those of the vocabularies that
made the patterns known; the expressions are read by ``tokenizers`` and ``tiktoken`` alike.
"""

from __future__ import annotations

from typing import Literal, get_args

TrainingSplit = Literal["gpt2", "llama3", "o200k", "llama3-lines"]
"""Patterns a tokenizer can be trained with.

``gpt2``: words with the space before them, digits in any number; a line break stands apart from what precedes it.
``llama3``: words with any one character before them, digits in threes; punctuation takes the line breaks after it.
``o200k``: like ``llama3``, but vowel signs and other combining marks stay with their letters (Hindi, Tamil, vocalised
Arabic), and a change from lower to upper case is a cut.
``llama3-lines``: like ``llama3``, but line breaks stand apart from punctuation.
"""
TRAINING_SPLITS: tuple[TrainingSplit, ...] = get_args(TrainingSplit)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A word of o200k: capitals, then small letters; scripts without case count as both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{end}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{end}}"

PATTERNS: dict[str, str] = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": _LLAMA3,
    "llama3-lines": _LLAMA3.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}]+"),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "o200k": (
        _CASED_WORDS.replace("{end}", _CONTRACTIONS + "?")
        + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # The two that Megatron-LM's TikTokenizer knows as v1 and v2.
    "megatron-v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "megatron-v2": (
        _CASED_WORDS.replace("{end}", "")
        + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Expression of each name."""

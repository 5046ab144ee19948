"""Rank files of tiktoken: the ids of byte strings, and nothing else.

Which pattern cuts the text, and which special tokens there are, a rank file does not say. It comes from the caller,
from a ``NAME.tiktoken.json`` beside the file (``{"split": "o200k", "special_tokens": {"<|endoftext|>": 199999}}``), or
from the file's name where that is a published one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xalign.data.split_patterns import PATTERNS
from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.atomic import read_json

_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?$")
_MEGATRON_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


@dataclass(frozen=True, kw_only=True)
class TiktokenSettings:
    """What turns ranks into a tokenizer."""

    split: str
    """Name of a pattern in :data:`~megatron_xalign.data.split_patterns.PATTERNS`."""
    special_tokens: Mapping[str, int] | Sequence[str] = ()
    """Their ids; names alone take the first ids where ``num_special_tokens`` leaves room, else those after ranks."""
    num_special_tokens: int = 0
    """Ids before the first rank, which are ranks plus this many; unnamed ones are called ``<SPECIAL_n>``."""
    vocab_size: int | None = None
    """Ids in all; of the ranks only those that fit are used."""
    end_of_document: str | None = None
    """Token that ends a document."""

    def __post_init__(self) -> None:
        if self.split not in PATTERNS:
            raise ConfigError(f"split={self.split} is unknown; one of {', '.join(PATTERNS)} is right.")
        if self.num_special_tokens < 0:
            raise ConfigError(f"num_special_tokens={self.num_special_tokens} is negative.")
        if not isinstance(self.special_tokens, Mapping) and len(set(self.special_tokens)) != len(self.special_tokens):
            raise ConfigError("special_tokens holds a name twice.")

    @classmethod
    def of_megatron(
        cls, split: str = "megatron-v2", special_tokens: Sequence[str] | None = None,
        num_special_tokens: int = 1000, vocab_size: int = 2**17,
    ) -> TiktokenSettings:
        """The settings of Megatron-LM's ``TikTokenizer``, with its defaults."""
        return cls(
            split=split, special_tokens=_MEGATRON_SPECIAL_TOKENS if special_tokens is None else special_tokens,
            num_special_tokens=num_special_tokens, vocab_size=vocab_size, end_of_document="</s>",
        )

    @property
    def pattern(self) -> str:
        """The expression ``split`` names."""
        return PATTERNS[self.split]

    def shifted(self, ranks: dict[bytes, int]) -> dict[bytes, int]:
        """Ids of the byte strings: ranks that fit, plus the ids before them."""
        limit = None if self.vocab_size is None else self.vocab_size - self.num_special_tokens
        if limit is not None and len(ranks) < limit and self.num_special_tokens:
            raise ConfigError(
                f"vocab_size={self.vocab_size} asks for {limit} ranks beside {self.num_special_tokens} special tokens; "
                f"the file has {len(ranks)}."
            )
        return {
            token: rank + self.num_special_tokens for token, rank in ranks.items() if limit is None or rank < limit
        }

    def special_ids(self, ids: Mapping[bytes, int]) -> dict[str, int]:
        """Id of each special token, beside the ids of the byte strings."""
        if isinstance(self.special_tokens, Mapping):
            taken = set(ids.values()) & set(self.special_tokens.values())
            if taken:
                raise ConfigError(f"special_tokens states id {min(taken)}, which is the rank of ordinary text.")
            return dict(self.special_tokens)
        names = list(self.special_tokens)
        if not self.num_special_tokens:
            return {name: max(ids.values()) + 1 + index for index, name in enumerate(names)}
        if len(names) > self.num_special_tokens:
            raise ConfigError(
                f"{len(names)} special tokens do not fit into num_special_tokens={self.num_special_tokens}."
            )
        names += [f"<SPECIAL_{index}>" for index in range(len(names), self.num_special_tokens)]
        return {name: index for index, name in enumerate(names)}

    def sha256(self, ranks_sha256: str) -> str:
        """Hash of all that decides the ids."""
        special = self.special_tokens
        what = {
            "ranks": ranks_sha256, "pattern": self.pattern, "num_special_tokens": self.num_special_tokens,
            "special_tokens": sorted(special.items()) if isinstance(special, Mapping) else list(special),
            "vocab_size": self.vocab_size,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


_PUBLISHED = {
    "r50k_base": TiktokenSettings(split="gpt2", special_tokens={"<|endoftext|>": 50256}),
    "cl100k_base": TiktokenSettings(
        split="cl100k",
        special_tokens={
            "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": TiktokenSettings(split="o200k", special_tokens={"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def looks_like_ranks(data: bytes) -> bool:
    """Whether bytes are lines of base64 and a number, or a JSON list (Megatron-LM's form)."""
    return bool(_RANK.match(data[:100_000].split(b"\n", 1)[0])) or data.lstrip()[:1] == b"["


def settings_of(file: Path) -> TiktokenSettings:
    """Settings beside a rank file, or those its name stands for.

    Raises:
        ConfigError: there are none.
        FormatError: the settings beside it are malformed.
    """
    beside = file.with_name(f"{file.name}.json")
    if beside.is_file():
        tree: Any = read_json(beside)
        try:
            return TiktokenSettings(**tree)
        except TypeError as error:
            raise FormatError(f"{beside} does not hold the settings of a rank file: {error}.") from None
    if file.stem in _PUBLISHED:
        return _PUBLISHED[file.stem]
    raise ConfigError(
        f"{file} holds ranks alone. Say in {beside} how text is cut and which special tokens there are: "
        f'{{"split": NAME, "special_tokens": {{"<|endoftext|>": ID}}}}, NAME being one of {", ".join(PATTERNS)}.'
    )


def read_ranks(data: bytes, file: Path) -> dict[bytes, int]:
    """Rank of each byte string.

    Raises:
        FormatError: a line is malformed, a rank or string comes twice, or a single byte is missing.
    """
    entries = _entries_of_list(data, file) if data.lstrip()[:1] == b"[" else _entries_of_lines(data, file)
    ranks = dict(entries)
    if not len(ranks) == len(set(ranks.values())) == len(entries):
        raise FormatError(f"{file}: a rank or a token comes twice.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FormatError(f"{file} has no rank for the byte 0x{missing[0]:02X}; texts with it would have no ids.")
    return ranks


def _entries_of_lines(data: bytes, file: Path) -> list[tuple[bytes, int]]:
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if not _RANK.match(line):
            raise FormatError(f"{file}, line {number}: not a base64 token and its rank.")
        token, rank = line.split()
        try:
            entries.append((base64.b64decode(token, validate=True), int(rank)))
        except binascii.Error as error:
            raise FormatError(f"{file}, line {number}: {error}.") from None
    return entries


def _entries_of_list(data: bytes, file: Path) -> list[tuple[bytes, int]]:
    try:
        return [(base64.b64decode(item["token_bytes"], validate=True), int(item["rank"])) for item in json.loads(data)]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{file} is not a list of objects with rank and token_bytes: {error!r}.") from None

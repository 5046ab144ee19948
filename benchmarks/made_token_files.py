"""Token files for benchmarks: documents of given lengths, of random tokens or of none that take room on the disk."""

# D documents, S spans

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_xalign import __version__
from megatron_xalign.formats.atomic import sha256_of, write_json
from megatron_xalign.formats.token_file import TokenFileWriter, companion

EOD = 0
VOCAB_SIZE = 50_304
_CHUNK = 1 << 20


@dataclass(frozen=True)
class MadeTokenizer:
    """What a token file needs to know of a tokenizer."""

    sha256: str = hashlib.sha256(b"made for benchmarks").hexdigest()
    vocab_size: int = VOCAB_SIZE
    eod: int = EOD


def lognormal_lengths(num_documents: int, mean_tokens: float, seed: int) -> np.ndarray:
    """int32 [D]: lengths of documents as they are in crawled text, end-of-document token included."""
    sigma = 1.0
    drawn = np.random.default_rng(seed).lognormal(np.log(mean_tokens) - sigma**2 / 2, sigma, num_documents)
    return np.maximum(drawn, 2).astype(np.int32)


def write_random(prefix: Path, lengths_D: np.ndarray, languages: list[str], seed: int) -> None:
    """A token file of random tokens; with two languages, pairs: a side, a template token, the other side, the end."""
    random = np.random.default_rng(seed)
    origin = "parallel" if len(languages) == 2 else "monolingual"
    with TokenFileWriter(prefix, tokenizer=MadeTokenizer(), origin=origin, languages=languages) as writer:
        for begin in range(0, len(lengths_D), 1 << 16):
            lengths = lengths_D[begin : begin + (1 << 16)].astype(np.int64)
            if origin == "parallel":
                lengths = np.maximum(lengths, 4)
            ends = np.cumsum(lengths)
            tokens = random.integers(1, VOCAB_SIZE, int(ends[-1]), dtype=np.uint16)
            tokens[ends - 1] = EOD
            starts = ends - lengths
            if origin == "parallel":
                half = np.maximum((lengths - 2) // 2, 1)
                span_ends = np.stack([starts + half, starts + half + 1, ends - 1, ends], axis=1)
                spoken = np.tile(np.array([0, -1, 1, -1]), len(lengths))
            else:
                span_ends = np.stack([ends - 1, ends], axis=1)
                spoken = np.tile(np.array([0, -1]), len(lengths))
            writer.add_documents(tokens, lengths, span_ends.reshape(-1), spoken)
        writer.finish()


def write_hollow(prefix: Path, lengths_D: np.ndarray, language: str) -> None:
    """A monolingual token file whose index is real and whose tokens are all zeros that no disk block holds.

    For what reads no tokens. Everything else is as the writer would write it, checksums included.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = lengths_D.astype(np.int64)
    ends = np.cumsum(lengths)
    num_documents, num_tokens = len(lengths), int(ends[-1])
    with companion(prefix, "bin").open("wb") as file:
        file.truncate(2 * num_tokens)
    zeros, left = hashlib.sha256(), 2 * num_tokens
    while left:
        zeros.update(bytes(min(left, _CHUNK)))
        left -= min(left, _CHUNK)
    with companion(prefix, "idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1))
        lengths_D.astype("<i4").tofile(file)
        (2 * (ends - lengths)).astype("<i8").tofile(file)
        np.arange(num_documents + 1, dtype="<i8").tofile(file)
    codes = f'["{language}"]'.encode()
    codes += b" " * (-len(codes) % 8)
    with companion(prefix, "spans").open("wb") as file:
        sizes = (40 + len(codes), num_documents, num_tokens, 2 * num_documents)
        file.write(struct.pack("<8sIIQQQ", b"XASPANS\x00", 1, *sizes) + codes)
        np.stack([ends - 1, ends], axis=1).astype("<i8").tofile(file)
        np.tile(np.array([0, -1], dtype=np.int8), num_documents).tofile(file)
    content = num_tokens - num_documents
    hashes = {"bin": zeros.hexdigest(), **{kind: sha256_of(companion(prefix, kind)) for kind in ("idx", "spans")}}
    tokenizer = MadeTokenizer()
    manifest = {
        "format": "megatron-xalign token file", "version": 1, "name": prefix.name, "origin": "monolingual",
        "languages": [language], "documents": num_documents, "sequences": num_documents, "tokens": num_tokens,
        "content_tokens": content, "tokens_by_language": {language: content}, "content_is_regular": True,
        "spans": 2 * num_documents, "dtype": "uint16",
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
        "files": {
            kind: {"bytes": companion(prefix, kind).stat().st_size, "sha256": digest} for kind, digest in hashes.items()
        },
        "package_version": __version__,
    }  # fmt: skip
    write_json(companion(prefix, "manifest.json"), manifest)

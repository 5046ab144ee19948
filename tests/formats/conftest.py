"""Token files made in the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.formats.token_file import NO_LANGUAGE, TokenFileWriter

Document = list[tuple[list[int], int]]


@dataclass(frozen=True)
class FakeTokenizer:
    """What of a tokenizer a token file depends on."""

    sha256: str = "ab" * 32
    vocab_size: int = 1000
    eod: int = 0


class TokenFiles:
    """Makes token files; sentences of a document are its pieces, its end belongs to the last."""

    Tokenizer = FakeTokenizer

    @staticmethod
    def documents(
        seed: int, count: int, vocab_size: int = 1000, num_languages: int = 2, longest: int = 12
    ) -> list[Document]:
        """Pieces of random languages, none or several, and an end."""
        rng = np.random.default_rng(seed)
        return [
            [
                *(
                    (rng.integers(1, vocab_size, rng.integers(1, longest)).tolist(), int(language))
                    for language in rng.integers(NO_LANGUAGE, num_languages, rng.integers(0, 4))
                ),
                ([0], NO_LANGUAGE),
            ]
            for _ in range(count)
        ]

    @staticmethod
    def ids(document: Document) -> list[int]:
        """The tokens of a document."""
        return [token for piece, _ in document for token in piece]

    @staticmethod
    def sentences(document: Document) -> list[int]:
        """Tokens of each piece, the end counted with the last."""
        sizes = [len(piece) for piece, _ in document]
        return [*sizes[:-2], sum(sizes[-2:])]

    @classmethod
    def write(
        cls,
        prefix: Path,
        documents: Sequence[Document],
        *,
        tokenizer: FakeTokenizer = FakeTokenizer(),
        languages: Sequence[str] = ("eng_Latn", "fin_Latn"),
        origin: Any = "parallel",
        sentences: bool = False,
        batch: int = 7,
        **details: Any,
    ) -> dict[str, Any]:
        """Write documents, a few at a time."""
        with TokenFileWriter(prefix, tokenizer=tokenizer, origin=origin, languages=languages) as writer:
            for begin in range(0, len(documents), batch):
                some = documents[begin : begin + batch]
                pieces = [piece for document in some for piece in document]
                writer.add_documents(
                    np.array([token for ids, _ in pieces for token in ids]),
                    np.array([len(cls.ids(document)) for document in some]),
                    np.cumsum([len(ids) for ids, _ in pieces]),
                    np.array([language for _, language in pieces]),
                    np.array([size for document in some for size in cls.sentences(document)]) if sentences else None,
                )
            return writer.finish(allow_empty=not documents, **details)


@pytest.fixture(scope="session")
def token_files() -> TokenFiles:
    """Makes token files."""
    return TokenFiles()


@pytest.fixture(scope="session")
def megatron_builder() -> Callable[..., None]:
    """Megatron's own writer: (prefix, documents as lists of sequences, dtype)."""
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

    def build(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: Any = np.uint16) -> None:
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for sequences in documents:
            builder.add_document([token for ids in sequences for token in ids], [len(ids) for ids in sequences])
        builder.finalize(f"{prefix}.idx")

    return build

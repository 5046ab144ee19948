"""Documents to token files: read, tokenise in batches, append.

Each side of a pair, and each piece of template text, is tokenised by itself, so the side boundary is exact and no token
belongs to two languages. (With the default template the tokens are those of the whole text too: the split of our
tokenizers never joins a line break to the word after it.)
"""

# T tokens, D documents, S spans

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.data.documents import (
    DEFAULT_TEMPLATE,
    Direction,
    Document,
    OnError,
    Reading,
    parse_template,
    read_monolingual,
    read_pairs,
    render_pair,
)
from megatron_xalign.data.tokenizer import Tokenizer
from megatron_xalign.errors import CorpusError, FormatError
from megatron_xalign.formats.atomic import sha256_of
from megatron_xalign.formats.token_file import NO_LANGUAGE, Origin, TokenFileWriter, read_token_file
from megatron_xalign.progress import progress_bar

_LOG = logging.getLogger(__name__)
# A batch is large enough to keep the tokenizer's threads busy and small enough not to matter in memory.
_BATCH_CHARACTERS = 2_000_000
_BATCH_DOCUMENTS = 4_000

Pieces = list[tuple[str, str | None]]


def preprocess_monolingual(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    language: str,
    *,
    text_key: str = "text",
    on_error: OnError = "raise",
) -> dict[str, Any]:
    """Tokenise JSON lines of one language into a token file; every document ends in the end-of-document token.

    A finished file made from the same bytes with the same tokenizer and options is kept.

    Args:
        inputs: files, read in this order.
        prefix: token file to write.
        tokenizer: the tokenizer.
        language: code of the inputs' language.
        text_key: key of the text in each line.
        on_error: what to do with malformed lines.

    Returns:
        The manifest; its ``counts`` say how many documents were read, written, empty and malformed.

    Raises:
        CorpusError: an input is missing, malformed (with ``on_error="raise"``) or holds no text.
    """

    def read(path: Path, reading: Reading) -> Iterator[Document]:
        return read_monolingual(path, language, text_key=text_key, on_error=on_error, reading=reading)

    return _preprocess(
        inputs, prefix, tokenizer, "monolingual", [language], read,
        lambda document: [(text, code) for code, text in document.texts.items()],
        {"text_key": text_key, "on_error": on_error, "template": None, "direction": None},
    )


def preprocess_pairs(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    languages: Sequence[str],
    *,
    template: str = DEFAULT_TEMPLATE,
    direction: Direction = "random",
    seed: int = 0,
    texts_key: str = "texts",
    on_error: OnError = "raise",
) -> dict[str, Any]:
    """Tokenise JSON lines of pairs into a token file, one pair a document.

    Args:
        inputs: files, read in this order.
        prefix: token file to write.
        tokenizer: the tokenizer.
        languages: the two codes; ``forward`` makes the first the source.
        template: text around ``{source}`` and ``{target}``.
        direction: which language comes first: ``forward``, ``backward``, or ``random`` pair by pair.
        seed: of ``random``.
        texts_key: key of the texts in each line.
        on_error: what to do with malformed lines.

    Returns:
        The manifest.

    Raises:
        CorpusError: an input is missing, malformed (with ``on_error="raise"``) or holds no pair.
        ConfigError: the template is malformed.
    """
    parse_template(template)
    first, second = languages

    def read(path: Path, reading: Reading) -> Iterator[Document]:
        return read_pairs(path, (first, second), texts_key=texts_key, on_error=on_error, reading=reading)

    def render(document: Document) -> Pieces:
        return render_pair(document, template, direction, seed)

    options = {
        "texts_key": texts_key, "on_error": on_error, "template": template, "direction": direction,
        "seed": seed if direction == "random" else None,
    }
    return _preprocess(inputs, prefix, tokenizer, "parallel", [first, second], read, render, options)


def _preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    origin: Origin,
    languages: list[str],
    read: Callable[[Path, Reading], Iterator[Document]],
    render: Callable[[Document], Sequence[tuple[str, str | None]]],
    options: dict[str, Any],
) -> dict[str, Any]:
    paths = [Path(path) for path in inputs]
    if not paths:
        raise ValueError("inputs is empty.")
    described = [_describe(path) for path in paths]
    # What decides the bytes; not where the input lies, so that a moved folder is not tokenised again.
    recipe = {
        "inputs": [{"sha256": item["sha256"], "bytes": item["bytes"]} for item in described],
        "tokenizer": tokenizer.sha256, "origin": origin, "languages": languages, **options,
    }
    kept = _kept(prefix, recipe)
    if kept is not None:
        _LOG.info("%s is up to date with its inputs and tokenizer; kept.", prefix)
        return kept
    reading = Reading()
    counts: Counter[str] = Counter()
    total = sum(item["bytes"] for item in described)
    with (
        progress_bar(total, f"tokenise {Path(prefix).name}", "B") as bar,
        TokenFileWriter(prefix, tokenizer=tokenizer, origin=origin, languages=languages) as writer,
    ):
        documents = chain.from_iterable(read(path, reading) for path in paths)
        for batch in _batches(documents, render, counts):
            _append(writer, tokenizer, batch)
            bar.update(reading.bytes_read - bar.n)
        bar.update(total - bar.n)
        if not writer.documents:
            raise CorpusError(
                f"{', '.join(map(str, paths))}: no document with text ({reading.documents} read, "
                f"{counts['empty']} empty, {reading.skipped.total()} lines left out)."
            )
        return writer.finish(
            template=options["template"],
            direction=options["direction"],
            inputs=described,
            counts={
                "read": reading.documents, "written": writer.documents, "empty": counts["empty"],
                "skipped_lines": dict(sorted(reading.skipped.items())),
            },
            recipe=recipe,
        )


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CorpusError(f"{path} does not exist or is not a file.")
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _kept(prefix: str | Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished, readable file made by the same recipe."""
    try:
        manifest = read_token_file(prefix).manifest
    except FormatError:
        return None
    return manifest if manifest.get("recipe") == recipe else None


def _batches(
    documents: Iterator[Document], render: Callable[[Document], Sequence[tuple[str, str | None]]], counts: Counter[str]
) -> Iterator[list[Sequence[tuple[str, str | None]]]]:
    """Rendered documents in batches; a document with an empty text is counted and left out."""
    batch: list[Sequence[tuple[str, str | None]]] = []
    characters = 0
    for document in documents:
        if not all(text.strip() for text in document.texts.values()):
            counts["empty"] += 1
            continue
        pieces = render(document)
        batch.append(pieces)
        characters += sum(len(text) for text, _ in pieces)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _append(writer: TokenFileWriter, tokenizer: Tokenizer, batch: list[Sequence[tuple[str, str | None]]]) -> None:
    """Tokenise rendered documents and append them, each with its end-of-document token."""
    index_of: dict[str | None, int] = {code: index for index, code in enumerate(writer.languages)}
    index_of[None] = NO_LANGUAGE
    encoded = iter(tokenizer.encode([text for pieces in batch for text, _ in pieces]))
    end = np.array([tokenizer.eod], dtype=np.int32)
    tokens, sizes, languages, lengths = [], [], [], []
    for pieces in batch:
        length = 1
        for _, code in pieces:
            ids = next(encoded)
            # A normalising tokenizer may leave nothing of a piece; an empty span would be malformed.
            if ids.size:
                tokens.append(ids)
                sizes.append(ids.size)
                languages.append(index_of[code])
                length += ids.size
        tokens.append(end)
        sizes.append(1)
        languages.append(NO_LANGUAGE)
        lengths.append(length)
    writer.add_documents(np.concatenate(tokens), np.array(lengths), np.cumsum(sizes), np.array(languages))

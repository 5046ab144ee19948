"""The token files a run names, opened as streams of one part of their documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_xalign.config import DataConfig, SourceConfig
from megatron_xalign.data.index_cache import IndexCache
from megatron_xalign.data.mixture import SourceText
from megatron_xalign.data.mixture_checks import languages_of_run
from megatron_xalign.data.source_stream import SourceStream
from megatron_xalign.data.splits import Part, split_documents
from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.token_file import TokenFile, companion, read_token_file


def open_sources(data: DataConfig, part: Part, cache: IndexCache) -> list[SourceStream]:
    """Open the token files of a run.

    Args:
        data: which, and how they are read.
        part: the documents of ``data.split`` that are wanted.
        cache: where indices are kept.

    Returns:
        One stream per source, in the order of ``data.sources``; language ids are those of the run.

    Raises:
        ConfigError: none is named, or a file of Megatron's own has no language.
        FormatError: a token file is damaged, or two were made with different tokenizers.
    """
    files = open_files(data)
    languages = languages_of_run(data.mixture, [file.languages for file in files])
    whole = data.mixture.keep_pairs_whole and data.mixture.packing == "source_windows"
    streams = []
    for source, file in zip(data.sources, files, strict=True):
        name = Path(source.prefix).name
        streams.append(
            SourceStream(
                name,
                file,
                languages,
                seq_length=data.seq_length,
                seed=data.mixture.seed,
                part=split_documents(name, len(file), data.split_parts)[part],
                whole_documents=whole and file.origin == "parallel",
                eod_mask_loss=data.eod_mask_loss,
                cache=cache,
            )
        )
    return streams


def open_files(data: DataConfig) -> list[TokenFile]:
    """Open the token files of a run, without reading what is in them.

    Raises:
        ConfigError: a file of Megatron's own has no language.
        FormatError: a token file is damaged, or two were made with different tokenizers.
    """
    files: list[TokenFile | None] = []
    for index, source in enumerate(data.sources):
        if companion(source.prefix, "manifest.json").exists() or not companion(source.prefix, "idx").exists():
            files.append(read_token_file(source.prefix, source.language, check="sizes"))
        elif source.language is None:
            raise ConfigError(
                f"data.sources.{index}: {source.prefix} has no .manifest.json that names its language; write it as "
                f"{{prefix: {source.prefix}, language: fin_Latn}}."
            )
        else:
            files.append(None)
    ours = [file for file in files if file is not None]
    check_one_tokenizer(ours)
    # Megatron's own files say nothing of their tokenizer; where there are others, theirs is the one of the run.
    eod = ours[0].eod if ours else None
    return [
        read_token_file(source.prefix, source.language, eod, check="sizes") if file is None else file
        for source, file in zip(data.sources, files, strict=True)
    ]


def check_one_tokenizer(files: Sequence[TokenFile]) -> None:
    """Refuse files of which the same id would be different words.

    Raises:
        FormatError: two manifests name different tokenizers.
    """
    for other in files[1:]:
        first, second = (file.manifest["tokenizer"]["sha256"] for file in (files[0], other))
        if first != second:
            raise FormatError(
                f"{companion(files[0].prefix, 'manifest.json')} and {companion(other.prefix, 'manifest.json')} were "
                f"made with different tokenizers ({first[:12]} and {second[:12]}); the same id would be another word "
                "in each. Preprocess both with one tokenizer."
            )


def text_of(stream: SourceStream, source: SourceConfig) -> SourceText:
    """What a mixture's plan needs to know of a stream."""
    file = stream.file
    # Python's integers: the product below is beyond 64 bits.
    tokens, content = stream.tokens, [int(count) for count in stream.content_tokens_K]
    windows = None
    if stream.whole_documents:
        # What is too long for a window takes no part.
        windows, left_out = stream.num_windows(0), stream.left_out(0).tokens
        content = [count * (tokens - left_out) // max(tokens, 1) for count in content]
        tokens -= left_out
    of_language = dict(zip(stream.languages, content, strict=True))
    return SourceText(
        name=stream.name,
        prefix=source.prefix,
        origin=file.origin,
        languages=tuple(file.languages),
        tokens=tokens,
        content_tokens_by_language={code: of_language[code] for code in file.languages},
        max_repeats=source.max_repeats,
        documents=stream.num_documents,
        windows=windows,
        pairing=file.manifest.get("pairing") or "aligned",
    )


def end_of_document(files: Sequence[TokenFile]) -> int:
    """The id that stands where a sample holds nothing: the end of a document; 0 where no file names it."""
    return next((file.eod for file in files if file.eod is not None), 0)

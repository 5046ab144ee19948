"""Token files: Megatron's ``PREFIX.bin``/``PREFIX.idx`` with two companions that say which language a token is.

``PREFIX.bin``
    The tokens of all documents, one after the other, little-endian ``uint16`` or ``int32``.
``PREFIX.idx``
    Megatron's index, byte for byte: ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code, uint64 sequences N, uint64
    document indices M, int32 [N] lengths in tokens, int64 [N] byte pointers, int64 [M] first sequence of each document
    and, last, N. A document is one sequence, or several (sentences).
``PREFIX.spans``
    The language of every token, as a partition of the tokens into spans. ``XASPANS\\0``, uint32 version 1, uint32
    header bytes H, uint64 documents, uint64 tokens, uint64 spans S, a JSON list of language codes padded with spaces to
    H (a multiple of 8), int64 [S] end of each span (exclusive, counted in tokens from the start of the file, strictly
    increasing, one at the end of every document), int8 [S] language (an index into the list; -1 for tokens of no
    language: end of document, template).
``PREFIX.manifest.json``
    What the file is and was made from, and the SHA-256 of the other three. Written last: a prefix that has ``.spans``
    but no manifest is an unfinished file and is not read.

Everything is little-endian. Megatron's ``IndexedDataset`` opens our files, and we open Megatron's (without companions:
one language per file).

This module is the door; the work is in ``token_file_manifest``, ``_layout`` (where things lie), ``_reader``,
``_writer`` over ``_columns``, ``_structure`` (walking through all of a file), ``_check``, ``_merge`` and
``_statistics``.
"""

from __future__ import annotations

from megatron_xalign.formats.token_file_check import (
    Problem,
    TokenFileReport,
    check_token_file,
    sample_documents,
    verify_token_file,
)
from megatron_xalign.formats.token_file_manifest import (
    LONGEST_DOCUMENT_TOKENS,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    NO_LANGUAGE,
    Origin,
    TokenizerIdentity,
    check_same_tokenizer,
    companion,
    read_manifest,
    token_dtype,
)
from megatron_xalign.formats.token_file_merge import merge_token_files
from megatron_xalign.formats.token_file_reader import TokenFile, read_token_file
from megatron_xalign.formats.token_file_statistics import token_file_statistics
from megatron_xalign.formats.token_file_writer import TokenFileWriter

__all__ = [
    "LONGEST_DOCUMENT_TOKENS",
    "MANIFEST_FORMAT",
    "MANIFEST_VERSION",
    "NO_LANGUAGE",
    "Origin",
    "Problem",
    "TokenFile",
    "TokenFileReport",
    "TokenFileWriter",
    "TokenizerIdentity",
    "check_same_tokenizer",
    "check_token_file",
    "companion",
    "merge_token_files",
    "read_manifest",
    "read_token_file",
    "sample_documents",
    "token_dtype",
    "token_file_statistics",
    "verify_token_file",
]

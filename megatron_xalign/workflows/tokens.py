"""Text to token files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_xalign.errors import CorpusError
from megatron_xalign.formats.atomic import read_json, write_json

if TYPE_CHECKING:
    from megatron_xalign.data.inputs import Fields, InputFormat, OnError
    from megatron_xalign.data.job_settings import JobSettings
    from megatron_xalign.data.preprocess import Outcome


def registry_packages() -> list[str]:
    """Names and versions of the packages the quickstart's text comes from."""
    from megatron_xalign.data.archives import ARCHIVES

    return [f"{archive.package}=={archive.version}" for archive in ARCHIVES]


def make_corpus(
    out: Path,
    *,
    languages: Sequence[str] = ("eng_Latn", "fin_Latn"),
    cache: Path | None = None,
    num_probe: int = 300,
    seed: int = 1234,
    monolingual: Mapping[str, Path] | None = None,
    pairs: Path | None = None,
    own_folder: Path | None = None,
) -> Path:
    """Write a corpus folder: documents per language, pairs, held-out probe pairs, counts and licences.

    The text comes from registry packages, or from files of one's own: ``monolingual`` and ``pairs``, or a folder that
    holds ``LANGUAGE.jsonl`` files and ``pairs.jsonl``.
    """
    from megatron_xalign.data import corpora

    if own_folder is not None:
        monolingual, pairs = _files_of(own_folder)
    if monolingual and pairs is not None:
        return corpora.corpus_from_files(out, monolingual=monolingual, pairs=pairs, num_probe=num_probe, seed=seed)
    return corpora.fetch_corpus(out, languages=tuple(languages), cache=cache, seed=seed, num_probe=num_probe)


def _files_of(folder: Path) -> tuple[dict[str, Path], Path]:
    pairs = folder / "pairs.jsonl"
    if not pairs.is_file():
        raise CorpusError(
            f'{pairs} does not exist; a corpus folder holds pairs.jsonl ({{"id", "texts": {{language: text}}}} a line) '
            'and one LANGUAGE.jsonl ({"id", "text"} a line) per language, e.g. eng_Latn.jsonl.'
        )
    monolingual = {
        path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.stem not in ("pairs", "probe")
    }
    if len(monolingual) != 2:
        raise CorpusError(
            f"{folder} holds documents in {len(monolingual)} language(s) ({', '.join(monolingual) or 'none'}); "
            "the quickstart compares two: eng_Latn.jsonl and fin_Latn.jsonl, for example."
        )
    return monolingual, pairs


def corpus_languages(corpus: Path) -> tuple[str, str]:
    """The two languages of a corpus folder."""
    from megatron_xalign.data.corpus_folder import read_corpus_folder

    return read_corpus_folder(corpus).languages


def train_tokenizer(
    corpus: Path, out: Path, vocab_size: int, model: Literal["bpe", "unigram"], **options: Any
) -> dict[str, Any]:
    """Train a tokenizer on a corpus folder, languages balanced; return its manifest with the fertility report.

    One already there that was trained on the same text with the same settings is kept.
    """
    from megatron_xalign.data.corpus_folder import read_corpus_folder

    text = read_corpus_folder(corpus)
    return _train_tokenizer(text.texts_by_language(), {"corpus": text.sha256}, out, vocab_size, model, options)


def train_tokenizer_on_files(
    inputs: Sequence[str | Path],
    fields: Sequence[Fields],
    out: Path,
    vocab_size: int,
    model: Literal["bpe", "unigram"],
    *,
    input_format: InputFormat | Literal["auto"] = "auto",
    on_error: OnError = "raise",
    **options: Any,
) -> dict[str, Any]:
    """The same on any files that preprocessing reads; its ``skipped_lines`` count what was passed over, and why."""
    from megatron_xalign.data.corpus_sample import texts_of
    from megatron_xalign.data.inputs import Reading, find_inputs, plan_parts
    from megatron_xalign.data.layouts import with_layout_found

    texts: Iterator[tuple[str, str]] = iter(())
    identity: list[Any] = []
    reading = Reading()
    for one in fields:
        found = find_inputs(inputs, format=input_format, fields=one)
        one = with_layout_found(found, one)
        pieces = [piece for part in plan_parts(found, one) for piece in part.pieces]
        texts = itertools.chain(texts, texts_of(pieces, one, on_error=on_error, reading=reading))
        identity.append([one.to_tree(), [[str(file.path), file.num_bytes, file.mtime_ns] for file in found]])
    source: dict[str, Any] = {"files": identity} | ({} if on_error == "raise" else {"on_error": on_error})
    # Filled while the texts are read, and written after that.
    options["details"] = {"skipped_lines": reading.skipped, "examples_of_skipped": reading.examples}
    return _train_tokenizer(texts, source, out, vocab_size, model, options)


def corpus_files(corpus: Path) -> list[dict[str, Any]]:
    """The files of a corpus folder whose text trains a tokenizer, as :func:`input_files` describes files."""
    from megatron_xalign.data.corpus_folder import read_corpus_folder

    languages: tuple[str | None, ...] = read_corpus_folder(corpus).languages
    paths = [(corpus / f"{language or 'pairs'}.jsonl", language) for language in (*languages, None)]
    return [
        {"path": str(path), "format": "jsonl", "bytes": path.stat().st_size, "language": language}
        for path, language in paths
    ]


def input_files(
    inputs: Sequence[str | Path], fields: Sequence[Fields], *, input_format: InputFormat | Literal["auto"] = "auto"
) -> list[dict[str, Any]]:
    """The files that names, folders and patterns mean: ``path, format, bytes, language`` of each; none is read."""
    from megatron_xalign.data.inputs import find_inputs

    found = {file.path: file for one in fields for file in find_inputs(inputs, format=input_format, fields=one)}
    return [
        {"path": str(file.path), "format": file.format, "bytes": file.num_bytes, "language": file.language}
        for file in found.values()
    ]


def measure_fertility(
    tokenizer: Path,
    inputs: Sequence[str | Path],
    fields: Sequence[Fields],
    *,
    input_format: InputFormat | Literal["auto"] = "auto",
    on_error: OnError = "raise",
    max_bytes_per_language: int = 10_000_000,
    seed: int = 0,
) -> dict[str, Any]:
    """How many tokens a tokenizer spends on each language of some files, on texts drawn at random."""
    from megatron_xalign.data.corpus_sample import texts_of
    from megatron_xalign.data.fertility import fertility, ids_of_partial_characters
    from megatron_xalign.data.inputs import Reading, find_inputs, plan_parts
    from megatron_xalign.data.layouts import with_layout_found
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.data.training_text import draw_texts

    loaded = Tokenizer.load(tokenizer)
    reading = Reading()
    texts: Iterator[tuple[str, str]] = iter(())
    for one in fields:
        found = find_inputs(inputs, format=input_format, fields=one)
        one = with_layout_found(found, one)
        pieces = [piece for part in plan_parts(found, one) for piece in part.pieces]
        texts = itertools.chain(texts, texts_of(pieces, one, on_error=on_error, reading=reading))
    partial = ids_of_partial_characters(loaded.model)
    samples = draw_texts(texts, max_bytes_per_language, seed)
    return {
        "tokenizer": str(loaded.path), "kind": loaded.kind, "sha256": loaded.sha256, "vocab_size": loaded.vocab_size,
        "eod": loaded.eod, "eod_token": loaded.eod_token,
        "languages": {
            language: fertility(loaded.model, [*sample.texts, *sample.held_out], partial)
            for language, sample in samples.items()
        },
        "skipped_lines": dict(sorted(reading.skipped.items())), "examples_of_skipped": reading.examples,
    }


def _train_tokenizer(
    texts: Any, source: dict[str, Any], out: Path, vocab_size: int, model: Literal["bpe", "unigram"],
    options: dict[str, Any],
) -> dict[str, Any]:
    from megatron_xalign.data import tokenizer

    # As it comes back from a file; infinity is no JSON.
    plain = {
        name: str(value) if isinstance(value, float) else value for name, value in options.items() if name != "details"
    }
    recipe = json.loads(json.dumps({**source, "vocab_size": vocab_size, "model": model, **plain}))
    recipe_path = out / "recipe.json"
    if not recipe_path.is_file() or read_json(recipe_path) != recipe:
        tokenizer.train_tokenizer(texts, out, vocab_size, model=model, **options)
        write_json(recipe_path, recipe)
    return read_json(out / "manifest.json")


def preprocess(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Path,
    *,
    language: str | None = None,
    pair: tuple[str, str] | None = None,
    direction: Literal["forward", "backward", "random"] = "random",
    seed: int = 1234,
    on_error: Literal["raise", "skip"] = "raise",
) -> dict[str, Any]:
    """Turn documents of one language, or pairs of two, into a token file; return its manifest."""
    from megatron_xalign.data import preprocess as job
    from megatron_xalign.data.inputs import Fields
    from megatron_xalign.data.job_settings import JobSettings

    if pair is not None:
        fields = Fields(kind="pairs", languages=pair)
    elif language is not None:
        fields = Fields(kind="monolingual", language=language)
    else:
        raise ValueError("either a language or a pair of languages is needed.")
    return job.preprocess(
        JobSettings(
            inputs=tuple(map(str, inputs)), output_prefix=str(prefix), tokenizer=str(tokenizer), fields=fields,
            direction=direction, seed=seed, on_error=on_error,
        )
    )


def preprocess_all(jobs: Sequence[JobSettings]) -> list[Outcome]:
    """Do preprocessing jobs one after the other; return what each made and took."""
    from megatron_xalign.data.preprocess import run_job

    return [run_job(_with_layout(job)) for job in jobs]


def _with_layout(job: JobSettings) -> JobSettings:
    """The job with the layout that its pairs have, where none was asked for."""
    from megatron_xalign.data.inputs import find_inputs
    from megatron_xalign.data.layouts import with_layout_found

    inputs = find_inputs(job.inputs, format=job.input_format, fields=job.fields)
    return dataclasses.replace(job, fields=with_layout_found(inputs, job.fields))


def preprocess_task(jobs: Sequence[JobSettings], task: str) -> list[dict[str, Any]]:
    """Do the parts of one task (``3/16``) of each job; return what it did."""
    from megatron_xalign.data.cluster import Task, run_task

    return [run_task(_with_layout(job), Task.parse(task)) for job in jobs]


def join_tasks(jobs: Sequence[JobSettings]) -> list[Outcome]:
    """Join the parts that the tasks of each job did."""
    from megatron_xalign.data import cluster

    return [cluster.join_tasks(_with_layout(job)) for job in jobs]


def preprocess_with_datatrove(
    jobs: Sequence[JobSettings], kind: Literal["local", "slurm", "ray"], num_tasks: int, options: Mapping[str, Any]
) -> list[Outcome] | None:
    """Do each job with an executor of datatrove; None if the jobs are in a queue now."""
    from megatron_xalign.data.cluster import run_datatrove

    outcomes = [run_datatrove(_with_layout(job), kind, num_tasks, options=options) for job in jobs]
    done = [outcome for outcome in outcomes if outcome is not None]
    return done if len(done) == len(outcomes) else None


def plan_preprocessing(jobs: Sequence[JobSettings]) -> list[dict[str, Any]]:
    """What preprocessing jobs would do, and about what that would take; touches nothing."""
    from megatron_xalign.data.preprocess import describe_plan

    return [describe_plan(_with_layout(job)) for job in jobs]


def verify(prefix: Path, tokenizer: Path | None = None, num_samples: int = 3) -> dict[str, Any]:
    """Check a token file; return what it holds, what is wrong with it, and some documents, as text if it can be."""
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file import check_token_file

    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    report = check_token_file(prefix, loaded, samples=num_samples)
    if loaded is not None:
        for document in report.sample:
            pieces = itertools.groupby(zip(document["languages"], document["ids"], strict=True), lambda item: item[0])
            document["text"] = [
                {"language": language, "text": loaded.decode([token for _, token in tokens])}
                for language, tokens in pieces
            ]
    return {"prefix": str(prefix), **report.to_tree()}


def merge(
    out: Path,
    prefixes: Sequence[Path],
    *,
    tokenizer: Path | None = None,
    language: str | None = None,
    origin: Literal["monolingual", "parallel"] = "monolingual",
    replace: bool = False,
) -> dict[str, Any]:
    """Join token files in order; return the manifest of the result."""
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file_merge import merge_token_files

    return merge_token_files(
        prefixes, out, replace=replace, language=language, origin=origin,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
    )


def token_statistics(prefix: Path, *, tokenizer: Path | None = None, language: str | None = None) -> dict[str, Any]:
    """Count what a token file holds."""
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file_statistics import token_file_statistics

    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    counted = token_file_statistics(prefix, language=language, tokenizer=loaded)
    if loaded is not None:
        for token in counted["frequent_ids"]:
            token["text"] = loaded.decode([token["id"]])
    return counted


def make_pairing(
    aligned: Path, out: Path, pairing: Literal["shuffled", "separated"], seed: int = 1234
) -> dict[str, Any]:
    """Make a control of a token file of aligned pairs; return its manifest."""
    from megatron_xalign.data.pairing import write_pairing

    return write_pairing(aligned, out, pairing, seed=seed)

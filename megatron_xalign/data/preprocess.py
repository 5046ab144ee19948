"""Corpus files to token files: plan, parts, join.

The input is cut into parts by itself alone; workers read, filter and tokenise a part each and write it as a token file
of its own; the join leaves duplicates out and puts the parts together in order. So the result does not depend on the
number of workers, and a job that was killed does only what is missing when it is started again.

Each side of a pair, and each piece of template text, is tokenised by itself, so the side boundary is exact and no token
belongs to two languages. (With the default template the tokens are those of the whole text too: the split of our
tokenizers never joins a line break to the word after it.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_xalign.data.inputs import InputFile, Part, Reading, read_part
from megatron_xalign.data.job import Job, Survey, holds, identity_of
from megatron_xalign.data.job_settings import JobSettings
from megatron_xalign.data.join import join_parts, sources_of
from megatron_xalign.data.parts import PartMaker, check_skipped
from megatron_xalign.data.work_folder import WorkFolder
from megatron_xalign.data.workers import Done, WorkerPool, peak_memory_bytes
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import read_json, write_json
from megatron_xalign.formats.token_file import read_token_file, token_dtype
from megatron_xalign.progress import progress_bar

_LOG = logging.getLogger(__name__)

_LOG_FORMAT = "megatron-xalign preprocessing log"
_LARGE_BYTES = 32 << 20
_SAMPLED_PARTS = 4
_SAMPLED_BYTES = 1 << 19


@dataclass(frozen=True)
class Outcome:
    """What a job made, and what it took."""

    manifests: dict[str, dict[str, Any]]
    """By prefix; one, but for a job that splits by language."""
    figures: dict[str, Any] | None
    """``seconds, workers, parts, parts_kept, text_bytes, tokens, megabytes_per_second, tokens_per_second,
    peak_memory_bytes`` (of all processes together) of this run; None where finished files were kept."""


def preprocess(settings: JobSettings) -> dict[str, Any]:
    """Make a token file of corpus files.

    A finished file made from the same bytes with the same tokenizer and settings is kept; another one of that name is
    replaced when the new one is whole. A job that was stopped, in whatever way, continues where it was.

    Args:
        settings: what to do; not splitting by language (:func:`run_job` does that).

    Returns:
        The manifest; its ``counts`` say what was read, written and left out, and why.

    Raises:
        ConfigError: settings contradict one another, or another job is writing the file.
        CorpusError: an input is missing, malformed (with ``on_error="raise"``) or holds no text.
        FormatError: the tokenizer cannot be used, or a file cannot be written.
        WorkerError: a worker process was killed.
    """
    if settings.split_by_language:
        raise ValueError("a job that splits by language makes several token files; call run_job.")
    (manifest,) = run_job(settings).manifests.values()
    return manifest


def run_job(settings: JobSettings) -> Outcome:
    """Do a whole job on this machine; see :func:`preprocess`."""
    started = time.monotonic()
    survey = Survey.make(settings)
    kept = kept_files(survey)
    folder = WorkFolder(settings.work_folder)
    if kept is not None:
        _LOG.info("%s is up to date with its inputs, tokenizer and settings; kept.", settings.output_prefix)
        if folder.path.is_dir():
            # The job before was killed when all but tidying up was done.
            with folder.hold():
                folder.remove_all()
        log = _read_log(settings)
        if log.get("inputs") != [identity_of(file) for file in survey.inputs]:
            # Read once to see that nothing changed; the next time that is known without.
            _write_log(settings, survey.inputs, kept, log.get("figures"))
        return Outcome(kept, None)
    with folder.hold():
        if _is_there(settings):
            _LOG.info(
                "%s is there, made from other input or settings; it is replaced when the new one is whole.",
                settings.output_prefix,
            )
        with _tidy(folder):
            if settings.num_workers() > 1 and sum(file.num_bytes for file in survey.inputs) > _LARGE_BYTES:
                # The tokenizer is not needed here any more, and may be large.
                del survey
                # What it takes to prove an engine stays in memory; it is a worker's, who has the engine for its parts.
                with WorkerPool(folder.path, settings.num_workers()) as pool:
                    pool.plan(settings)
                    job = Job.load(folder.path)
                    figures = do_parts(job, pool=pool)
            else:
                job = Job.plan(settings, survey)
                job.prepare()
                del survey
                if settings.num_workers() > 1:
                    job = replace(job, loaded=None)
                figures = do_parts(job)
            return finish_job(job, figures, started)


def finish_job(job: Job, figures: Mapping[str, Any], started: float | None = None) -> Outcome:
    """Join the parts, all done; hold the work folder meanwhile.

    Args:
        job: the job.
        figures: of :func:`do_parts`, if this process did some.
        started: when the job began, by ``time.monotonic``.
    """
    manifests = join_parts(job)
    figures = dict(figures)
    if started is not None:
        figures["seconds"] = round(time.monotonic() - started, 3)
    if figures:
        figures["peak_memory_bytes"] = max(figures["peak_memory_bytes"], peak_memory_bytes())
    figures["tokens"] = sum(manifest["tokens"] for manifest in manifests.values())
    _write_log(job.settings, [file for part in job.parts for file in part.files], manifests, figures)
    return Outcome(manifests, figures)


# --- parts ------------------------------------------------------------------------------------------------------------


def do_parts(
    job: Job, wanted: Sequence[int] | None = None, pool: WorkerPool | None = None
) -> dict[str, Any]:
    """Do parts that are missing, in as many processes as the settings say; hold the work folder meanwhile.

    Args:
        job: the job.
        wanted: which; all, if left out.
        pool: workers that are there already; left out, they are started here if there is work for more than one.

    Returns:
        ``workers, parts, parts_kept, text_bytes, megabytes_per_second, tokens_per_second, peak_memory_bytes`` (the sum
        over all processes).

    Raises:
        XAlignError: a worker failed, or was killed; the others are stopped.
    """
    settings = job.settings
    indices = list(range(job.num_parts) if wanted is None else wanted)
    missing = [index for index in indices if job.finished(index) is None]
    # Long ones first, so that no worker is left alone with one at the end.
    missing.sort(key=lambda index: -job.parts[index].num_bytes)
    num_workers = min(settings.num_workers(), len(missing))
    total = sum(job.parts[index].num_bytes for index in indices)
    todo = sum(job.parts[index].num_bytes for index in missing)
    started = time.monotonic()
    peaks: dict[int, int] = {}
    text_bytes = malformed = 0
    with progress_bar(total, f"tokenise {Path(settings.output_prefix).name}", "B", initial=total - todo) as bar:
        display = _Display(bar, job.parts)
        if num_workers > 1 or (pool is not None and missing):
            parts = _with_workers(pool or WorkerPool(job.folder.path, num_workers), job, missing, display)
        else:
            parts = _here(job, missing, display)
        for done in parts:
            display.finish(done.record)
            peaks[done.worker] = done.peak_memory_bytes
            text_bytes += done.record["counts"]["text_bytes"]
            malformed += done.record["counts"]["malformed"]
            check_skipped(malformed, done.record["examples"], settings.max_skipped)
    seconds = max(time.monotonic() - started, 1e-9)
    if num_workers > 1 or pool is not None:
        peaks[-1] = peak_memory_bytes()
    return {
        "workers": max(num_workers, 1), "parts": len(indices), "parts_kept": len(indices) - len(missing),
        "text_bytes": text_bytes, "megabytes_per_second": round(text_bytes / seconds / 1e6, 3),
        "tokens_per_second": round(display.tokens / seconds), "peak_memory_bytes": sum(peaks.values()),
    }


def _here(job: Job, missing: Sequence[int], display: _Display) -> Iterator[Done]:
    """Do parts in this process."""
    maker = PartMaker(job)
    for index in missing:
        record = maker.make(index, lambda progress: display.show({0: progress._asdict()}))
        yield Done(record, peak_memory_bytes(), 0)


def _with_workers(pool: WorkerPool, job: Job, missing: Sequence[int], display: _Display) -> Iterator[Done]:
    with pool:
        yield from pool.run(missing, lambda index: name_of(job.parts[index]), display.show)


def name_of(part: Part) -> str:
    """A part as a person knows it: its file, and from where to where."""
    first, last = part.pieces[0], part.pieces[-1]
    names = " and ".join(str(file.path) for file in first.files)
    if len(part.pieces) > 1:
        return f"{names} ... {last.files[-1].path} ({len(part.pieces)} files)"
    return names if first.unit == "file" else f"{names} ({first.unit} {first.begin:,} to {first.end:,})"


class _Display:
    """Adds up how far the workers are, and shows it."""

    def __init__(self, bar: tqdm, parts: Sequence[Part]) -> None:
        self._bar = bar
        self._parts = parts
        self._begun = int(bar.n)
        self._total = int(bar.total or 0)
        self._started = time.monotonic()
        self.documents = 0
        self.tokens = 0
        """Of the parts done now."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """A part is done."""
        self._begun += self._parts[record["part"]].num_bytes
        self.documents += sum(output["documents"] for output in record["outputs"].values())
        self.tokens += sum(output["tokens"] for output in record["outputs"].values())
        self.show({})

    def show(self, current: Mapping[int, Mapping[str, int]]) -> None:
        """Show the parts done and how far those in progress are."""
        bytes_read = self._begun + sum(progress["bytes_read"] for progress in current.values())
        documents = self.documents + sum(progress["documents"] for progress in current.values())
        tokens = self.tokens + sum(progress["tokens"] for progress in current.values())
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{documents:,} docs, {tokens / seconds / 1e6:.2f} M tokens/s", refresh=False)
        # A part that is done counts less than when it was in progress if what was read is not all of it.
        self._bar.update(max(0, min(bytes_read, self._total) - self._bar.n))


@contextmanager
def _tidy(folder: WorkFolder) -> Iterator[None]:
    """If the job fails, remove what was begun; what is done stays for the next time."""
    try:
        yield
    except BaseException:
        # Only workers of this job wrote here, and they are gone.
        folder.remove_partial()
        if folder.has_record():
            _LOG.info("what is done is kept in %s; the same command continues there.", folder.path)
        else:
            folder.remove_all()
        raise


# --- finished files ---------------------------------------------------------------------------------------------------


def _log_path(settings: JobSettings) -> Path:
    return Path(f"{settings.output_prefix}.log.json")


def _read_log(settings: JobSettings) -> dict[str, Any]:
    """What is known of the run that made the files, beyond their manifests; ``{}`` if nothing."""
    try:
        log = read_json(_log_path(settings))
    except FormatError:
        return {}
    return log if isinstance(log, dict) and log.get("format") == _LOG_FORMAT else {}


def _write_log(
    settings: JobSettings, inputs: Sequence[InputFile], prefixes: Sequence[str] | Mapping[str, Any],
    figures: Mapping[str, Any] | None,
) -> None:
    """Write down what is not the same every time and therefore in no manifest."""
    write_json(
        _log_path(settings),
        {
            "format": _LOG_FORMAT, "outputs": list(prefixes), "figures": figures,
            "inputs": [identity_of(file) for file in dict.fromkeys(inputs)],
        },
    )


def _prefixes(settings: JobSettings, log: Mapping[str, Any]) -> list[str]:
    if not settings.split_by_language:
        return [settings.output_prefix]
    outputs = log.get("outputs")
    return [name for name in outputs if isinstance(name, str)] if isinstance(outputs, list) else []


def _is_there(settings: JobSettings) -> bool:
    return any(Path(f"{prefix}.manifest.json").exists() for prefix in _prefixes(settings, _read_log(settings)))


def kept_files(survey: Survey) -> dict[str, dict[str, Any]] | None:
    """The manifests, by prefix, of finished, readable files made by the same recipe from the same bytes; or None."""
    settings, log = survey.settings, _read_log(survey.settings)
    manifests = {}
    for prefix in _prefixes(settings, log):
        try:
            manifest = read_token_file(prefix, check="sizes").manifest
        except FormatError:
            return None
        if manifest.get("recipe") != survey.recipe or not _allows(settings, manifest["counts"]["malformed_lines"]):
            return None
        manifests[prefix] = manifest
    if not manifests:
        return None
    described, seen = next(iter(manifests.values()))["inputs"], log.get("inputs")
    return manifests if _are_same(survey.inputs, described, seen if isinstance(seen, list) else []) else None


def _allows(settings: JobSettings, malformed: int) -> bool:
    """Whether a job may leave so many malformed lines out."""
    if settings.on_error == "raise":
        return malformed == 0
    return settings.max_skipped is None or malformed <= settings.max_skipped


def _are_same(inputs: Sequence[InputFile], described: Sequence[Mapping[str, Any]], seen: Sequence[Any]) -> bool:
    """Whether input files are those a manifest describes: by size and time, or else by content."""
    def is_alike(file: InputFile, entry: Mapping[str, Any]) -> bool:
        facts = (file.num_bytes, file.format, file.language)
        return facts == (entry["bytes"], entry["format"], entry.get("language"))

    if len(inputs) != len(described) or not all(map(is_alike, inputs, described)):
        return False
    known = seen if len(seen) == len(inputs) else [None] * len(inputs)
    return all(
        identity_of(file) == identity or holds(file.path, sources_of(entry))
        for file, entry, identity in zip(inputs, described, known, strict=True)
    )


# --- dry run ----------------------------------------------------------------------------------------------------------


def describe_plan(settings: JobSettings) -> dict[str, Any]:
    """Say what a job would do, and about what it would take; touches nothing.

    Returns:
        ``inputs, parts, languages, tokenizer, engine, sentences, workers, is_finished, parts_done, estimate``; the
        estimate (``text_bytes, tokens, output_bytes, seconds``) is made from some parts of the input.

    Raises:
        As :func:`preprocess` before it reads.
    """
    from megatron_xalign.data.engines import engine_named

    survey = Survey.make(settings)
    job = Job.plan(settings, survey)
    engine = engine_named(survey.tokenizer, job.engine["name"])
    text_bytes = tokens = documents = bytes_read = 0
    seconds = 0.0
    for number in range(min(_SAMPLED_PARTS, job.num_parts)):
        part = job.parts[job.num_parts * number // min(_SAMPLED_PARTS, job.num_parts)]
        reading = Reading()
        for batch in read_part(part, settings.fields, on_error="skip", reading=reading, batch_bytes=_SAMPLED_BYTES):
            texts = [*batch.texts, *(batch.others or ())]
            started = time.perf_counter()
            ids, _ = engine.encode_flat(texts)
            seconds += time.perf_counter() - started
            tokens += ids.size
            documents += len(batch.texts)
            text_bytes += sum(map(len, map(str.encode, texts)))
            break
        bytes_read += reading.bytes_read
    total = sum(part.num_bytes for part in job.parts)
    scale = total / max(bytes_read, 1)
    workers = min(settings.num_workers(), job.num_parts)
    itemsize = token_dtype(survey.tokenizer.vocab_size).itemsize
    # A document takes 20 bytes in .idx and, with its end, two spans of 9 bytes in .spans; a pair four.
    each = 20 + 9 * (4 if settings.is_pairs else 2)
    return {
        "output_prefix": settings.output_prefix,
        "inputs": [
            {
                "path": str(file.path), "format": file.format, "compression": file.compression, "bytes": file.num_bytes,
                "language": file.language,
            }
            for file in survey.inputs
        ],
        "parts": job.num_parts,
        "languages": list(job.languages) if job.languages is not None else None,
        "tokenizer": {
            "path": str(settings.tokenizer), "kind": survey.tokenizer.kind, "sha256": survey.tokenizer.sha256,
            "vocab_size": survey.tokenizer.vocab_size, "eod": survey.tokenizer.eod,
        },
        "engine": dict(job.engine),
        "sentences": dict(job.sentences) or None,
        "workers": workers,
        "is_finished": kept_files(survey) is not None,
        "parts_done": len(job.finished_parts()),
        "estimate": {
            "text_bytes": round(text_bytes * scale), "tokens": round(tokens * scale),
            "output_bytes": round((tokens + documents) * scale * itemsize + documents * scale * each),
            "seconds": round(seconds * scale / max(workers, 1), 1),
        },
    }

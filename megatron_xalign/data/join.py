"""The parts of a job, all done, to the token file: duplicates left out, parts joined in order, controls made."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xalign.data.duplicates import Duplicates, read_keys, resolve_duplicates
from megatron_xalign.data.input_files import InputFile
from megatron_xalign.data.job import Job
from megatron_xalign.data.pairing import write_pairing
from megatron_xalign.data.parts import check_skipped
from megatron_xalign.data.work_folder import JOINED
from megatron_xalign.errors import CorpusError, FormatError
from megatron_xalign.formats.atomic import remove_abandoned, sha256_of
from megatron_xalign.formats.token_file import companion, read_manifest
from megatron_xalign.formats.token_file_merge import merge_token_files

_LOG = logging.getLogger(__name__)

_MOST_EXAMPLES = 10
_LIBRARIES = ("numpy", "tokenizers", "sentencepiece", "tiktoken", "msgspec", "pyarrow", "zstandard", "nltk")


def join_parts(job: Job) -> dict[str, dict[str, Any]]:
    """Make the token files of a job of its parts, and remove the work folder.

    The files depend on the input and the settings alone. They appear whole or not at all; one that has the name is
    replaced then.

    Returns:
        Manifest by prefix; one, but for a job that splits by language.

    Raises:
        CorpusError: parts are missing, no document is left, or more lines were malformed than allowed.
        FormatError: a part is damaged (it is removed, and made again by the same command), or the disk is full.
    """
    records = job.finished_parts()
    missing = [index for index in range(job.num_parts) if index not in records]
    if missing:
        raise CorpusError(
            f"{len(missing)} of {job.num_parts} parts are not done ({', '.join(map(str, missing[:10]))}"
            f"{', ...' if len(missing) > 10 else ''}); do them first."
        )
    ordered = [records[index] for index in range(job.num_parts)]
    total = _Totals(ordered)
    check_skipped(total.malformed, total.examples, job.settings.max_skipped)
    outputs = sorted({name for record in ordered for name, facts in record["outputs"].items() if facts["documents"]})
    if not outputs:
        # Nothing that the next run could go on from.
        job.folder.remove_all()
        raise CorpusError(total.no_document(job))
    try:
        manifests = {
            f"{job.settings.output_prefix}.{output}" if output else job.settings.output_prefix:
                _join(job, output, ordered, total)
            for output in outputs
        }
    except FormatError:
        _remove_damaged(job)
        raise
    job.folder.remove_all()
    return manifests


def _join(job: Job, output: str, records: Sequence[Mapping[str, Any]], total: _Totals) -> dict[str, Any]:
    """Join the parts of one output."""
    settings = job.settings
    prefix = Path(f"{settings.output_prefix}.{output}" if output else settings.output_prefix)
    remove_abandoned(prefix.parent, f"{prefix.name}.")
    indices = [record["part"] for record in records if output in record["outputs"]]
    prefixes = [job.folder.part_prefix(index, output) for index in indices]
    duplicates = None
    if settings.duplicate_rule != "keep":
        duplicates = resolve_duplicates(
            [Path(f"{part}.keys") for part in prefixes], near=settings.duplicate_rule == "near",
            work_folder=job.folder.path / JOINED, threshold=settings.near_threshold,
        )
    documents = sum(record["outputs"][output]["documents"] for record in records if output in record["outputs"])
    details = _details(job, records, total, documents, duplicates.total if duplicates is not None else Counter())
    drop = _Drops(duplicates, len(prefixes)) if duplicates is not None else None
    if settings.pairing == "aligned":
        manifest = merge_token_files(prefixes, prefix, drop=drop, details=details, replace=True)
    else:
        aligned = job.folder.path / JOINED / "aligned"
        merge_token_files(prefixes, aligned, drop=drop, details=details, replace=True)
        manifest = write_pairing(aligned, prefix, settings.pairing, seed=settings.seed)
    del drop, duplicates
    job.folder.remove(JOINED)
    return manifest


def _remove_damaged(job: Job) -> None:
    """Remove the parts whose files are not what was written, so that the same command makes them again."""
    for index, record in job.finished_parts().items():
        for output in record["outputs"]:
            prefix = job.folder.part_prefix(index, output)
            try:
                stated = read_manifest(prefix)["files"]
                is_good = all(sha256_of(companion(prefix, kind)) == facts["sha256"] for kind, facts in stated.items())
                if is_good and job.settings.duplicate_rule != "keep":
                    read_keys(f"{prefix}.keys")
            except (FormatError, OSError):
                is_good = False
            if not is_good:
                _LOG.warning("%s is damaged and removed; the same command makes it again.", prefix)
                job.folder.remove_part(index)
                break


class _Drops(Sequence[NDArray[np.bool_]]):
    """The documents to leave out, part by part."""

    def __init__(self, duplicates: Duplicates, num_parts: int) -> None:
        self._duplicates, self._num_parts = duplicates, num_parts

    def __len__(self) -> int:
        return self._num_parts

    def __getitem__(self, part: Any) -> Any:
        if not 0 <= part < self._num_parts:
            raise IndexError(part)
        return self._duplicates.drop(part)


class _Totals:
    """The counts of all parts together."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        counts = [record["counts"] for record in records]
        self.read: int = sum(count["read"] for count in counts)
        self.empty: int = sum(count["empty"] for count in counts)
        self.malformed: int = sum(count["malformed"] for count in counts)
        self.text_bytes: int = sum(count["text_bytes"] for count in counts)
        self.filtered = _sum(count["filtered"] for count in counts)
        self.skipped = _sum(count["skipped"] for count in counts)
        self.not_checked = _sum(count["not_checked"] for count in counts)
        self.examples = [example for record in records for example in record["examples"]][:_MOST_EXAMPLES]

    def no_document(self, job: Job) -> str:
        """What to say when nothing is left."""
        files = list(dict.fromkeys(str(file.path) for part in job.parts for file in part.files))
        left_out = f", {self.filtered.total()} filtered" if self.filtered else ""
        return (
            f"{', '.join(files[:5])}{', ...' if len(files) > 5 else ''}: no document with text ({self.read} read, "
            f"{self.empty} empty{left_out}, {self.skipped.total()} lines left out)."
        )


def _sum(counts: Iterator[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _details(
    job: Job, records: Sequence[Mapping[str, Any]], total: _Totals, documents: int, duplicates: Counter[str]
) -> dict[str, Any]:
    """What the manifest says beside what the token file's writer knows.

    What was read and left out is counted over the whole input, also where it became several token files;
    ``duplicates`` and what is written are of the one file.
    """
    settings, recipe = job.settings, job.recipe
    details: dict[str, Any] = {
        "template": settings.template if settings.is_pairs else None,
        "direction": settings.direction if settings.is_pairs else None,
        "pairing": "aligned" if settings.is_pairs else None,
        "seed": recipe.get("seed"),
        "append_eod": settings.append_eod,
        "sentences": dict(job.sentences) or None,
        "inputs": describe_inputs(job, records),
        "counts": {
            "read": total.read, "written": documents - duplicates.total(), "empty": total.empty,
            "skipped_lines": dict(sorted(total.skipped.items())), "malformed_lines": total.malformed,
            "filtered": dict(sorted(total.filtered.items())), "duplicates": dict(sorted(duplicates.items())),
            "text_bytes": total.text_bytes,
        },
        "examples_of_skipped": total.examples,
        "not_checked": dict(sorted(total.not_checked.items())),
        "recipe": dict(recipe),
        "engine": dict(job.engine),
        "versions": _versions(),
    }
    return details


def _versions() -> dict[str, str]:
    """Of what decides tokens, in so far as it is installed."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_inputs(job: Job, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each input file: path, size, and the hash of its bytes, or of the stretches in which it was read."""
    stretches: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for source in record["sources"]:
            stretches.setdefault(source["path"], []).append({key: source[key] for key in ("begin", "end", "sha256")})
    described = []
    files: dict[InputFile, None] = dict.fromkeys(file for part in job.parts for file in part.files)
    for file in files:
        read = stretches.get(str(file.path), [])
        entry: dict[str, Any] = {"path": str(file.path), "bytes": file.num_bytes}
        if len(read) == 1 and (read[0]["begin"], read[0]["end"]) == (0, file.num_bytes):
            entry["sha256"] = read[0]["sha256"]
        else:
            entry["stretches"] = read
        if file.language is not None:
            entry["language"] = file.language
        entry["format"] = file.format
        described.append(entry)
    return described


def sources_of(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stretches of one entry of a manifest's ``inputs``."""
    if "sha256" in described:
        return [{"begin": 0, "end": described["bytes"], "sha256": described["sha256"]}]
    stretches: list[dict[str, Any]] = described["stretches"]
    return stretches

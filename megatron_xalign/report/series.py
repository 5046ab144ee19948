"""The runs of one series, read from their folders and checked to be comparable.

A report compares runs that differ in the share of parallel data. Everything else that would make a comparison
meaningless (another model size, other languages, other probe sentences) is an error here, not a footnote there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_xalign.config import RunConfig
from megatron_xalign.errors import ConfigError, FormatError, XAlignError
from megatron_xalign.formats.atomic import read_json
from megatron_xalign.formats.results import Results, Row, read_results
from megatron_xalign.formats.run_folder import RunFolder, differing_settings
from megatron_xalign.report.wording import pair_name, percent

Read = TypeVar("Read")

RETRIEVAL = "retrieval_centred"
"""The retrieval that the answer, the best layer and the alignment table stand on. Each language's mean vector is taken
off first: in small models it dominates the plain cosine, which then says more about languages than about sentences."""

_OF_A_REPLICATE = {"name", "output_dir", "seed", "data.mixture.seed"}
"""Settings in which replicates differ."""

REQUIRED_MEASURES = (RETRIEVAL, "cosine_gap", "cka", "ap_count_0.9", "nll_per_token")
"""Without these there is no central picture; every other measure may be left out by the analysis, in all runs alike."""

_SHAPE = (
    "languages", "probed_languages", "num_layers", "hidden_size", "ffn_hidden_size", "num_pairs", "pooling",
    "counted_tokens", "probe_sha256", "cka",
)  # fmt: skip
"""Context entries that must agree before two runs may share a figure."""

MAX_RUNS = 64


@dataclass(frozen=True)
class Run:
    """One run of the series with everything the report says about it."""

    name: str
    """Unique in the series."""
    label: str
    """What legends call it: the parallel fraction, with the name where two runs share a fraction."""
    folder: RunFolder
    """Where it lies."""
    config: RunConfig
    """Its resolved config."""
    facts: dict[str, Any]
    """``run.json``."""
    audit: dict[str, Any]
    """``audit.json``."""
    metrics: list[dict[str, Any]]
    """Lines of ``metrics.jsonl``, one a step, ascending."""
    results: Results
    """What ``xalign analyze`` measured."""
    rows: dict[tuple[str, int | None, str], list[Row]] = field(repr=False)
    """``results.rows`` by (measure, layer, subject), each ascending in step."""
    control: str = ""
    """Name of the control the run belongs to; empty for the series itself."""
    evaluation: Results | None = None
    """What ``xalign evaluate`` measured of its checkpoints; None if it was not run."""

    @property
    def fraction(self) -> float:
        """The parallel fraction that was asked for; of a schedule, its mean."""
        return self.config.parallel_fraction

    @property
    def last_step(self) -> int:
        """Newest step that was analysed."""
        return self.results.steps[-1]

    @property
    def wall_seconds(self) -> float:
        """Training time of the steps that count: the sum of the logged intervals."""
        return float(sum(line.get("seconds", 0.0) for line in self.metrics))

    def curve(self, measure: str, layer: int | None, subject: str) -> list[Row]:
        """A number over training; empty if it was not measured."""
        return self.rows.get((measure, layer, subject), [])

    def at(self, measure: str, layer: int | None, subject: str, step: int) -> Row | None:
        """One number, or None if it was not measured."""
        return next((row for row in self.curve(measure, layer, subject) if row.step == step), None)

    def by_layer(self, measure: str, subject: str, step: int) -> list[Row]:
        """A number over layers, the embedding output first; empty if it was not measured."""
        found = [
            row
            for (name, layer, about), rows in self.rows.items()
            if name == measure and about == subject and layer is not None
            for row in rows
            if row.step == step
        ]
        return sorted(found, key=_layer)

    def evaluated(self, measure: str, subject: str) -> list[Row]:
        """A number of ``xalign evaluate`` over checkpoints; empty if it was not measured."""
        rows = [] if self.evaluation is None else self.evaluation.select(measure=measure, subject=subject)
        return sorted(rows, key=lambda row: row.step)

    def best_layer(self, pair: str, step: int) -> int:
        """The layer that retrieves most translations of a pair (``RETRIEVAL``) at a step; the lower one of equals.

        Raises:
            FormatError: retrieval of this pair was not measured there.
        """
        rows = self.by_layer(RETRIEVAL, pair, step)
        if not rows:
            raise FormatError(
                f"run {self.name}: {self.folder.analysis / 'results.json'} has no {RETRIEVAL} of {pair} at step "
                f"{step}; run `xalign analyze {self.folder.path}` again."
            )
        return _layer(max(rows, key=lambda row: (row.value, -_layer(row))))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only: what varies between them is training itself."""

    label: str
    """The parallel fraction, and the control where it is one."""
    runs: list[Run]
    """At least one, ascending in seed."""


@dataclass(frozen=True)
class Series:
    """Runs that may be compared, ascending in parallel fraction."""

    runs: list[Run]
    """At least one."""
    groups: list[Group]
    """The same runs, replicates together."""
    languages: list[str]
    """Codes, in the order of the runs' language ids."""
    probed: list[str]
    """Those the probe has sentences in."""
    pairs: list[str]
    """Language pairs ``a-b`` that were compared."""
    num_layers: int
    """Transformer layers."""
    num_pairs: int
    """Probe sentences per language; retrieval by chance is one over this."""
    step: int
    """Newest step that every run was analysed at: where "the last step" is read in all tables."""

    @property
    def chance(self) -> float:
        """Retrieval by chance."""
        return 1.0 / self.num_pairs

    def has(self, measure: str) -> bool:
        """Whether a measure is there (in one run means in all)."""
        return any(name == measure for name, _, _ in self.runs[0].rows)

    @property
    def debiased_cka(self) -> bool:
        """Whether CKA is the debiased one, which chance holds near 0 and which may be negative."""
        return self.runs[0].results.context.get("cka") == "debiased"

    def evaluated(self, prefix: str) -> list[tuple[str, str]]:
        """Measure and subject of every number of ``xalign evaluate`` whose measure begins so."""
        evaluation = self.runs[0].evaluation
        rows = [] if evaluation is None else evaluation.rows
        return sorted({(row.measure, row.subject) for row in rows if row.measure.startswith(prefix)})

    def pair_name(self, pair: str) -> str:
        """A pair in words."""
        return pair_name(pair, self.languages)

    @property
    def tokens(self) -> list[int]:
        """Tokens each run had seen at ``step``."""
        return [next(row.consumed_tokens for row in run.results.rows if row.step == self.step) for run in self.runs]

    def group_of(self, run: Run) -> Group:
        """The group a run is in."""
        return next(group for group in self.groups if any(member.name == run.name for member in group.runs))

    @property
    def seeds_per_fraction(self) -> int:
        """Fewest runs that share one fraction, controls apart."""
        fractions = [run.fraction for run in self.runs if not run.control] or [run.fraction for run in self.runs]
        return min(fractions.count(fraction) for fraction in fractions)

    @property
    def has_replicates(self) -> bool:
        """Whether some runs differ in their seeds only."""
        return any(len(group.runs) > 1 for group in self.groups)


def read_series(folders: Sequence[Path], controls: Mapping[str, str] | None = None) -> Series:
    """Read run folders and check that they belong in one picture.

    Args:
        folders: 1 to 64 run folders, each with ``analysis/`` inside.
        controls: name of the control a run (by name) belongs to, for those that belong to one.

    Raises:
        FormatError: a file is missing or unreadable (the message names run, file and the command that makes it), runs
            differ in shape, languages or probe sentences, or no step was analysed in all of them.
        ConfigError: no folder, or more than 64.
    """
    if not 1 <= len(folders) <= MAX_RUNS:
        raise ConfigError(f"{len(folders)} run folders given; one report compares 1 to {MAX_RUNS}.")
    pieces = [_read_pieces(Path(folder)) for folder in folders]
    names = unique_names([(piece.config.name, piece.folder.path) for piece in pieces])
    runs = [
        Run(
            name=name, label=_fraction_label(piece.config, (controls or {}).get(name, "")),
            folder=piece.folder, config=piece.config, facts=piece.facts, audit=piece.audit, metrics=piece.metrics,
            results=piece.results, rows=_index(piece.results.rows), control=(controls or {}).get(name, ""),
            evaluation=piece.evaluation,
        )
        for name, piece in zip(names, pieces, strict=True)
    ]
    runs.sort(key=lambda run: (run.fraction, run.control, run.config.seed, run.config.data.mixture.seed, run.name))
    groups = _groups(runs)
    runs = [run for group in groups for run in group.runs]
    _check_comparable(runs)
    _check_evaluations(runs)
    context = runs[0].results.context
    pairs = sorted({subject for measure, _, subject in runs[0].rows if measure == RETRIEVAL})
    common = set.intersection(*(set(run.results.steps) for run in runs))
    if not common:
        listed = "; ".join(f"{run.name}: {', '.join(map(str, run.results.steps))}" for run in runs)
        raise FormatError(
            f"no step was analysed in every run ({listed}); probe the same steps in all runs of a series "
            "(capture.probe_interval_steps), then run `xalign analyze` on each."
        )
    languages = list(context["languages"])
    series = Series(
        runs, groups, languages, list(context.get("probed_languages", languages)), pairs, int(context["num_layers"]),
        int(context["num_pairs"]), max(common),
    )  # fmt: skip
    for run in runs:
        for pair in pairs:
            run.best_layer(pair, series.step)  # raises if this run lacks the pair
    return series


def _fraction_label(config: RunConfig, control: str) -> str:
    scheduled = " on average" if config.data.mixture.schedule else ""
    return percent(config.parallel_fraction, digits=None) + scheduled + (f" {control}" if control else "")


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Replicates together; labels that two groups would share carry the runs' names."""
    found: list[list[Run]] = []
    for run in runs:
        for group in found:
            if group[0].control == run.control and all(_are_replicates(other.config, run.config) for other in group):
                group.append(run)
                break
        else:
            found.append([run])
    shared = [group[0].label for group in found]
    groups = []
    for group in found:
        label = group[0].label
        if shared.count(label) > 1:
            label += f" ({group[0].name})"
        if len(group) > 1:
            group = [replace(run, label=f"{label}, {_seed_label(run.config)}") for run in group]
        else:
            group = [replace(group[0], label=label)]
        groups.append(Group(label, group))
    return groups


def _seeds(config: RunConfig) -> tuple[int, int]:
    return config.seed, config.data.mixture.seed


def _seed_label(config: RunConfig) -> str:
    return f"seed {config.seed}" + (f"/{config.data.mixture.seed}" if len(set(_seeds(config))) > 1 else "")


def _are_replicates(one: RunConfig, other: RunConfig) -> bool:
    differing = {text.split(":")[0] for text in differing_settings(one, other)}
    return _seeds(one) != _seeds(other) and differing <= _OF_A_REPLICATE


@dataclass(frozen=True)
class _Pieces:
    folder: RunFolder
    config: RunConfig
    facts: dict[str, Any]
    audit: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: Results
    evaluation: Results | None


def _read_pieces(path: Path) -> _Pieces:
    folder = RunFolder(path)
    if not path.is_dir():
        raise FormatError(f"run folder {path} does not exist; `xalign train CONFIG` makes one.")
    config = _read(path, "config.yaml", f"`xalign train CONFIG` with output_dir={path}", folder.config)
    facts = _read(path, "run.json", "`xalign train CONFIG`", lambda: _mapping(folder.facts_path))
    audit = _read(path, "audit.json", "`xalign train CONFIG`", lambda: _mapping(folder.audit_path))
    metrics = _read(path, "metrics.jsonl", "`xalign train CONFIG`", lambda: _metrics(folder))
    results = _read(path, "analysis/", f"`xalign analyze {path}`", lambda: read_results(folder.analysis))
    _check_audit(folder.audit_path, audit)
    _check_results(folder, results)
    evaluation = None
    if (folder.evaluation / "results.json").is_file():
        evaluation = _read(
            path, "analysis/evaluation/", f"`xalign evaluate {path}`", lambda: read_results(folder.evaluation)
        )
    return _Pieces(folder, config, facts, audit, metrics, results, evaluation)


def _read(path: Path, piece: str, way_out: str, reader: Callable[[], Read]) -> Read:
    try:
        return reader()
    except XAlignError as error:
        raise FormatError(f"run {path.name}: {piece} cannot be read: {error} It is made by {way_out}.") from error


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}; an object is expected.")
    return content


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    # A run that was killed and resumed logs some steps twice; the later line belongs to the steps that were kept.
    by_step: dict[int, dict[str, Any]] = {}
    for line in folder.metrics():
        missing = [key for key in ("step", "consumed_tokens", "loss") if key not in line]
        if missing:
            raise FormatError(f"{folder.metrics_path}: a line lacks {', '.join(missing)}.")
        by_step[int(line["step"])] = line
    if not by_step:
        raise FormatError(f"{folder.metrics_path} holds no logged step.")
    return [by_step[step] for step in sorted(by_step)]


def _check_audit(path: Path, audit: Mapping[str, Any]) -> None:
    for key in ("asked", "achieved", "holds", "sources", "languages"):
        if key not in audit:
            raise FormatError(f"{path} has no entry {key!r}; it is not an audit that `xalign train` wrote.")


def _check_results(folder: RunFolder, results: Results) -> None:
    path, again = folder.analysis / "results.json", f"run `xalign analyze {folder.path}` again."
    for key in ("languages", "num_layers", "num_pairs"):
        if key not in results.context:
            raise FormatError(f"{path}: its context has no {key}; {again}")
    if not results.rows:
        raise FormatError(f"{path} holds no numbers; {again}")
    measured = {row.measure for row in results.rows}
    for measure in REQUIRED_MEASURES:
        if measure not in measured:
            raise FormatError(f"{path} has no rows of {measure}; {again}")


def unique_names(runs: Sequence[tuple[str, Path]]) -> list[str]:
    """Names of runs or captured models, with the folder's where two are called alike.

    Raises:
        FormatError: that does not tell them apart.
    """
    plain = [name for name, _ in runs]
    names = [name if plain.count(name) == 1 else f"{name} ({path.name})" for name, path in runs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise FormatError(
                f"two folders are called {name}: {runs[names.index(name)][1]} and {runs[index][1]}; "
                "give each folder once, under a name of its own."
            )
    return names


def _index(rows: Sequence[Row]) -> dict[tuple[str, int | None, str], list[Row]]:
    index: dict[tuple[str, int | None, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.step):
        index.setdefault((row.measure, row.layer, row.subject), []).append(row)
    return index


def _check_comparable(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for key in _SHAPE:
            ours, theirs = first.results.context.get(key), run.results.context.get(key)
            if ours != theirs:
                raise FormatError(
                    f"runs {first.name} and {run.name} cannot be compared: {key} is {ours} in "
                    f"{first.folder.analysis / 'results.json'} and {theirs} in {run.folder.analysis / 'results.json'}. "
                    "A series differs in its share of parallel data only; report the others apart."
                )
        # A measure that one run lacks would be a missing point that looks like a choice.
        kinds = {(measure, subject) for measure, _, subject in first.rows}
        for measure, subject in sorted(kinds ^ {(measure, subject) for measure, _, subject in run.rows}):
            have, lack = (first, run) if (measure, subject) in kinds else (run, first)
            raise FormatError(
                f"run {lack.name}: {lack.folder.analysis / 'results.json'} has no {measure} of "
                f"{subject or 'the model'}, which run {have.name} has; run `xalign analyze {lack.folder.path}` again."
            )


def _check_evaluations(runs: Sequence[Run]) -> None:
    """Evaluated are all runs, on the same text and at the same steps, or none."""
    first = next((run for run in runs if run.evaluation is not None), None)
    if first is None or first.evaluation is None:
        return
    for run in runs:
        again = f"evaluate all runs of the series alike: `xalign evaluate {run.folder.path}`."
        if run.evaluation is None:
            raise FormatError(f"run {run.name} was not evaluated, and run {first.name} was; {again}")
        for key in ("texts_sha256", "most", "lm_eval_tasks"):
            ours, theirs = first.evaluation.context.get(key), run.evaluation.context.get(key)
            if ours != theirs:
                raise FormatError(
                    f"runs {first.name} and {run.name} were evaluated differently: {key} is {ours} and {theirs}; "
                    f"{again}"
                )
        steps = [one.evaluation.steps for one in (first, run) if one.evaluation is not None]
        if steps[0][-1] != steps[1][-1]:
            raise FormatError(
                f"run {first.name} was evaluated up to step {steps[0][-1]} and run {run.name} up to {steps[1][-1]}; "
                f"{again}"
            )


class _Analysed(Protocol):
    """A run, or a captured model."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> RunFolder: ...

    @property
    def results(self) -> Results: ...


def projection(run: _Analysed, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Coordinates of every probe sentence at a step.

    Returns:
        float [L+1, D, 2] coordinates, float [L+1, 2] explained variance, int [D] language of each sentence; None if
        the analysis wrote no projection.

    Raises:
        FormatError: the arrays are there but do not cover this step.
    """
    arrays = run.results.arrays
    wanted = ("pca_coordinates", "pca_explained", "pca_steps", "document_languages")
    if not any(name in arrays for name in wanted):
        return None
    path, again = run.folder.analysis / "arrays.safetensors", f"run `xalign analyze {run.folder.path}` again."
    for name in wanted:
        if name not in arrays:
            raise FormatError(f"run {run.name}: {path} has no {name}; {again}")
    steps = arrays["pca_steps"].tolist()
    if step not in steps:
        raise FormatError(f"run {run.name}: {path} has projections of steps {steps}, not of {step}; {again}")
    coordinates = arrays["pca_coordinates"][steps.index(step)]
    languages = arrays["document_languages"]
    if coordinates.ndim != 3 or coordinates.shape[1] != len(languages):
        raise FormatError(
            f"run {run.name}: {path} places {coordinates.shape} points for {len(languages)} sentences; {again}"
        )
    return coordinates, arrays["pca_explained"], languages


def _layer(row: Row) -> int:
    assert row.layer is not None
    return row.layer

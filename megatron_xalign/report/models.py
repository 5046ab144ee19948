"""Models that were captured and not trained here: published ones, or checkpoints of anywhere, side by side.

They share a probe and nothing else. Layers are therefore compared by depth (0 the embedding output, 1 the last layer's
output) and neurons by their share of a layer, and nothing is said about parallel data.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.results import Results, Row, read_results
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.report.series import REQUIRED_MEASURES, RETRIEVAL, unique_names
from megatron_xalign.report.tables import MISSING, Cell, Table
from megatron_xalign.report.wording import language_name, layer_words, listing, pair_name, percent, thousands

MAX_MODELS = 8
"""As many as there are colours."""

_SHARED = ("languages", "probed_languages", "num_pairs", "probe_sha256", "pooling")
"""Context entries without which two models were not asked the same."""


@dataclass(frozen=True)
class Model:
    """One captured model at the newest step it was captured at."""

    name: str
    """Unique on the page."""
    folder: RunFolder
    """What ``xalign capture`` wrote."""
    results: Results
    """What ``xalign analyze`` measured."""
    rows: dict[tuple[str, int | None, str], Row] = field(repr=False)
    """Rows of that step by (measure, layer, subject)."""
    captures: dict[str, Any]
    """How it was captured, by step (``RunFolder.captures``)."""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return int(self.results.context["num_layers"])

    @property
    def step(self) -> int:
        """The step captured; 0 for models that know of none."""
        return self.results.steps[-1]

    def depth(self, layer: int) -> float:
        """Where a layer's output lies: 0 for the embedding output, 1 for the last layer's."""
        return (layer + 1) / self.num_layers

    def at(self, measure: str, layer: int | None, subject: str) -> Row | None:
        """One number, or None if it was not measured."""
        return self.rows.get((measure, layer, subject))

    def by_layer(self, measure: str, subject: str) -> list[tuple[int, Row]]:
        """A number over layers, the embedding output first."""
        found = (
            (layer, row)
            for (name, layer, about), row in self.rows.items()
            if name == measure and about == subject and layer is not None
        )
        return sorted(found, key=lambda entry: entry[0])

    def best_layer(self, pair: str) -> int:
        """The layer that retrieves most translations of a pair; the lower one of equals."""
        return max(self.by_layer(RETRIEVAL, pair), key=lambda entry: (entry[1].value, -entry[0]))[0]


@dataclass(frozen=True)
class Models:
    """Models that were asked the same."""

    models: list[Model]
    """In the order given."""
    probed: list[str]
    """Languages the probe has sentences in."""
    pairs: list[str]
    """Language pairs that were compared."""
    num_pairs: int
    """Probe sentences per language; retrieval by chance is one over this."""

    @property
    def chance(self) -> float:
        """Retrieval by chance."""
        return 1.0 / self.num_pairs

    @property
    def debiased_cka(self) -> bool:
        """Whether CKA is the debiased one, of all models."""
        return all(model.results.context.get("cka") == "debiased" for model in self.models)

    def has(self, measure: str) -> bool:
        """Whether some model has a measure."""
        return any(name == measure for model in self.models for name, _, _ in model.rows)

    def pair_name(self, pair: str) -> str:
        """A pair in words."""
        return pair_name(pair, self.probed)


def is_captured(folder: Path) -> bool:
    """Whether a folder holds the statistics of a model that was not trained there."""
    return folder.is_dir() and not RunFolder(folder).config_path.exists()


def read_models(folders: Sequence[Path]) -> Models:
    """Read what was captured and analysed of some models, and check that they were asked the same.

    Raises:
        FormatError: a folder was not analysed, lacks a measure, or was captured with another probe than the first.
        ConfigError: no folder, or more than 8.
    """
    if not 1 <= len(folders) <= MAX_MODELS:
        raise ConfigError(f"{len(folders)} captured models given; one page compares 1 to {MAX_MODELS}.")
    models = [_read(Path(folder)) for folder in folders]
    names = unique_names([(model.name, model.folder.path) for model in models])
    models = [replace(model, name=name) for model, name in zip(models, names, strict=True)]
    first = models[0]
    for model in models[1:]:
        for key in _SHARED:
            ours, theirs = first.results.context.get(key), model.results.context.get(key)
            if ours != theirs:
                raise FormatError(
                    f"models {first.name} and {model.name} cannot be compared: {key} is {ours} and {theirs}. Capture "
                    "them with the same probe: `xalign capture MODEL --probe PROBE --out FOLDER`."
                )
    pairs = sorted({subject for measure, _, subject in first.rows if measure == RETRIEVAL})
    for model in models:
        for pair in pairs:
            if not model.by_layer(RETRIEVAL, pair):
                again = f"run `xalign analyze {model.folder.path}` again."
                raise FormatError(f"{model.folder.analysis} has no {RETRIEVAL} of {pair}; {again}")
    context = first.results.context
    return Models(models, list(context["probed_languages"]), pairs, int(context["num_pairs"]))


def _read(path: Path) -> Model:
    folder, again = RunFolder(path), f"run `xalign analyze {path}`"
    if not path.is_dir():
        raise FormatError(f"{path} does not exist; `xalign capture MODEL --probe PROBE --out {path}` makes it.")
    try:
        results = read_results(folder.analysis)
    except FormatError as error:
        raise FormatError(f"{path} was not analysed: {error} Please {again}.") from error
    if not results.rows:
        raise FormatError(f"{folder.analysis} holds no numbers; {again} again.")
    for key in ("run", "num_layers", "ffn_hidden_size", *_SHARED):
        if key not in results.context:
            raise FormatError(f"{folder.analysis}: its context has no {key}; {again} again.")
    last = results.steps[-1]
    rows = {(row.measure, row.layer, row.subject): row for row in results.rows if row.step == last}
    measured = {measure for measure, _, _ in rows}
    for measure in REQUIRED_MEASURES:
        if measure not in measured:
            raise FormatError(
                f"{folder.analysis} has no {measure}; {again} again, and if it is still not there capture the model "
                "with a probe that has the same sentences in two languages."
            )
    return Model(str(results.context["run"]), folder, results, rows, folder.captures())


def summary(models: Models) -> list[str]:
    """What the page shows, in sentences; the first of every pair says who finds most translations."""
    sentences = []
    for pair in models.pairs:
        found = []
        for model in models.models:
            layer = model.best_layer(pair)
            found.append((model.rows[RETRIEVAL, layer, pair].value, model, layer))
        found.sort(key=lambda entry: -entry[0])
        said = [
            f"{model.name} finds {percent(value)} at {layer_words(layer)} (depth {model.depth(layer):.2f})"
            for value, model, layer in found
        ]
        sentences.append(
            f"{models.pair_name(pair)}, translations found among {thousands(models.num_pairs)} with languages centred, "
            f"each model at its best layer: {listing(said)}; chance finds {percent(models.chance)}."
        )
    return sentences


def notes(models: Models) -> list[str]:
    """What a reader must know before comparing."""
    said = []
    kinds = {model.name: model.results.context.get("cka") for model in models.models}
    if len(set(kinds.values())) > 1:
        told = listing(f"{kind or 'plain'} for {name}" for name, kind in kinds.items())
        said.append(f"CKA is not of one kind and cannot be compared: {told}.")
    counted = {model.name: model.results.context.get("counted_tokens") for model in models.models}
    if len(set(counted.values())) > 1:
        said.append(f"Tokens were not counted alike: {listing(f'{name}: {what}' for name, what in counted.items())}.")
    return said


def alignment_table(models: Models) -> Table:
    """One row for every model and pair, at the model's best layer."""
    several = len(models.pairs) > 1
    table = Table(
        "Alignment, each model at its best layer",
        ["model", *(["languages"] if several else []), "layers", "best", "retrieved, centred", "95\u00a0% interval",
         "at emb", "without shared tokens", "not centred", "cosine gap", "CKA", "CKA permuted"],
    )  # fmt: skip
    for pair in models.pairs:
        for model in models.models:
            layer = model.best_layer(pair)
            best = model.rows[RETRIEVAL, layer, pair]
            has_interval = best.low is not None and best.high is not None
            cells = [Cell(models.pair_name(pair), "text")] if several else []
            cells += [
                Cell(str(model.num_layers)),
                Cell("emb" if layer < 0 else str(layer)),
                Cell(percent(best.value)),
                Cell(f"{100 * (best.low or 0.0):.1f} to {percent(best.high or 0.0)}" if has_interval else MISSING),
                *(
                    _cell(model.at(measure, at, pair), percent)
                    for measure, at in (
                        (RETRIEVAL, -1), ("retrieval_centred_unshared", layer), ("retrieval", layer)
                    )
                ),
                *(
                    _cell(model.at(measure, layer, pair), _three)
                    for measure in ("cosine_gap", "cka", "cka_permuted")
                ),
            ]  # fmt: skip
            table.rows.append((model.name, cells))
    return table


def language_table(models: Models) -> Table:
    """Neurons and losses of every model and language."""
    table = Table(
        "Language-specific neurons and loss on the held-out sentences",
        ["model", "language", "neurons", "AP \u2265 0.9", "share", "expected if permuted", "LAPE", "nats per token",
         "bits per byte"],
    )  # fmt: skip
    for model in models.models:
        neurons = model.num_layers * int(model.results.context["ffn_hidden_size"])
        for code in models.probed:
            own = model.at("ap_count_0.9", None, code)
            table.rows.append((model.name, [
                Cell(language_name(code), "text"),
                Cell(thousands(neurons)),
                _cell(own, thousands),
                Cell(MISSING if own is None else percent(own.value / neurons, 2)),
                _cell(model.at("ap_null_0.9", None, code), lambda value: f"{value:.1f}"),
                _cell(model.at("lape_count", None, code), thousands),
                _cell(model.at("nll_per_token", None, code), _three),
                _cell(model.at("bits_per_byte", None, code), _three),
            ]))  # fmt: skip
    return table


def facts_table(models: Models) -> Table:
    """Where the models came from."""
    table = Table("The models", ["model", "class", "from", "step", "layers", "width", "neurons in a layer"])
    for model in models.models:
        context = model.results.context
        told = model.captures.get(f"step-{model.step:06d}", {})
        table.rows.append((model.name, [
            Cell(str(told.get("kind", MISSING)), "text"),
            Cell(str(told.get("source", MISSING)), "text"),
            Cell(thousands(model.step)),
            Cell(str(model.num_layers)),
            Cell(thousands(int(context["hidden_size"]))) if "hidden_size" in context else Cell(MISSING),
            Cell(thousands(int(context["ffn_hidden_size"]))),
        ]))  # fmt: skip
    return table


def commands(models: Models) -> list[str]:
    """What to type to have these models captured and analysed again."""
    words = []
    for model in models.models:
        words += [entry.get("command", []) for entry in model.captures.values()]
        words.append(["xalign", "analyze", model.folder.path])
    return [shlex.join(map(str, command)) for command in words]


def _cell(row: Row | None, write: Callable[[float], str]) -> Cell:
    return Cell(MISSING if row is None else write(row.value))


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")

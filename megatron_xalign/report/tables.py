"""The tables of the report, as text in cells: headline numbers, mixture audits, facts of every run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.config.tree import to_yaml
from megatron_xalign.formats.results import Row
from megatron_xalign.report.answer import best_retrieval
from megatron_xalign.report.series import RETRIEVAL, Run, Series
from megatron_xalign.report.wording import (
    direction_name,
    duration,
    language_name,
    layer_name,
    parallel_text,
    percent,
    thousands,
)

MISSING = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One cell; ``good`` and ``bad`` colour a verdict."""

    text: str
    kind: Literal["number", "text", "good", "bad"] = "number"


@dataclass(frozen=True)
class Table:
    """A table with a caption, column heads and a head for every row."""

    caption: str
    columns: list[str]
    """The first is the head of the row heads."""
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def alignment_table(series: Series) -> Table:
    """What the first figure ends at: one row per run and pair."""
    several, unshared = len(series.pairs) > 1, series.has("retrieval_centred_unshared")
    table = Table(
        f"Alignment at step {thousands(series.step)}, each run at its best layer",
        ["parallel data", *(["languages"] if several else []), "layer", "retrieved, centred", "95\u00a0% interval",
         "chance", "untrained, best layer", "at emb",
         *(["without shared tokens"] if unshared else []), *(["not centred"] if series.has("retrieval") else []),
         "cosine gap", "CKA", "CKA permuted"],
    )  # fmt: skip
    for pair in series.pairs:
        for run in series.runs:
            best, layer = best_retrieval(run, pair, series.step), run.best_layer(pair, series.step)
            interval = MISSING
            if best.low is not None and best.high is not None:
                interval = f"{100 * best.low:.1f} to {percent(best.high)}"
            cells = [Cell(series.pair_name(pair), "text")] if several else []
            cells += [
                Cell(layer_name(layer)),
                Cell(percent(best.value)),
                Cell(interval),
                Cell(percent(series.chance)),
                _share(best_retrieval(run, pair, 0) if run.by_layer(RETRIEVAL, pair, 0) else None),
                _share(run.at(RETRIEVAL, -1, pair, series.step)),
                *([_share(run.at("retrieval_centred_unshared", layer, pair, series.step))] if unshared else []),
                *([_share(run.at("retrieval", layer, pair, series.step))] if series.has("retrieval") else []),
                _number(run.at("cosine_gap", layer, pair, series.step), 3),
                _number(run.at("cka", layer, pair, series.step), 3),
                _number(run.at("cka_permuted", layer, pair, series.step), 3),
            ]
            table.rows.append((run.label, cells))
    return table


_VERDICTS = {"for": Cell("for", "good"), "against": Cell("against", "bad"), "undecided": Cell("undecided", "text")}


def claims_table(claims: Sequence[Mapping[str, Any]], series: Series) -> Table:
    """What this series says for or against each claim, and by which test."""
    table = Table(
        "Claims, and the evidence of this series", ["claim", "languages", "evidence", "numbers", "by which test"]
    )
    for claim in claims:
        words = [Cell(text, "text") for text in (series.pair_name(claim["pair"]), claim["numbers"], claim["test"])]
        cells = [words[0], _VERDICTS[claim["verdict"]], *words[1:]]
        table.rows.append((str(claim["claim"]), cells))
    return table


def missing_table(missing: Mapping[str, str]) -> Table:
    """Runs that belong to the series and are not there."""
    table = Table("Runs that are not on this page", ["run", "why"])
    table.rows.extend((name, [Cell(why, "text")]) for name, why in missing.items())
    return table


def language_table(series: Series) -> Table:
    """Neurons and losses per run and language at the last step."""
    measures = [
        ("ap_count_0.9", "AP \u2265 0.9", 0), ("ap_null_0.9", "expected if permuted", 1), ("lape_count", "LAPE", 0),
        ("nll_per_token", "nats per token", 3), ("bits_per_byte", "bits per byte", 3),
    ]  # fmt: skip
    measures = [entry for entry in measures if series.has(entry[0])]
    table = Table(
        f"Language-specific neurons and held-out loss at step {thousands(series.step)}",
        ["parallel data", "language", *(name for _, name, _ in measures)],
    )
    for run in series.runs:
        for code in series.languages:
            cells = [Cell(language_name(code), "text")]
            cells += [_number(run.at(measure, None, code, series.step), digits) for measure, _, digits in measures]
            table.rows.append((run.label, cells))
    return table


_SHARED = [
    ("vocabulary_jaccard", "tokens used by both, of those used"), ("vocabulary_mass", "shared unigram mass"),
    ("pairs_sharing_tokens", "pairs that share a token"), ("pairs_identical", "pairs of equal tokens"),
]  # fmt: skip


def vocabulary_table(series: Series) -> Table | None:
    """What languages share before any layer, a row a pair of languages; None if the tokens were not known."""
    if not series.has("vocabulary_mass"):
        return None
    table = Table(
        "Shared before any layer: tokens of the held-out sentences (those without a letter or digit count as shared by "
        "no pair)", ["languages", *(title for _, title in _SHARED)],
    )  # fmt: skip
    run = series.runs[0]
    for pair in series.pairs:
        cells = [_share(next(iter(run.curve(measure, None, pair)), None)) for measure, _ in _SHARED]
        table.rows.append((series.pair_name(pair), cells))
    return table


def evaluation_table(series: Series) -> Table | None:
    """What ``xalign evaluate`` says of every run's last checkpoint; None if it was not run."""
    evaluation = series.runs[0].evaluation
    if evaluation is None:
        return None
    columns = [
        *(("eval_nll_per_token", subject, f"perplexity, {language_name(subject)}")
          for _, subject in series.evaluated("eval_nll_per_token")),
        *(("eval_bits_per_byte", subject, f"bits per byte, {language_name(subject)}")
          for _, subject in series.evaluated("eval_bits_per_byte")),
        *((measure, subject, f"right translation, {direction_name(subject, series.languages)}")
          for measure, subject in series.evaluated("translation_choice") if measure == "translation_choice"),
        *((measure, subject, f"{subject}, {_words(measure.removeprefix('lm_eval.'))}")
          for measure, subject in series.evaluated("lm_eval.")),
    ]  # fmt: skip
    table = Table(
        f"Evaluation of the checkpoints of step {thousands(evaluation.steps[-1])}, with 95\u00a0% intervals",
        ["parallel data", *(title for _, _, title in columns)],
    )
    for run in series.runs:
        cells = []
        for measure, subject, _ in columns:
            rows = run.evaluated(measure, subject)
            cells.append(_measured(rows[-1] if rows else None, measure))
        table.rows.append((run.label, cells))
    return table


def _measured(row: Row | None, measure: str) -> Cell:
    """A number with its interval: perplexity for nats, a share for translations."""
    if row is None:
        return Cell(MISSING)
    write: Callable[[float], str]
    if measure == "eval_nll_per_token":
        write = lambda value: thousands(math.exp(value), 1)  # noqa: E731
    elif measure == "translation_choice":
        write = percent
    else:
        write = lambda value: thousands(value, 3)  # noqa: E731
    interval = "" if row.low is None or row.high is None else f" ({write(row.low)} to {write(row.high)})"
    return Cell(write(row.value) + interval)


def audit_table(series: Series) -> Table:
    """The mixture asked for and achieved, a row per run."""
    table = Table(
        "The mixture, asked for and achieved (counted on the built index, before training)",
        ["run", "asked", "counted as", "achieved", "of content tokens", "of all tokens", "of loss-bearing tokens",
         "off by (samples)", "samples", "tokens", "holds"],
    )  # fmt: skip
    for run in series.runs:
        asked, achieved = run.audit["asked"], run.audit["achieved"]
        table.rows.append(
            (
                run.name,
                [
                    _fraction(asked, "parallel_fraction", None),
                    Cell(str(asked.get("fraction_of", MISSING)), "text"),
                    _fraction(achieved, "parallel_fraction"),
                    _fraction(achieved, "parallel_fraction_content"),
                    _fraction(achieved, "parallel_fraction_all"),
                    _fraction(achieved, "parallel_fraction_loss"),
                    _count(run.audit, "difference_samples", 2),
                    _count(run.audit, "samples"),
                    _count(run.audit, "tokens"),
                    Cell("yes", "good") if run.audit["holds"] else Cell("no", "bad"),
                ],
            )
        )
    return table


def source_table(run: Run) -> Table:
    """What one run took from each token file."""
    table = Table(
        f"Sources of {run.name}",
        ["source", "kind", "languages", "samples", "tokens", "content tokens", "tokens available", "repeats",
         "allowed", "documents begun", "documents cut"],
    )  # fmt: skip
    for source in run.audit["sources"]:
        table.rows.append(
            (
                str(source.get("name", MISSING)),
                [
                    Cell(str(source.get("origin", MISSING)), "text"),
                    Cell(", ".join(map(str, source.get("languages", []))), "text"),
                    _count(source, "samples"),
                    _count(source, "tokens"),
                    _count(source, "content_tokens"),
                    _count(source, "available_tokens"),
                    _count(source, "repeats", 2),
                    _count(source, "max_repeats", 2),
                    _count(source, "documents_begun"),
                    _count(source, "documents_cut"),
                ],
            )
        )
    return table


def mixture_language_table(run: Run) -> Table:
    """What one run read of each language."""
    table = Table(
        f"Languages of {run.name}",
        ["language", "share asked", "share achieved", "off by (samples)", "content tokens", "monolingual",
         "in parallel documents"],
    )  # fmt: skip
    for code, entry in run.audit["languages"].items():
        table.rows.append(
            (
                f"{language_name(code)} ({code})" if language_name(code) != code else code,
                [
                    _fraction(entry, "asked"),
                    _fraction(entry, "achieved", 2),
                    _count(entry, "difference_samples", 2),
                    _count(entry, "content_tokens"),
                    _count(entry, "monolingual"),
                    _count(entry, "parallel"),
                ],
            )
        )
    return table


def facts_table(series: Series, hf: Mapping[str, Path]) -> Table:
    """Sizes, seeds, layout, versions, times and places: a column per run."""
    table = Table("How each run was made", ["", *(run.name for run in series.runs)])
    every = [_facts(run, hf.get(run.name)) for run in series.runs]
    for key in dict.fromkeys(key for facts in every for key in facts):
        table.rows.append((key, [Cell(facts.get(key, MISSING), "text") for facts in every]))
    return table


def _facts(run: Run, hf: Path | None) -> dict[str, str]:
    config, starts = run.config, run.facts.get("starts", [])
    model, layout = config.model, run.facts.get("layout", {})
    throughput = [line["tokens_per_second"] for line in run.metrics if "tokens_per_second" in line]
    facts = {
        "parallel fraction": parallel_text(config.data.mixture, run.fraction),
        "seed (weights)": str(config.seed),
        "seed (mixture)": str(config.data.mixture.seed),
        "model": f"{model.num_layers} layers, hidden {thousands(model.hidden_size)}, "
        f"ffn {thousands(model.ffn_hidden_size)}, {model.num_attention_heads} heads, {model.normalization}",
        "batch": f"{thousands(config.training.global_batch_size)} samples of "
        f"{thousands(config.data.seq_length)} tokens",
        "steps": thousands(config.training.train_steps),
        "tokens": thousands(config.train_tokens),
        "precision": config.precision_name,
        "layout": ", ".join(f"{_words(name)} {size}" for name, size in _flat(layout)) or MISSING,
        "training time": duration(run.wall_seconds),
    }
    if throughput:
        facts["tokens per second (median)"] = thousands(sorted(throughput)[len(throughput) // 2])
    known = {"name", "version", "commit", "seed", "layout", "versions", "starts"}
    facts["megatron_xalign"] = str(run.facts.get("version", MISSING))
    facts["commit"] = str(run.facts.get("commit") or MISSING)
    facts["libraries"] = ", ".join(f"{name} {version}" for name, version in _flat(run.facts.get("versions", {})))
    for key, value in _flat({key: value for key, value in run.facts.items() if key not in known}):
        facts[_words(key)] = _plain(value)
    facts["started"] = "; ".join(str(start.get("time", MISSING)) for start in starts) or MISSING
    facts["command"] = "; ".join(_command(start.get("command", [])) for start in starts) or MISSING
    facts["run folder"] = str(run.folder.path)
    facts["checkpoints"] = str(run.folder.checkpoints)
    if hf is not None:
        facts["Hugging Face folder"] = str(hf)
    return facts


def _command(words: object) -> str:
    return " ".join(map(str, words)) if isinstance(words, list) else str(words)


def config_text(run: Run) -> str:
    """The resolved config, every setting included."""
    return to_yaml(run.config)


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``("a b", 1)``; items of a list are numbered from 1."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, (dict, list)) for item in tree):
        items = [(str(number), value) for number, value in enumerate(tree, start=1)]
    else:
        yield path, ", ".join(map(str, tree)) if isinstance(tree, list) else tree
        return
    for key, value in items:
        yield from _flat(value, f"{path} {key}".strip())


def corpus_tables(corpus: Any) -> list[Table]:
    """Whatever ``corpus.json`` says of the text: a table for each list or group of entries, one for all the rest."""
    if not isinstance(corpus, Mapping):
        return []
    rest = Table("The corpus", ["", "value"])
    tables = []
    for key, value in corpus.items():
        title = _words(key)
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            tables.append(_entries(f"Corpus: {title}", [("", item) for item in value]))
        elif isinstance(value, Mapping) and value and all(isinstance(item, Mapping) for item in value.values()):
            tables.append(_entries(f"Corpus: {title}", [(str(name), item) for name, item in value.items()]))
        elif isinstance(value, Mapping):
            rows = [(_words(name), [Cell(_plain(item), "text")]) for name, item in _flat(value)]
            tables.append(Table(f"Corpus: {title}", ["", "value"], rows))
        else:
            rest.rows.extend((_words(name), [Cell(_plain(item), "text")]) for name, item in _flat({key: value}))
    return [*tables, rest]


def _entries(caption: str, entries: list[tuple[str, Mapping[str, Any]]]) -> Table:
    """One row per entry, one column per key; entries without a name are headed by their first value."""
    flat = [(name, dict(_flat(entry))) for name, entry in entries]
    columns = list(dict.fromkeys(key for _, entry in flat for key in entry))
    head = "" if any(name for name, _ in flat) else columns.pop(0)
    table = Table(caption, [_words(head), *map(_words, columns)])
    for name, entry in flat:
        cells = [Cell(_plain(entry[key]) if key in entry else MISSING, "text") for key in columns]
        table.rows.append((name or str(entry.get(head, MISSING)), cells))
    return table


def _words(key: str) -> str:
    """``num_bytes`` -> ``num bytes``; language codes keep their underscore."""
    return key if re.search(r"[a-z]{3}_[A-Z][a-z]{3}", key) else key.replace("_", " ")


def _plain(value: Any) -> str:
    # Counts are large; what is small may be a seed, a version or a year.
    return thousands(value) if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _number(row: Row | None, digits: int) -> Cell:
    # Adding zero to what was rounded leaves no minus in front of nothing.
    return Cell(MISSING if row is None else thousands(round(row.value, digits) + 0.0, digits).replace("-", "\u2212"))


def _share(row: Row | None) -> Cell:
    return Cell(MISSING if row is None else percent(row.value))


def _fraction(entry: Mapping[str, Any], key: str, digits: int | None = 3) -> Cell:
    value = entry.get(key)
    return Cell(MISSING if value is None else percent(float(value), digits))


def _count(entry: Mapping[str, Any], key: str, digits: int = 0) -> Cell:
    value = entry.get(key)
    if value is None:
        return Cell(MISSING)
    return Cell(thousands(value) if float(value).is_integer() else thousands(value, digits))

"""What each figure of the report shows: panels, numbers, legend and words, from the measures of a series.

Runs are told apart by colour, and one fraction has one colour in every figure. Solid lines are measurements, dashed
lines are what chance gives, bands are 95 % bootstrap intervals over sentences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_xalign.formats.results import Row
from megatron_xalign.report.canvas import INK, MUTED, Mark, Palette, Panel, Picture
from megatron_xalign.report.panels import (
    MAX_POINTS,
    Line,
    layer_panel,
    loss_panel,
    projection_panel,
    stroke,
    survival_panel,
    training_panel,
)  # fmt: skip
from megatron_xalign.report.series import RETRIEVAL, Series, projection
from megatron_xalign.report.wording import (
    direction_name,
    language_name,
    layer_words,
    listing,
    percent,
    thousands,
)  # fmt: skip

HEADER = ("run", "parallel_fraction", "step", "consumed_tokens", "measure", "layer", "subject", "value", "low", "high")
MAX_PAIRS_DRAWN = 6
FOUND_CENTRED = "translations found (%),\nlanguages centred"


def build_figures(series: Series, palette: Palette) -> dict[str, Picture]:
    """Every figure whose measures are there, by name, in reader's order."""
    pictures = [
        alignment_over_training(series, palette),
        alignment_by_layer(series, palette),
        neurons_by_layer(series, palette),
        neurons_over_training(series, palette),
        ap_distribution(series, palette),
        projections(series, palette),
        training_loss(series, palette),
        probe_loss(series, palette),
        evaluation(series, palette),
    ]
    return {picture.name: picture for picture in pictures if picture is not None}


def alignment_over_training(series: Series, palette: Palette) -> Picture:
    """Retrieval, cosine gap and CKA against tokens seen, a row of panels for every language pair."""
    panels: list[Panel] = []
    drawn: list[Line] = []
    summary: list[str] = []
    for pair in series.pairs[:MAX_PAIRS_DRAWN]:
        best = {run.name: run.best_layer(pair, series.step) for run in series.runs}
        about = f"\n{series.pair_name(pair)}" if len(series.pairs) > 1 else ""
        retrieval = [(run, run.curve(RETRIEVAL, best[run.name], pair)) for run in series.runs]
        gap = [(run, run.curve("cosine_gap", best[run.name], pair)) for run in series.runs]
        cka = [(run, run.curve("cka", best[run.name], pair)) for run in series.runs]
        permuted = [(run, run.curve("cka_permuted", best[run.name], pair)) for run in series.runs]
        panels += [
            Panel(f"Translations retrieved{about}", training_panel(
                series, palette, retrieval, FOUND_CENTRED, scale=100, chance=series.chance, floor=0)),
            Panel(f"Cosine, translation minus random{about}", training_panel(
                series, palette, gap, "difference of cosines", chance=0.0)),
            Panel(f"{_cka(series)}{about}", training_panel(
                series, palette, cka, "similarity (0 to 1)", dashed=permuted, floor=0)),
        ]  # fmt: skip
        drawn += retrieval + gap + cka + permuted
        summary.append(
            f"{series.pair_name(pair)} at step {thousands(series.step)}: "
            + "; ".join(
                f"{run.label} parallel data {percent(_at(rows, series.step))} retrieved, languages centred"
                f" (chance {percent(series.chance)})"
                for run, rows in retrieval
            )
        )
    left_out = len(series.pairs) - MAX_PAIRS_DRAWN
    layers = "; ".join(
        f"{series.pair_name(pair)}: {_best_layers(series, pair)}" for pair in series.pairs[:MAX_PAIRS_DRAWN]
    )
    return Picture(
        name="alignment_over_training",
        title="Alignment over training",
        panels=panels,
        num_columns=3,
        legend=[
            *_run_marks(series, palette),
            *_interval_marks(series),
        ],
        header=HEADER,
        records=_records(drawn),
        alt="Alignment over training. " + ". ".join(summary) + ".",
        caption=f"Every run at the layer where it retrieves best at step {thousands(series.step)}: {layers}."
        + (f" The other {left_out} pairs are in the results of each run." if left_out > 0 else ""),
        margins=(0.76, 0.12, 0.46, 0.46 + _second_line(series)),
    )


def alignment_by_layer(series: Series, palette: Palette) -> Picture:
    """The similarity measures over layers at the last step."""
    wanted = [
        (RETRIEVAL, "", "Translations retrieved", FOUND_CENTRED),
        ("retrieval", "", "Retrieved, not centred", "translations found (%)"),
        ("mexa", "", "MEXA", "score (%)"),
        ("cosine_gap", "", "Cosine, translation minus random", "difference of cosines"),
        ("cosine_centred_gap", "", "Cosine difference, centred", "difference of cosines,\nlanguages centred"),
        ("cka", "cka_permuted", _cka(series), "similarity (0 to 1)"),
        ("pwcca", "pwcca_permuted", "PWCCA", "similarity (0 to 1)"),
    ]
    by_chance = {
        RETRIEVAL: series.chance, "retrieval": series.chance, "mexa": 1 / (2 * series.num_pairs - 1),
        "cosine_gap": 0.0, "cosine_centred_gap": 0.0,
    }  # fmt: skip
    panels: list[Panel] = []
    drawn: list[Line] = []
    for pair in series.pairs[:MAX_PAIRS_DRAWN]:
        about = f"\n{series.pair_name(pair)}" if len(series.pairs) > 1 else ""
        for measure, baseline, title, unit in wanted:
            if not series.has(measure):
                continue
            lines = [(run, run.by_layer(measure, pair, series.step)) for run in series.runs]
            dashed = [(run, run.by_layer(baseline, pair, series.step)) for run in series.runs] if baseline else []
            scale = 100.0 if "%" in unit else 1.0
            chance = by_chance.get(measure)
            # What PWCCA adds to chance is small beside its distance from 0.
            floor = None if measure.endswith("gap") or measure == "pwcca" else 0.0
            panels.append(Panel(title + about, layer_panel(
                series, palette, lines, unit, scale=scale, chance=chance, dashed=dashed, floor=floor)))  # fmt: skip
            drawn += lines + dashed
    best = [
        f"{series.pair_name(pair)}, {run.label} parallel data: best at {layer_words(run.best_layer(pair, series.step))}"
        for pair in series.pairs[:MAX_PAIRS_DRAWN]
        for run in series.runs
    ]
    return Picture(
        name="alignment_by_layer",
        title="Alignment by layer",
        panels=panels,
        num_columns=3,
        legend=[
            *_run_marks(series, palette),
            *_interval_marks(series),
        ],
        header=HEADER,
        records=_records(drawn),
        alt=f"Alignment by layer at step {thousands(series.step)}. " + "; ".join(best) + ".",
        caption=f"Step {thousands(series.step)}. emb is the output of the embedding, before any layer: what is alike "
        "there is alike token by token.",
        margins=(0.76, 0.12, 0.46, 0.34 + _second_line(series)),
    )


def neurons_by_layer(series: Series, palette: Palette) -> Picture:
    """Language-specific neurons over layers at the last step, a column of panels for every language."""
    panels: list[Panel] = []
    drawn: list[Line] = []
    summary: list[str] = []
    for measure, baseline, title in (("ap_count_0.9", "ap_null_0.9", "AP at least 0.9"), ("lape_count", "", "LAPE")):
        if not series.has(measure):
            continue
        for language in series.languages:
            lines = [(run, run.by_layer(measure, language, series.step)) for run in series.runs]
            if not any(rows for _, rows in lines):
                continue
            null = [(run, run.by_layer(baseline, language, series.step)) for run in series.runs] if baseline else []
            panels.append(Panel(f"{title} · {language_name(language)}", layer_panel(
                series, palette, lines, "neurons", dashed=null, floor=0)))  # fmt: skip
            drawn += lines + null
            summary += [
                f"{title}, {language_name(language)}, {run.label} parallel data: "
                f"{thousands(sum(row.value for row in rows))} neurons, most in layer "
                f"{max(rows, key=lambda row: row.value).layer}"
                for run, rows in lines
            ]
    return Picture(
        name="neurons_by_layer",
        title="Language-specific neurons by layer",
        panels=panels,
        num_columns=max(2, min(len(series.languages), 4)),
        legend=[*_run_marks(series, palette), Mark("expected under permuted labels", INK, "dashed")],
        header=HEADER,
        records=_records(drawn),
        alt=f"Language-specific neurons by layer at step {thousands(series.step)}. " + "; ".join(summary) + ".",
        caption=f"Step {thousands(series.step)}; every layer has {_width(series)} neurons.{_lape_share(series)}",
        margins=(0.68, 0.12, 0.46, 0.34),
    )


def neurons_over_training(series: Series, palette: Palette) -> Picture:
    """How many language-specific neurons the whole model has, against tokens seen."""
    panels: list[Panel] = []
    drawn: list[Line] = []
    summary: list[str] = []
    for measure, baseline, title in (("ap_count_0.9", "ap_null_0.9", "AP at least 0.9"), ("lape_count", "", "LAPE")):
        for language in series.languages:
            lines = [(run, run.curve(measure, None, language)) for run in series.runs]
            if not any(rows for _, rows in lines):
                continue
            null = [(run, run.curve(baseline, None, language)) for run in series.runs] if baseline else []
            panels.append(Panel(f"{title} · {language_name(language)}", training_panel(
                series, palette, lines, "neurons", dashed=null, floor=0)))  # fmt: skip
            drawn += lines + null
            summary += [
                f"{title}, {language_name(language)}, {run.label} parallel data: {thousands(rows[-1].value)}"
                for run, rows in lines
                if rows
            ]
    return Picture(
        name="neurons_over_training",
        title="Language-specific neurons over training",
        panels=panels,
        num_columns=max(2, min(len(series.languages), 4)),
        legend=[*_run_marks(series, palette), Mark("expected under permuted labels", INK, "dashed")],
        header=HEADER,
        records=_records(drawn),
        alt="Language-specific neurons in the whole model, last value. " + "; ".join(summary) + ".",
        caption="All layers together." + _lape_share(series) + _lape_source(series),
        margins=(0.68, 0.12, 0.46, 0.46),
    )


def ap_distribution(series: Series, palette: Palette) -> Picture | None:
    """How many neurons reach each average precision, for every language; None if the scores were not kept."""
    if not all("ap_scores" in run.results.arrays and run.last_step == series.step for run in series.runs):
        return None
    thresholds = np.linspace(0.0, 1.0, 101)
    panels: list[Panel] = []
    records: list[tuple[Any, ...]] = []
    for language in series.probed:
        curves = []
        for run in series.runs:
            scores = np.sort(run.results.arrays["ap_scores"][series.languages.index(language)], axis=None)
            counts = len(scores) - np.searchsorted(scores, thresholds.astype(scores.dtype), side="left")
            curves.append((run, counts))
            records += [
                (run.name, run.fraction, series.step, language, f"{threshold:.2f}", int(count))
                for threshold, count in zip(thresholds, counts, strict=True)
            ]
        panels.append(Panel(language_name(language), survival_panel(series, palette, curves, thresholds)))
    return Picture(
        name="ap_distribution",
        title="How specific neurons are",
        panels=panels,
        num_columns=max(2, min(len(series.languages), 4)),
        legend=[
            *_run_marks(series, palette),
            Mark("share of sentences in the language (a neuron blind to language)", INK, "dashed"),
        ],
        header=("run", "parallel_fraction", "step", "language", "ap_at_least", "neurons"),
        records=records,
        alt=f"Number of neurons whose average precision reaches each threshold, at step {thousands(series.step)}.",
        caption=f"Step {thousands(series.step)}; logarithmic scale.",
        margins=(0.68, 0.12, 0.46, 0.34),
    )


def projections(series: Series, palette: Palette) -> Picture | None:
    """Probe sentences on two principal components: runs down, layers across; None if there is no projection."""
    # Of replicates the first: seeds place their axes anew.
    found = [(group.runs[0], projection(group.runs[0], series.step)) for group in series.groups]
    layers = _spread_layers(series.num_layers)
    panels: list[Panel] = []
    records: list[tuple[Any, ...]] = []
    summary: list[str] = []
    for run, arrays in found:
        if arrays is None:
            return None
        coordinates, explained, languages = arrays
        for layer in layers:
            points, ratio = coordinates[layer + 1], explained[layer + 1]
            silhouette = run.at("silhouette", layer, "", series.step)
            panels.append(Panel(f"{run.label} · {_short_layer(layer)}", projection_panel(
                series.languages, palette, points, ratio, languages, silhouette)))  # fmt: skip
            records += [
                (run.name, run.fraction, series.step, layer, document, series.languages[code], float(x), float(y))
                for document, (code, (x, y)) in enumerate(zip(languages.tolist(), points, strict=True))
            ]
            if silhouette is not None:
                summary.append(f"{run.label} parallel data, {layer_words(layer)}: silhouette {silhouette.value:.2f}")
    shown = min(MAX_POINTS, series.num_pairs)
    return Picture(
        name="projections",
        title="Where sentences lie",
        panels=panels,
        num_columns=len(layers),
        legend=[Mark(language_name(code), palette.languages[code], "dot") for code in series.probed],
        header=("run", "parallel_fraction", "step", "layer", "sentence", "language", "pc1", "pc2"),
        records=records,
        alt=f"Principal components of sentence representations at step {thousands(series.step)}, coloured by language. "
        + "; ".join(summary) + ".",
        caption=f"Step {thousands(series.step)}; {thousands(shown)} sentences a language. Axes give the share of the "
        "variance each component explains; every panel has axes of its own. Silhouette: near 1 the languages lie "
        "apart, near 0 they are mixed.",
        panel_size=(2.7, 2.6),
        margins=(0.3, 0.1, 0.34, 0.34),
    )  # fmt: skip


def training_loss(series: Series, palette: Palette) -> Picture:
    """Loss on the training text, in all and by language."""
    panels: list[Panel] = []
    records: list[tuple[Any, ...]] = []
    entropies = [run.facts["unigram_entropy"] for run in series.runs if "unigram_entropy" in run.facts]
    legend, caption = _run_marks(series, palette), "Mean over each logging interval, weighted by tokens."
    if entropies:
        legend.append(Mark("unigram entropy of the text", INK, "dashed"))
        caption += (
            f" A model that knew only how frequent each token is would lose {min(entropies):.2f} to "
            f"{max(entropies):.2f} nats (dashed: the lowest of the runs' mixtures)."
        )
    for subject in ("", *series.languages):
        curves = []
        for run in series.runs:
            points = [
                (line["step"], line["consumed_tokens"], value)
                for line in run.metrics
                if (value := _loss(line, subject)) is not None
            ]
            curves.append((run, points))
            records += [(run.name, run.fraction, step, tokens, subject, value) for step, tokens, value in points]
        if any(points for _, points in curves):
            title = f"Training text · {language_name(subject)}" if subject else "Training text"
            level = min(entropies) if entropies and not subject else None
            panels.append(Panel(title, loss_panel(series, palette, curves, level)))
    return Picture(
        name="training_loss",
        title="Training loss",
        panels=panels,
        num_columns=min(3, len(panels)),
        legend=legend,
        header=("run", "parallel_fraction", "step", "consumed_tokens", "language", "loss"),
        records=records,
        alt="Training loss, last logged value. "
        + "; ".join(f"{run.label} parallel data: {run.metrics[-1]['loss']:.3f} nats per token" for run in series.runs)
        + ".",
        caption=caption,
    )


def probe_loss(series: Series, palette: Palette) -> Picture:
    """Loss on the held-out sentences by language, per token and per byte."""
    panels: list[Panel] = []
    drawn: list[Line] = []
    summary: list[str] = []
    for measure, title, unit in (
        ("nll_per_token", "Held out, per token", "nats per token"),
        ("bits_per_byte", "Held out, per byte", "bits per byte"),
    ):
        if not series.has(measure):
            continue
        for language in series.probed:
            lines = [(run, run.curve(measure, None, language)) for run in series.runs]
            panels.append(Panel(f"{title} · {language_name(language)}", training_panel(series, palette, lines, unit)))
            drawn += lines
            summary += [
                f"{language_name(language)}, {run.label} parallel data: {rows[-1].value:.3f} {unit}"
                for run, rows in lines
                if rows
            ]
    return Picture(
        name="probe_loss",
        title="Loss on held-out sentences",
        panels=panels,
        num_columns=max(2, min(len(series.languages), 4)),
        legend=_run_marks(series, palette),
        header=HEADER,
        records=_records(drawn),
        alt="Loss on held-out sentences, last value. " + "; ".join(summary) + ".",
        caption="The sentences of the probe, which no run is trained on. Tokens differ in length between languages, "
        "bytes do not depend on the tokenizer. Where the probe was held out from the parallel text, runs with more of "
        "that text have also read more of the probe's kind.",
    )


def evaluation(series: Series, palette: Palette) -> Picture | None:
    """What ``xalign evaluate`` measured of the checkpoints; None if it was not run."""
    wanted = [
        ("eval_bits_per_byte", "Text", "bits per byte", 1.0, None),
        ("translation_choice", "Right translation chosen", "of four candidates (%)", 100.0, 0.25),
    ]
    panels: list[Panel] = []
    drawn: list[Line] = []
    summary: list[str] = []
    for measure, title, unit, scale, chance in wanted:
        for _, subject in [found for found in series.evaluated(measure) if found[0] == measure]:
            lines = [(run, run.evaluated(measure, subject)) for run in series.runs]
            about = direction_name(subject, series.languages)
            panels.append(Panel(f"{title} · {about}", training_panel(
                series, palette, lines, unit, scale=scale, chance=chance)))  # fmt: skip
            drawn += lines
            summary += [
                f"{title}, {about}, {run.label} parallel data: {scale * rows[-1].value:.3g} {unit}"
                for run, rows in lines if rows
            ]
    if not panels:
        return None
    return Picture(
        name="evaluation",
        title="Evaluation of checkpoints",
        panels=panels,
        num_columns=max(2, min(len(panels), 4)),
        legend=[*_run_marks(series, palette), *_interval_marks(series)],
        header=HEADER,
        records=_records(drawn),
        alt="Evaluation of checkpoints, last value. " + "; ".join(summary) + ".",
        caption="Every saved checkpoint as a Hugging Face model. Right translation chosen: after a sentence, its "
        "translation gains more in log-probability than three wrong ones of similar length.",
        margins=(0.68, 0.12, 0.46, 0.46),
    )


def _run_marks(series: Series, palette: Palette) -> list[Mark]:
    """One entry for each group of runs; and what lines and bands are where there are several seeds."""
    marks = [
        Mark(
            f"{group.label} parallel data", palette.fraction(group.runs[0].fraction),
            "dotted" if stroke(series, group.runs[0]) else "line",
        )
        for group in series.groups
    ]
    if series.has_replicates:
        marks.append(Mark("thin: each seed; thick: their mean; band: lowest to highest seed", MUTED, "band"))
    return marks


def _interval_marks(series: Series) -> list[Mark]:
    marks = [] if series.has_replicates else [Mark("95 % interval over sentences", MUTED, "band")]
    return [*marks, Mark("chance, or permuted pairs", INK, "dashed")]


def _records(lines: Iterable[Line]) -> list[tuple[Any, ...]]:
    """Each drawn row once, as the CSV has it."""
    once = {
        (run.name, run.fraction, row.step, row.consumed_tokens, row.measure, row.layer, row.subject, row.value,
         row.low, row.high)
        for run, rows in lines
        for row in rows
    }  # fmt: skip
    return sorted(once, key=lambda record: (record[4], record[6], record[1], record[0], record[2], record[5] or 0))


def _second_line(series: Series) -> float:
    """Inches that titles need for the pair, which is named where there are several."""
    return 0.17 if len(series.pairs) > 1 else 0.0


def _best_layers(series: Series, pair: str) -> str:
    """``layer 2 (5 %) and layer 1 (30 %)``, or ``layer 2`` where all agree."""
    best = [layer_words(run.best_layer(pair, series.step)) for run in series.runs]
    if len(set(best)) == 1:
        return best[0]
    by_layer: dict[str, list[str]] = {}
    for layer, run in zip(best, series.runs, strict=True):
        by_layer.setdefault(layer, []).append(run.label)
    return listing(f"{layer} ({listing(labels)})" for layer, labels in by_layer.items())


def _loss(line: dict[str, Any], language: str) -> float | None:
    return line.get("loss_by_language", {}).get(language) if language else line["loss"]


def _at(rows: list[Row], step: int) -> float:
    return next(row.value for row in rows if row.step == step)


def _cka(series: Series) -> str:
    return "Linear CKA, debiased" if series.debiased_cka else "Linear CKA"


def _lape_share(series: Series) -> str:
    """What LAPE selects before anything is counted, where the analysis says how much."""
    context = series.runs[0].results.context
    share = context.get("lape", {}).get("top_rate")
    if share is None or "ffn_hidden_size" not in context or not series.has("lape_count"):
        return ""
    neurons = series.num_layers * context["ffn_hidden_size"]
    return (
        f" LAPE selects {percent(share, None)} of all neurons whatever training does, here "
        f"{thousands(share * neurons)} of {thousands(neurons)}: those whose activity is most confined to one language."
    )


def _lape_source(series: Series) -> str:
    """On which tokens LAPE counted, where the analysis says so and it was not always the same."""
    by_step = series.runs[0].results.context.get("lape", {}).get("source_by_step", {})
    probe = [thousands(int(step)) for step, source in by_step.items() if source == "probe"]
    if not probe:
        return ""
    return f" LAPE counts on the text trained on since the last probe; at step {listing(probe)} on the probe's own."


def _width(series: Series) -> str:
    width = series.runs[0].results.context.get("ffn_hidden_size")
    return thousands(width) if isinstance(width, int) else "equally many"


def _short_layer(layer: int) -> str:
    return "emb" if layer < 0 else f"layer {layer}"


def _spread_layers(num_layers: int) -> list[int]:
    """The embedding output and up to three layers: a third in, two thirds in, the last."""
    picked = {round(share * num_layers) - 1 for share in (1 / 3, 2 / 3, 1)}
    return [-1, *sorted(layer for layer in picked if layer >= 0)]

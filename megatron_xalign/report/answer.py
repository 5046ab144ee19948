"""The answer in words, computed from the numbers, and what each measure means.

The wording claims no more than the numbers carry: intervals are over probe sentences, so with one run per fraction
nothing is said about what another seed would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_xalign.formats.results import Row
from megatron_xalign.report.series import RETRIEVAL, Run, Series
from megatron_xalign.report.wording import (
    NO_BREAK,
    amount,
    language_name,
    listing,
    percent,
    thousands,
)

MAX_PAIRS_TOLD = 3


def answer(series: Series) -> list[str]:
    """The main sentence first, then what it supports and what it does not."""
    sentences = [_retrieved(series, pair) for pair in series.pairs[:MAX_PAIRS_TOLD]]
    if len(series.pairs) > MAX_PAIRS_TOLD:
        sentences.append(f"The other {len(series.pairs) - MAX_PAIRS_TOLD} language pairs are in the table below.")
    for pair in series.pairs[:MAX_PAIRS_TOLD]:
        sentences += _supported(series, pair)
    sentences.append(_uncertainty(series))
    return sentences


def _retrieved(series: Series, pair: str) -> str:
    parts, controls, banded = [], [], False
    for fraction, control in sorted({(run.fraction, run.control) for run in series.runs}, reverse=True):
        rows = [
            best_retrieval(run, pair, series.step)
            for run in series.runs
            if (run.fraction, run.control) == (fraction, control)
        ]
        values = [row.value for row in rows]
        found = percent(float(np.mean(values)))
        if len(rows) > 1:
            found += f" (mean of {len(rows)} runs, {percent(min(values))} to {percent(max(values))})"
        elif rows[0].low is not None and rows[0].high is not None:
            found += f" ({100 * rows[0].low:.1f} to {percent(rows[0].high)})"
            banded = True
        if control:
            controls.append(f"{found} in the control {control} at {percent(fraction, digits=None)}")
        else:
            parts.append(f"{found} with {percent(fraction, digits=None)} parallel data")
    tokens = {amount(count) for count in series.tokens}
    return (
        f"At step {thousands(series.step)} ({' / '.join(sorted(tokens))} tokens), retrieval of "
        f"{series.pair_name(pair)} translations with languages centred, at the best layer, is {listing(parts)}; "
        f"chance is {percent(series.chance)}."
        + (f" It is {listing(controls)}." if controls else "")
        + (f" In brackets: 95{NO_BREAK}% intervals over sentences." if banded else "")
    )


def _supported(series: Series, pair: str) -> list[str]:
    rows = [(run, best_retrieval(run, pair, series.step)) for run in series.runs]
    told = [(run, row) for run, row in rows if not run.control] or rows
    about = f"{series.pair_name(pair)}: " if len(series.pairs) > 1 else ""
    sentences = []
    least, most = told[0], told[-1]
    if least[0].fraction < most[0].fraction and series.seeds_per_fraction == 1:
        sentences.append(about + _compared(most, least))
    blind = [run.label for run, row in rows if (row.low if row.low is not None else row.value) <= series.chance]
    if blind:
        sentences.append(f"{about}{_are_not(series, blind)} above chance.")
    shallow = [run.label for run, _ in rows if run.best_layer(pair, series.step) == -1]
    if shallow:
        some = f"the {_runs(shallow)} with {listing(_by_group(series, shallow))} parallel data"
        which = "every run" if len(shallow) == len(rows) else some
        sentences.append(
            f"{about}The best layer of {which} is the embedding output, so there no layer of the network finds more "
            "translations than single tokens do."
        )
    untrained = [best_retrieval(run, pair, 0).value for run in series.runs if run.by_layer(RETRIEVAL, pair, 0)]
    if untrained:
        embedded = [row.value for run in series.runs if (row := run.at(RETRIEVAL, -1, pair, 0)) is not None]
        sentence = (
            f"{about}Before training, random weights already retrieve {_range(untrained)} at their best layer"
            + (f" ({_range(embedded)} at the embedding)" if embedded else "")
            + ": that much the tokens give which both sides share (names, numbers, punctuation)."
        )
        reached = [
            run.label
            for run, row in rows
            if run.label not in blind and (row.low if row.low is not None else row.value) <= max(untrained)
        ]
        if reached:
            sentence += f" {_are_not(series, reached)} clearly above that."
        sentences.append(sentence)
    return sentences


def _by_group(series: Series, labels: list[str]) -> list[str]:
    """Labels of runs; where all seeds of a group are among them, the group's."""
    found = []
    for group in series.groups:
        own = [run.label for run in group.runs if run.label in labels]
        found += [group.label] if len(own) == len(group.runs) else own
    return found


def _are_not(series: Series, labels: list[str]) -> str:
    if len(labels) == len(series.runs):
        return "No run is"
    some = f"The {_runs(labels)} with {listing(_by_group(series, labels))} parallel data"
    return f"{some} {'is' if len(labels) == 1 else 'are'} not"


def _runs(labels: list[str]) -> str:
    return "run" if len(labels) == 1 else "runs"


def _range(values: list[float]) -> str:
    """``1.3 %``, or ``1.3 % to 1.7 %`` where runs differ."""
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


def _compared(most: tuple[Run, Row], least: tuple[Run, Row]) -> str:
    more, less = f"{most[0].label} parallel data", least[0].label
    a, b = most[1], least[1]
    if a.low is None or a.high is None or b.low is None or b.high is None:
        word = "higher" if a.value > b.value else "lower" if a.value < b.value else "the same"
        return f"With {more} retrieval is {word} than with {less}; no interval was computed, so chance is not excluded."
    if a.low > b.high:
        return f"With {more} retrieval is higher than with {less}; the two intervals do not overlap."
    if a.high < b.low:
        return f"With {more} retrieval is lower than with {less}; the two intervals do not overlap."
    return f"The intervals of {most[0].label} and {less} overlap: these sentences do not tell the two runs apart."


def _uncertainty(series: Series) -> str:
    fractions = {run.fraction for run in series.runs}
    if len(series.runs) == 1:
        return (
            "This is one training run: it shows how alignment went in it, and can say nothing about what parallel data "
            "changes; the interval is over probe sentences, not over training seeds."
        )
    if len(fractions) == 1 and any(run.config.data.mixture.schedule for run in series.runs):
        return "All runs have the same share of parallel data on average; what differs is when it comes."
    if len(fractions) == 1:
        return "All runs have the same share of parallel data; how they differ is not about parallel data."
    if series.seeds_per_fraction == 1:
        return (
            "There is one training run per fraction: the intervals are over probe sentences only, and say nothing "
            "about what another training seed would give."
        )
    return (
        "Several runs share a fraction; their range shows how much training itself varies, the intervals how much the "
        "choice of probe sentences does."
    )


def best_retrieval(run: Run, pair: str, step: int) -> Row:
    """Retrieval of a pair, languages centred, at the layer where the run retrieves best."""
    row = run.at(RETRIEVAL, run.best_layer(pair, step), pair, step)
    assert row is not None
    return row


@dataclass(frozen=True)
class Explanation:
    """One measure in plain words."""

    name: str
    meaning: str
    chance: str


class Measured(Protocol):
    """What the explanations depend on."""

    @property
    def probed(self) -> list[str]:
        """Languages the probe has sentences in."""
        ...

    @property
    def num_pairs(self) -> int:
        """Probe sentences per language."""
        ...

    @property
    def chance(self) -> float:
        """Retrieval by chance."""
        ...

    @property
    def debiased_cka(self) -> bool:
        """Whether CKA is the debiased one."""
        ...

    def has(self, measure: str) -> bool:
        """Whether a measure is there."""
        ...


def explanations(series: Measured) -> list[Explanation]:
    """What every measure in the report means, and what chance alone gives."""
    share = percent(1 / len(series.probed), 0)
    known = {
        RETRIEVAL: (
            "Translations retrieved, languages centred",
            "Each language's mean over the probe sentences is taken away first, so that what is compared is what a "
            "sentence says beyond which language it is in. Then each sentence looks for its translation among all "
            "probe sentences of the other language, by the cosine between averaged residual-stream vectors; the share "
            "that find it, mean of both directions. Ties count as misses. Means and best layer come from the probe "
            "itself, for every run alike.",
            f"1 in {thousands(series.num_pairs)}, {percent(series.chance)}; the best of several layers is a little "
            "above it.",
        ),
        "retrieval": (
            "Translations retrieved, not centred",
            "The same with the vectors as they are. What all sentences of a language have in common then counts too, "
            "and can drown what tells them apart.",
            f"1 in {thousands(series.num_pairs)}, {percent(series.chance)}.",
        ),
        "retrieval_centred_unshared": (
            "Translations retrieved, pairs without shared tokens",
            "The same as the first, counted over pairs whose two sides have no token in common that holds a letter or "
            "digit. Names and numbers are alike before any layer; these pairs have none. "
            "In the results of each run, and in the table of alignment.",
            f"1 in {thousands(series.num_pairs)}, {percent(series.chance)}.",
        ),
        "mexa": (
            "MEXA",
            "Stricter: the share of translation pairs that are closer to each other than either is to any other "
            "sentence.",
            f"1 in {thousands(2 * series.num_pairs - 1)}, {percent(1 / (2 * series.num_pairs - 1), 2)}.",
        ),
        "cosine_gap": (
            "Cosine, translation minus random",
            "Mean cosine between translations, minus the mean over all pairs of sentences. The second part is "
            "taken off because vectors of a language model all point in similar directions.",
            "0.",
        ),
        "cosine_centred_gap": (
            "Cosine, translation minus random, languages centred",
            "As above, with each language's mean taken away first.",
            "0.",
        ),
        "cka": (
            "Linear CKA, debiased" if series.debiased_cka else "Linear CKA",
            "How alike two languages arrange their sentences relative to each other; 1 is the same arrangement. It "
            "does not matter whether they lie in the same place.",
            "about 0, and below it now and then; the dashed line is what shuffled pairs give."
            if series.debiased_cka
            else "what shuffled pairs give (dashed): above 0 when there are few sentences for the model's width.",
        ),
        "pwcca": (
            "PWCCA",
            "How well the directions one language uses can be predicted from the other's, weighted by how much they "
            "matter, from 0 to 1.",
            "what shuffled pairs give (dashed): far above 0 when there are few sentences for the width of the model.",
        ),
        "ap_count_0.9": (
            "Neurons with AP at least 0.9",
            "A neuron is one coordinate of an MLP's post-activation. Average precision says how well its mean "
            "activation alone ranks the sentences of one language above all others; 1 is a perfect detector.",
            f"a neuron blind to language scores near {share}, the language's share of the sentences; the dashed line "
            "is the number expected when the language labels are shuffled.",
        ),
        "lape_count": (
            "LAPE neurons",
            "Neurons whose probability of being active is concentrated on few languages: a fixed share of all neurons, "
            "those of lowest entropy, counted under each language for which they are clearly active.",
            "the share is chosen whatever the neurons do: compare layers and languages rather than totals.",
        ),
        "silhouette": (
            "Silhouette",
            "How far apart the languages lie in the space of sentence vectors: near 1 they form separate clouds, near "
            "0 they are mixed.",
            "about 0.",
        ),
        "nll_per_token": (
            "Loss on held-out sentences, per token",
            "Mean negative log-probability of each token. Languages cannot be compared by it, since a "
            "tokenizer cuts some into more pieces; runs can.",
            "about the logarithm of the vocabulary's size, as at step 0.",
        ),
        "bits_per_byte": (
            "Loss per byte",
            "The same, in bits and divided by the sentences' bytes; free of the tokenizer.",
            "what it is at step 0.",
        ),
    }
    return [Explanation(*words) for measure, words in known.items() if series.has(measure)]


def languages_in_words(series: Series) -> str:
    """``English (eng_Latn) and Finnish (fin_Latn)``."""
    return listing(
        code if language_name(code) == code else f"{language_name(code)} ({code})" for code in series.languages
    )

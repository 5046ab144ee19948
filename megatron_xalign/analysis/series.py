"""Every measure at every checkpoint of one run: statistics folders in, ``analysis/`` out.

All checkpoints are measured on the same sentences, with the same resamples and the same shuffles, so that two of them
(and two runs with the same probe) differ by the model alone. A folder that is missing, damaged or about another probe
is an error that names it, never a gap in a curve.
"""

# D documents (probe sentences), P pairs, K languages, L layers, F ffn width, H features, M = L + 1, R resamples

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.analysis import neurons, projection, resampling, retrieval, similarity, vocabulary
from megatron_xalign.analysis.representations import as_representations, centre
from megatron_xalign.config import RunConfig
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.neuron_stats import NeuronStats, list_neuron_stats, read_neuron_stats, stats_folder
from megatron_xalign.formats.results import Results, Row, write_results
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.progress import track

logger = logging.getLogger(__name__)

NULL_THRESHOLD = 0.9
"""AP at which neurons are counted under shuffled labels."""
DEBIASED_CKA_BELOW = 10
"""Sentences per feature below which plain CKA says more about D/H than about the model."""
LEAST_UNSHARED = 20
"""Pairs without a shared token below which retrieval among them is not told."""
EMBEDDING = -1
"""Number of the embedding output among the layers of residual-stream measures."""


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """What can be chosen; equal choices make runs comparable."""

    num_resamples: int = resampling.NUM_RESAMPLES
    """Bootstrap draws behind every interval."""
    num_permutations: int = 5
    """Shuffles behind every chance level."""
    seed: int = 1234
    """Of the draws and shuffles."""
    top_rate: float = 0.01
    """Share of the neurons LAPE selects."""
    filter_rate: float = 0.95
    """Quantile of activation probability a neuron must exceed somewhere to be selected."""
    bar_rate: float = 0.95
    """Quantile of activation probability that makes a selected neuron a language's own."""
    top_neurons: int = 1000
    """Size of the sets of best neurons whose overlap is measured; a hundredth of all neurons where that is less."""
    csls_neighbours: int = 10
    """Neighbours that retrieval with CSLS takes for a hub's; fewer where there are fewer sentences."""
    probe_folds: int = 5
    """Parts of the sentences for the linear language probe's cross-validation."""


@dataclass
class _Notes:
    """What the rows do not say, gathered on the way for the context."""

    lape_source: dict[str, str] = field(default_factory=dict)
    lape_bar: dict[str, float] = field(default_factory=dict)
    pwcca_ranks: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    top_by_step: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    unshared_P: dict[str, np.ndarray] = field(default_factory=dict)
    """By pair of languages: the pairs of sentences without a token in common; none of it if tokens are not known."""
    sentence_values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By measure, one array [pairs of languages, P] for every step and layer, or [K, P] for every step, in order."""


def analyze_run(
    run_folder: str | Path,
    options: AnalysisOptions | None = None,
    allow_unfinished: bool = False,
    probe_tokens: vocabulary.ProbeTokens | None = None,
) -> Results:
    """Measure every checkpoint of a run that has neuron statistics; write and return the results.

    Args:
        run_folder: with ``neurons/step-*`` as capture writes them and, where a training run made it, ``config.yaml``,
            which says which steps there must be.
        options: draws, shuffles and rates.
        allow_unfinished: also take a run whose last step is not there yet.
        probe_tokens: the probe's sentences as token ids, for what languages share before any layer; statistics do not
            hold them.

    Returns:
        what was written to ``run_folder/analysis`` (docs/analysis.md explains every measure).

    Raises:
        FormatError: there are no statistics, a step is missing, a file is damaged, steps are about different probes or
            models, or a value is not finite; the message names folder, and layer and languages where it can.
    """
    run = RunFolder(Path(run_folder))
    options = options or AnalysisOptions()
    config = _config_of(run)
    folders = _folders(run, config, allow_unfinished)
    last = read_neuron_stats(folders[-1][1])
    if last.layers != list(range(last.num_layers)):
        raise FormatError(
            f"{last.folder} holds layers {last.layers} of {last.num_layers}; the measures of a run need all of them: "
            "capture without capture.layers (or --layers). Some layers are read with formats.neuron_stats."
        )
    axes = _last_axes(last)
    counts_RP = (
        resampling.resample_counts(len(last.pair_ids), options.num_resamples, options.seed) if last.pair_ids else None
    )
    coordinates: list[np.ndarray] = []
    notes = _Notes()
    rows = [] if probe_tokens is None else _vocabulary_rows(last, probe_tokens, notes)
    ap_scores = np.zeros((0, last.num_layers, last.ffn_hidden_size), np.float32)
    for _, folder in track(folders, f"analysing {run.path.name}", " checkpoints", len(folders)):
        stats = read_neuron_stats(folder)
        _check_alike(last, stats)
        rows += _lape_rows(stats, options, notes)
        if stats.has_probe:
            ap_rows, ap_scores = _average_precision_rows(stats, options, notes)
            rows += ap_rows
            rows += _loss_rows(stats, counts_RP, notes)
            for layer, fixed in zip(range(EMBEDDING, stats.num_layers), axes, strict=True):
                with _named(stats, layer, "residual stream"):
                    acts_DH = as_representations(stats.layer("probe_residual_mean_DMH", layer))
                rows += _residual_rows(stats, layer, acts_DH, counts_RP, options, notes, stats.step == last.step)
                # The axes are fixed so that a film over steps does not jump; the centre is each step's own, so that
                # the cloud stays in view.
                coordinates.append(centre(acts_DH) @ fixed.basis_CH.T)
    rows += _kept_rows(last, folders, rows, notes)
    arrays: dict[str, np.ndarray] = {}
    if last.has_probe:
        arrays = {
            "pca_coordinates": np.stack(coordinates).reshape(len(folders), len(axes), -1, 2).astype(np.float32),
            "pca_explained": np.stack([projected.explained_ratio_C for projected in axes]).astype(np.float32),
            "pca_steps": np.array([step for step, _ in folders], np.int64),
            "document_languages": last.document_language_ids,
        }
        if len(ap_scores):
            arrays["ap_scores"] = ap_scores
        arrays |= _sentence_arrays(notes, len(folders))
    results = Results(_context(run, config, last, folders, options, notes, rows), rows, arrays)
    write_results(run.analysis, results)
    return results


def _config_of(run: RunFolder) -> RunConfig | None:
    if not run.config_path.is_file():
        # Statistics of a published model have no training run behind them.
        logger.info("%s has no config.yaml; whether steps are missing cannot be checked", run.path)
        return None
    return run.config()


def _folders(run: RunFolder, config: RunConfig | None, allow_unfinished: bool) -> list[tuple[int, Path]]:
    """Steps and folders to analyse, after checking that none is missing."""
    folders = list_neuron_stats(run.path)
    known = {path for _, path in folders}
    for path in sorted(run.neurons.glob("step-*")):
        if path not in known:
            raise FormatError(
                f"{path} is not a complete statistics folder (it has no index.json); remove it and run the training "
                "command again, which continues from the last checkpoint."
            )
    if not folders:
        raise FormatError(f"{run.neurons} holds no statistics; train with a `capture:` section, or check the path.")
    if config is None or config.capture is None:
        return folders
    steps = {step for step, _ in folders}
    begin, end, interval = run.first_step(), run.train_steps(), config.capture.probe_interval_steps
    until = max(steps) if allow_unfinished else end
    # What a branch was where it began lies with the other run.
    probed = {step for step in (*range(0, end + 1, interval), end) if step <= until and (step > begin or not begin)}
    missing = sorted(probed - steps)
    if missing:
        hint = "" if missing[0] < max(steps) else (
            f" The run goes to step {end} and has statistics up to {max(steps)}: finish it by running its command "
            "again, or analyse it as it is with allow_unfinished."
        )
        raise FormatError(
            f"{stats_folder(run.path, missing[0])} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "") + f".{hint}"
        )
    return folders


def _check_alike(first: NeuronStats, second: NeuronStats) -> None:
    """Curves need one model shape and one probe."""
    for name in (
        "languages", "num_layers", "ffn_hidden_size", "hidden_size", "probe_sha256", "document_ids",
        "document_languages", "document_pairs", "pooling", "counted_tokens",
    ):
        one, other = getattr(first.index, name), getattr(second.index, name)
        if one != other:
            detail = f" ({other!r} against {one!r})" if len(f"{one!r}{other!r}") < 200 else ""
            raise FormatError(
                f"{second.folder} and {first.folder} differ in {name}{detail}; the checkpoints of one run must be "
                "captured with one probe. Capture both again."
            )


@contextmanager
def _named(stats: NeuronStats, layer: int | None, subject: str) -> Iterator[None]:
    """Tell which numbers of which file a measure would not take."""
    try:
        yield
    except ValueError as error:
        where = "" if layer is None else f", layer {layer}"
        raise FormatError(f"{stats.folder}{where}, {subject}: {error}") from error


def _row(
    stats: NeuronStats,
    measure: str,
    layer: int | None,
    subject: str,
    value: float,
    interval: tuple[float, float] | None = None,
) -> Row:
    low, high = interval if interval is not None else (None, None)
    return Row(stats.step, stats.consumed_tokens, measure, layer, subject, float(value), low, high)


def _probed(stats: NeuronStats) -> list[str]:
    """Languages the probe has sentences in, in the order of the run's languages."""
    present = set(stats.document_languages)
    return [language for language in stats.languages if language in present]


def _layers_and_all(counts_L: Sequence[float]) -> Iterator[tuple[int | None, float]]:
    yield None, float(sum(counts_L))
    yield from ((layer, float(count)) for layer, count in enumerate(counts_L))


# --- neurons -------------------------------------------------------------------------------------------------------


def _average_precision_rows(
    stats: NeuronStats, options: AnalysisOptions, notes: _Notes
) -> tuple[list[Row], np.ndarray]:
    """Counts of language-specific neurons, and the scores of all: float32 [K, L, F] (0 for languages not probed)."""
    probed = _probed(stats)
    scores_KLF = np.zeros((len(stats.languages), stats.num_layers, stats.ffn_hidden_size), np.float32)
    rows: list[Row] = []
    if len(probed) < 2:
        return rows, scores_KLF[:0]
    order = np.concatenate([stats.rows(language) for language in probed])
    own_D = np.repeat(np.arange(len(probed)), len(stats.pair_ids))
    counts: dict[tuple[str, str], list[float]] = {}
    in_first_D = np.tile(
        np.random.default_rng(options.seed).permutation(len(stats.pair_ids)) % 2 == 0, len(probed)
    )
    halves_LKF: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for layer in range(stats.num_layers):
        scores_DF = stats.layer("probe_neuron_mean_DLF", layer)[order]
        with _named(stats, layer, ", ".join(probed)):
            precision_KF = neurons.average_precision_by_language(scores_DF, own_D, len(probed))
        for half_LKF, half_D in zip(halves_LKF, (in_first_D, ~in_first_D), strict=True):
            half_LKF.append(neurons.average_precision_by_language(scores_DF[half_D], own_D[half_D], len(probed)))
        for number, language in enumerate(probed):
            precision_F = precision_KF[number]
            low_F = neurons.average_precision(-scores_DF, own_D == number)
            null_RF = neurons.permuted_average_precision(
                scores_DF, own_D == number, options.num_permutations, options.seed
            )
            scores_KLF[stats.languages.index(language), layer] = precision_F
            for threshold, count in zip(
                neurons.AP_THRESHOLDS, neurons.count_at_least(precision_F), strict=True
            ):
                counts.setdefault((f"ap_count_{threshold:g}", language), []).append(float(count))
            null = float(neurons.count_at_least(null_RF, [NULL_THRESHOLD])[0]) / options.num_permutations
            counts.setdefault((f"ap_null_{NULL_THRESHOLD:g}", language), []).append(null)
            low = float(neurons.count_at_least(low_F, [NULL_THRESHOLD])[0])
            counts.setdefault((f"ap_low_count_{NULL_THRESHOLD:g}", language), []).append(low)
    for (measure, language), counts_L in counts.items():
        rows += [_row(stats, measure, layer, language, count) for layer, count in _layers_and_all(counts_L)]
    size = _top_size(stats, options)
    top = {
        language: neurons.top_neurons(scores_KLF[stats.languages.index(language)], size) for language in probed
    }
    notes.top_by_step[stats.step] = top
    for one, other in itertools.combinations(probed, 2):
        rows.append(_row(stats, "ap_top_jaccard", None, f"{one}-{other}", neurons.jaccard(top[one], top[other])))
    for number, language in enumerate(probed):
        first, second = (
            neurons.top_neurons(np.stack(half_LKF)[:, number].astype(np.float32), size) for half_LKF in halves_LKF
        )
        rows.append(_row(stats, "ap_top_split_half", None, language, neurons.jaccard(first, second)))
    return rows, scores_KLF


def _top_size(stats: NeuronStats, options: AnalysisOptions) -> int:
    return max(1, min(options.top_neurons, stats.num_layers * stats.ffn_hidden_size // 100))


def _kept_rows(
    last: NeuronStats, folders: list[tuple[int, Path]], rows: list[Row], notes: _Notes
) -> list[Row]:
    """How much each step's best neurons are already those of the last step."""
    consumed = {row.step: row.consumed_tokens for row in rows}
    final = notes.top_by_step.get(last.step, {})
    return [
        Row(step, consumed[step], "ap_top_kept", None, language, neurons.jaccard(top, final[language]))
        for step, _ in folders
        for language, top in notes.top_by_step.get(step, {}).items()
    ]


def _lape_rows(stats: NeuronStats, options: AnalysisOptions, notes: _Notes) -> list[Row]:
    """LAPE from training tokens where every language had some since the last probe, else from probe tokens."""
    source = "none"
    if len(stats.languages) > 1:
        if stats.has_stream and (stats.stream_tokens_K > 0).all():
            source = "stream"
        elif stats.has_probe and (stats.probe_tokens_K > 0).all():
            source = "probe"
    notes.lape_source[str(stats.step)] = source
    if source == "none":
        return []
    positive_KLF = stats.stream_gate_positive_KLF if source == "stream" else stats.probe_gate_positive_KLF
    tokens_K = stats.stream_tokens_K if source == "stream" else stats.probe_tokens_K
    with _named(stats, None, "lape"):
        found = neurons.lape(positive_KLF, tokens_K, options.top_rate, options.filter_rate, options.bar_rate)
    notes.lape_bar[str(stats.step)] = found.bar
    return [
        _row(stats, "lape_count", layer, language, count)
        for language, own_LF in zip(stats.languages, found.languages_of, strict=True)
        for layer, count in _layers_and_all(own_LF.sum(axis=1))
    ]


# --- vocabulary ----------------------------------------------------------------------------------------------------


def _vocabulary_rows(last: NeuronStats, tokens: vocabulary.ProbeTokens, notes: _Notes) -> list[Row]:
    """What two languages share before any layer, which no training changes: rows of the last step."""
    if len(tokens.by_document) != len(last.document_ids):
        raise ValueError(f"{len(tokens.by_document)} sentences as tokens; the probe has {len(last.document_ids)}.")
    own = {
        language: [tokens.by_document[row] for row in last.rows(language).tolist()] for language in _probed(last)
    }
    rows = []
    for (one, tokens_a), (other, tokens_b) in itertools.combinations(own.items(), 2):
        subject = f"{one}-{other}"
        count_a, count_b = (
            np.bincount(np.concatenate([np.asarray(ids, np.int64) for ids in side]), minlength=tokens.vocab_size)
            for side in (tokens_a, tokens_b)
        )
        shared = vocabulary.vocabulary_overlap(count_a, count_b)
        shares_P = vocabulary.shares_tokens(tokens_a, tokens_b, tokens.wordless)
        notes.unshared_P[subject] = ~shares_P
        for measure, value in (
            ("vocabulary_jaccard", shared.jaccard), ("vocabulary_mass", shared.mass),
            ("pairs_sharing_tokens", shares_P.mean()),
            ("pairs_identical", vocabulary.identical_pairs(tokens_a, tokens_b).mean()),
        ):
            rows.append(_row(last, measure, None, subject, value))
    return rows


# --- loss ----------------------------------------------------------------------------------------------------------


def _loss_rows(stats: NeuronStats, counts_RP: np.ndarray | None, notes: _Notes) -> list[Row]:
    """Loss on the probe per language; over tokens, and over bytes, which compares between tokenizers."""
    rows = []
    if stats.pair_ids:
        losses = np.stack([stats.probe_nll_D[stats.rows(language)] for language in _probed(stats)])
        notes.sentence_values.setdefault("sentence_nll", []).append(losses)
    for language in _probed(stats):
        where = stats.rows(language)
        nats_P = stats.probe_nll_D[where]
        if not np.isfinite(nats_P).all():
            raise FormatError(f"{stats.folder}, {language}: the loss of a probe sentence is not finite.")
        for measure, unit_P, scale in (
            ("nll_per_token", stats.probe_tokens_D[where], 1.0),
            ("bits_per_byte", stats.probe_bytes_D[where], 1 / np.log(2)),
        ):
            if not (unit_P > 0).all():
                raise FormatError(f"{stats.folder}, {language}: a probe sentence is empty.")
            interval = None
            if counts_RP is not None:
                # A resample is a new corpus: its nats over its tokens, not the mean of per-sentence ratios.
                interval = resampling.percentile_interval((counts_RP @ nats_P) / (counts_RP @ unit_P) * scale)
            rows.append(_row(stats, measure, None, language, nats_P.sum() / unit_P.sum() * scale, interval))
    return rows


# --- residual stream -----------------------------------------------------------------------------------------------


def _residual_rows(
    stats: NeuronStats,
    layer: int,
    acts_DH: np.ndarray,
    counts_RP: np.ndarray | None,
    options: AnalysisOptions,
    notes: _Notes,
    is_last: bool,
) -> list[Row]:
    """Every measure of one layer's sentence vectors; ``layer`` -1 is the embedding output."""
    probed = _probed(stats)
    rows = []
    if len(probed) > 1:
        with _named(stats, layer, "silhouette"):
            rows.append(
                _row(stats, "silhouette", layer, "", projection.silhouette(acts_DH, stats.document_language_ids))
            )
        with _named(stats, layer, "linear probe"):
            told = projection.linear_probe(
                acts_DH, stats.document_language_ids, np.array(stats.index.document_pairs),
                min(options.probe_folds, len(stats.pair_ids)), seed=options.seed,
            )  # fmt: skip
        rows.append(_row(stats, "language_probe", layer, "", told.accuracy))
    gaps, hits = [], []
    for one, other in itertools.combinations(probed, 2):
        subject = f"{one}-{other}"
        assert counts_RP is not None  # two probed languages have complete pairs, see _last_axes
        with _named(stats, layer, subject):
            values = _pair_measures(acts_DH[stats.rows(one)], acts_DH[stats.rows(other)], counts_RP, options, is_last)
        rank_a, rank_b = values.ranks
        notes.pwcca_ranks.setdefault(subject, {})[str(layer)] = [rank_a, rank_b]
        rows += [
            _row(stats, measure, layer, subject, value, values.intervals.get(measure))
            for measure, value in values.values.items()
        ]
        unshared_P = notes.unshared_P.get(subject)
        if unshared_P is not None and unshared_P.sum() >= LEAST_UNSHARED:
            share = values.sentence_hits_P[unshared_P].mean() / 2
            rows.append(_row(stats, "retrieval_centred_unshared", layer, subject, share))
        gaps.append(values.sentence_gap_P)
        hits.append(values.sentence_hits_P)
    if gaps:
        notes.sentence_values.setdefault("sentence_gap", []).append(np.stack(gaps))
        notes.sentence_values.setdefault("sentence_retrieval", []).append(np.stack(hits))
    return rows


def _sentence_arrays(notes: _Notes, num_steps: int) -> dict[str, np.ndarray]:
    """What each pair of sentences adds to a measure, for tests between runs on the same sentences."""
    arrays = {}
    for name, values in notes.sentence_values.items():
        stacked = np.stack(values)
        if name != "sentence_nll":
            # [T x M, J, P] to [T, J, M, P]
            stacked = stacked.reshape(num_steps, -1, *stacked.shape[1:]).swapaxes(1, 2)
        arrays[name] = np.ascontiguousarray(stacked, np.uint8 if name == "sentence_retrieval" else np.float32)
    return arrays


@dataclass(frozen=True)
class _PairMeasures:
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    ranks: tuple[int, int]
    sentence_gap_P: np.ndarray
    sentence_hits_P: np.ndarray
    """uint8: directions, 0 to 2, in which the translation is found with languages centred."""


def _pair_measures(
    acts_a_PH: np.ndarray, acts_b_PH: np.ndarray, counts_RP: np.ndarray, options: AnalysisOptions, is_last: bool
) -> _PairMeasures:
    plain = similarity.cosine(acts_a_PH, acts_b_PH)
    centred = similarity.cosine(acts_a_PH, acts_b_PH, centred=True)
    canonical = similarity.pwcca_with_baseline(acts_a_PH, acts_b_PH, options.num_permutations, options.seed)
    debiased = _debiased(*acts_a_PH.shape)
    found = retrieval.bitext_accuracy(acts_a_PH, acts_b_PH)
    found_centred = retrieval.bitext_accuracy(acts_a_PH, acts_b_PH, centred=True)
    found_csls = retrieval.bitext_accuracy(
        acts_a_PH, acts_b_PH, csls_neighbours=min(options.csls_neighbours, len(acts_a_PH))
    )
    values = {
        "cosine_translation": plain.translation,
        "cosine_random": plain.random,
        "cosine_gap": plain.gap,
        "cosine_centred_gap": centred.gap,
        "cosine_auc": retrieval.cosine_auc(acts_a_PH, acts_b_PH),
        "pwcca": canonical.mean,
        "pwcca_forward": canonical.forward,
        "pwcca_backward": canonical.backward,
        "pwcca_permuted": canonical.permuted,
        "cka": similarity.linear_cka(acts_a_PH, acts_b_PH, debiased),
        "cka_permuted": similarity.permuted_cka(
            acts_a_PH, acts_b_PH, debiased, options.num_permutations, options.seed
        ),
        "retrieval": found.mean,
        "retrieval_forward": found.forward,
        "retrieval_backward": found.backward,
        "retrieval_centred": found_centred.mean,
        "retrieval_csls": found_csls.mean,
        "mexa": retrieval.mexa(acts_a_PH, acts_b_PH),
    }
    if is_last:
        # Decompositions of their own; over training they would cost more than all the rest.
        values["pwcca_split"] = similarity.pwcca(acts_a_PH, acts_b_PH, mode="split").value
        values["svcca"] = similarity.svcca(acts_a_PH, acts_b_PH).value
    intervals = {
        "cosine_gap": similarity.resampled_cosine_gap(acts_a_PH, acts_b_PH, counts_RP),
        "cosine_centred_gap": similarity.resampled_cosine_gap(acts_a_PH, acts_b_PH, counts_RP, centred=True),
    }
    # Sentences are resampled as queries; what they are searched among stays as it is.
    for measure, hit_P in (
        ("retrieval", (found.forward_hit_D.astype(float) + found.backward_hit_D) / 2),
        ("retrieval_forward", found.forward_hit_D),
        ("retrieval_backward", found.backward_hit_D),
        ("retrieval_centred", (found_centred.forward_hit_D.astype(float) + found_centred.backward_hit_D) / 2),
        ("retrieval_csls", (found_csls.forward_hit_D.astype(float) + found_csls.backward_hit_D) / 2),
        ("mexa", found.forward_hit_D & found.backward_hit_D),
    ):
        intervals[measure] = counts_RP @ hit_P / len(hit_P)
    return _PairMeasures(
        values,
        {measure: resampling.percentile_interval(values_R) for measure, values_R in intervals.items()},
        (canonical.rank_a, canonical.rank_b),
        similarity.sentence_gaps(acts_a_PH, acts_b_PH),
        found_centred.forward_hit_D.astype(np.uint8) + found_centred.backward_hit_D,
    )


def _debiased(num_sentences: int, num_features: int) -> bool:
    return num_sentences < DEBIASED_CKA_BELOW * num_features


def _last_axes(last: NeuronStats) -> list[projection.Projection]:
    """Principal axes of every layer at the last step, embedding output first; also checks the probe's size."""
    if not last.has_probe:
        return []
    if len(last.pair_ids) < 4:
        raise FormatError(
            f"{last.folder} has {len(last.pair_ids)} probe pairs with a sentence in every probed language "
            f"({', '.join(_probed(last))}); at least 4 are needed, and some hundreds for numbers that mean something."
        )
    complete = set(last.pair_ids)
    if len(complete) < len(set(last.index.document_pairs)):
        pair = next(pair for pair in last.index.document_pairs if pair not in complete)
        held = {
            language
            for language, of in zip(last.document_languages, last.index.document_pairs, strict=True)
            if of == pair
        }
        missing = [language for language in _probed(last) if language not in held]
        raise FormatError(
            f"{last.folder}: {len(set(last.index.document_pairs)) - len(complete)} of "
            f"{len(set(last.index.document_pairs))} probe pairs lack a sentence in a probed language, the first is "
            f"{pair}, which has none in {', '.join(missing)}. Languages can only be compared on the same sentences: "
            "take such pairs out of the probe, or translate them."
        )
    axes = []
    for layer in range(EMBEDDING, last.num_layers):
        with _named(last, layer, "pca"):
            axes.append(projection.pca(last.layer("probe_residual_mean_DMH", layer), 2))
    return axes


# --- context -------------------------------------------------------------------------------------------------------


def _context(
    run: RunFolder,
    config: RunConfig | None,
    last: NeuronStats,
    folders: list[tuple[int, Path]],
    options: AnalysisOptions,
    notes: _Notes,
    rows: list[Row],
) -> dict[str, Any]:
    num_pairs, probed = len(last.pair_ids), _probed(last)
    chance: dict[str, Any] = {}
    if num_pairs and len(probed) > 1:
        chance = {
            "retrieval": 1 / num_pairs,
            # A translation competes with the rest of its row and of its column.
            "mexa": 1 / (2 * num_pairs - 1),
            "cosine_auc": 0.5,
            "average_precision": {language: 1 / len(probed) for language in probed},
            "language_probe": 1 / len(probed),
            "ap_top_jaccard": neurons.chance_jaccard(
                _top_size(last, options), _top_size(last, options), last.num_layers * last.ffn_hidden_size
            ),
            "pwcca": _mean_of(rows, "pwcca_permuted"),
            "cka": _mean_of(rows, "cka_permuted"),
        }
    return {
        "run": last.run_name or run.path.name,
        "parallel_fraction": None if config is None else config.parallel_fraction,
        "seed": None if config is None else config.seed,
        "languages": last.languages,
        "probed_languages": probed,
        "num_layers": last.num_layers,
        "ffn_hidden_size": last.ffn_hidden_size,
        "hidden_size": last.hidden_size,
        "num_neurons": last.num_layers * last.ffn_hidden_size,
        "num_pairs": num_pairs,
        "pair_ids": last.pair_ids,
        "language_pairs": [f"{one}-{other}" for one, other in itertools.combinations(probed, 2)],
        "top_neurons": _top_size(last, options),
        "num_documents": len(last.document_ids),
        "sentences_per_feature": num_pairs / last.hidden_size,
        "pooling": last.index.pooling,
        "counted_tokens": last.index.counted_tokens,
        "probe_sha256": last.index.probe_sha256,
        "steps": [step for step, _ in folders],
        "train_steps": None if config is None else run.train_steps(),
        "chance": chance,
        "cka": "debiased" if _debiased(num_pairs, last.hidden_size) else "plain",
        "pwcca": {
            "mode": "definition",
            "value": "mean of both directions",
            "rank_tolerance": similarity.RANK_TOLERANCE,
            "ranks_at_last_step": notes.pwcca_ranks,
        },
        "lape": {
            "source_by_step": notes.lape_source,
            "bar_by_step": notes.lape_bar,
            "top_rate": options.top_rate,
            "filter_rate": options.filter_rate,
            "bar_rate": options.bar_rate,
        },
        "intervals": {
            "level": resampling.LEVEL,
            "num_resamples": options.num_resamples,
            "covers": "the choice of probe sentences, not the training seed",
        },
        "pairs_without_shared_tokens": {subject: int(own_P.sum()) for subject, own_P in notes.unshared_P.items()},
        "num_permutations": options.num_permutations,
        "analysis_seed": options.seed,
    }


def _mean_of(rows: list[Row], measure: str) -> float:
    return float(np.mean([row.value for row in rows if row.measure == measure]))

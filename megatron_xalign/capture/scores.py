"""Measures of alignment at every probe, while the run goes on: what `xalign analyze` computes afterwards, in small.

Of the training batches since the last probe LAPE is computed too.

The measures themselves are handed in (``ScoreFunctions``), as rooms do not import one another. Each process scores the
neurons it holds, data- and context-parallel ranks an equal part each; counts alone travel, except that for LAPE, which
ranks neurons of all layers together, the first process sees the counts of positive gates of all.
"""

# D documents (probe sentences), P pairs, K languages, L captured layers, F ffn width, M = L + 1 residual rows, H width

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xalign.capture.probe import ProbeResult, ProbeSentence
from megatron_xalign.capture.recorder import Recorder
from megatron_xalign.capture.writing import agree, error_of
from megatron_xalign.formats.atomic import write_text
from megatron_xalign.topology import Ranks

AP_THRESHOLD = 0.9
"""Average precision from which on a neuron counts as a language's own."""

SCORES_FILE = "scores.jsonl"
"""In a run folder: one object per probe."""


@dataclass(frozen=True)
class ScoreFunctions:
    """The measures, pure functions of arrays."""

    average_precision: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """float [D, N] scores and bool [D] -> [N]."""
    lape_languages: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """int64 [K, L, F] positive counts and int64 [K] tokens -> bool [K, L, F]: which neuron is a language's own."""
    cosine_gap: Callable[[np.ndarray, np.ndarray], float]
    """Two float [P, H] of translations."""
    retrieval: Callable[[np.ndarray, np.ndarray], float]
    """The same."""


def score_probe(
    result: ProbeResult,
    sentences: Sequence[ProbeSentence],
    languages: Sequence[str],
    recorder: Recorder,
    captured: Sequence[int],
    ranks: Ranks,
    functions: ScoreFunctions,
    most_pairs: int,
) -> dict[str, Any]:
    """Score one probe; every process of the job calls it, and all get the same.

    Args:
        result: the probe.
        sentences: what was probed.
        languages: codes of the K languages.
        recorder: what this process holds.
        captured: captured layers over all processes, in order.
        ranks: this process's place.
        functions: the measures.
        most_pairs: pairs that AP, cosines and retrieval are computed on, spread evenly over the probe.

    Returns:
        ``ap_count_0.9`` and ``lape_count``: language -> ``{"all", "layers": [L]}``; ``cosine_gap`` and ``retrieval``:
        ``eng_Latn-fin_Latn`` -> ``{"mean", "layers": [M]}``, the first of the input of the first layer. Empty if fewer
        than two languages, or fewer than two pairs in all of them, are probed.

    Raises:
        XAlignError: a measure could not be computed in some process.
    """
    probed = [language for language in languages if any(sentence.language == language for sentence in sentences)]
    rows_KP = _aligned_rows(sentences, probed, most_pairs)
    if len(probed) < 2 or rows_KP.shape[1] < 2:
        return {}
    places = {layer: place for place, layer in enumerate(captured)}
    pairs = list(itertools.combinations(range(len(probed)), 2))
    ap_KL, lape_KL = (np.zeros((len(probed), len(captured))) for _ in range(2))
    gap_RM, retrieval_RM = (np.zeros((len(pairs), len(captured) + 1)) for _ in range(2))
    gates_KLF = _all_gates(result.gate_positive_KLF, recorder, places, ranks)

    def compute() -> None:
        width = result.neuron_mean_DLF.shape[2]
        copies = ranks.size_of("data_context")
        first, stop = (width * (ranks.data_context_rank + step) // copies for step in (0, 1))
        in_language = np.repeat(np.arange(len(probed)), rows_KP.shape[1])
        for row, layer in enumerate(recorder.layers):
            scores_DN = result.neuron_mean_DLF[rows_KP.ravel(), row, first:stop]
            for k in range(len(probed)):
                precision_N = functions.average_precision(scores_DN, in_language == k)
                ap_KL[k, places[layer]] = (precision_N >= AP_THRESHOLD).sum()
        if ranks.rank == 0:
            lape_KL[:] = _lape_counts(gates_KLF, sentences, languages, probed, functions)
        if ranks.tensor_rank == 0 and ranks.data_context_rank == 0:
            for row, number in enumerate(recorder.residual_rows):
                place = 0 if number == 0 else places[number - 1] + 1
                for pair, (one, other) in enumerate(pairs):
                    acts = [result.residual_mean_DMH[rows_KP[k], row] for k in (one, other)]
                    gap_RM[pair, place] = functions.cosine_gap(*acts)
                    retrieval_RM[pair, place] = functions.retrieval(*acts)

    agree(ranks, error_of(compute))
    # Every number is computed in one process, or is a sum of counts over several; elsewhere it is zero.
    ap_KL, lape_KL, gap_RM, retrieval_RM = (
        ranks.sum_over(torch.from_numpy(array).to(ranks.device), "world").cpu().numpy()
        for array in (ap_KL, lape_KL, gap_RM, retrieval_RM)
    )
    named = ["-".join(probed[k] for k in pair) for pair in pairs]
    return {
        f"ap_count_{AP_THRESHOLD:g}": _counts(probed, ap_KL),
        "lape_count": _counts(probed, lape_KL),
        "cosine_gap": _means(named, gap_RM),
        "retrieval": _means(named, retrieval_RM),
    }


def score_stream(
    gate_positive_KLF: np.ndarray,
    tokens_K: np.ndarray,
    languages: Sequence[str],
    recorder: Recorder,
    captured: Sequence[int],
    ranks: Ranks,
    functions: ScoreFunctions,
) -> dict[str, Any]:
    """Score the training batches of a window; every process of the job calls it, and all get the same.

    Args:
        gate_positive_KLF: int64 [K, L, F]: positive gates of this process's layers and neurons, over all its tokens'
            processes.
        tokens_K: int64 [K]: tokens of each language, the same on every process.
        languages: codes of the K languages.
        recorder: what this process holds.
        captured: captured layers over all processes, in order.
        ranks: this process's place.
        functions: the measures.

    Returns:
        ``lape_count_stream``: language -> ``{"all", "layers": [L]}``, of the languages that the window had tokens of;
        empty if those are fewer than two.

    Raises:
        XAlignError: the measure could not be computed.
    """
    read = np.flatnonzero(tokens_K)
    if len(read) < 2:
        return {}
    gates_KLF = _all_gates(gate_positive_KLF, recorder, {layer: place for place, layer in enumerate(captured)}, ranks)
    lape_KL = np.zeros((len(read), len(captured)))

    def compute() -> None:
        if ranks.rank == 0:
            lape_KL[:] = functions.lape_languages(gates_KLF[read], tokens_K[read]).sum(axis=2)

    agree(ranks, error_of(compute))
    lape_KL = ranks.sum_over(torch.from_numpy(lape_KL).to(ranks.device), "world").cpu().numpy()
    return {"lape_count_stream": _counts([languages[int(k)] for k in read], lape_KL)}


def append_scores(folder: str | Path, line: Mapping[str, Any]) -> None:
    """Add one line to ``scores.jsonl`` of a run; lines of this step or later ones, of a run that was killed, go.

    So a step has one line however often it was done.
    """
    path = Path(folder) / SCORES_FILE
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            before = json.loads(text)
        except ValueError:
            continue  # cut off when the run was killed
        if before["step"] < line["step"]:
            kept.append(text)
    kept.append(json.dumps(dict(line), ensure_ascii=False, allow_nan=False))
    write_text(path, "".join(text + "\n" for text in kept))


def numbers_by_layer(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores for trackers, which take numbers by name and no lists: ``ap_count_0.9/fin_Latn/layer_03``.

    In measures of the residual stream, whose lists are one longer, ``layer_input`` is the input of the first layer; the
    other numbers count captured layers.
    """
    return {
        measure: {
            subject: {
                **{name: value for name, value in numbers.items() if name != "layers"},
                **{
                    _layer_name(place - ("mean" in numbers)): value
                    for place, value in enumerate(numbers["layers"])
                },
            }
            for subject, numbers in subjects.items()
        }
        for measure, subjects in scores.items()
    }


def _layer_name(place: int) -> str:
    return "layer_input" if place < 0 else f"layer_{place:02d}"


def _aligned_rows(sentences: Sequence[ProbeSentence], probed: Sequence[str], most_pairs: int) -> np.ndarray:
    """int64 [K, P]: sentences of each language, aligned by pair; pairs without one of the languages are left out."""
    by_pair: dict[str, dict[str, int]] = {}
    for row, sentence in enumerate(sentences):
        by_pair.setdefault(sentence.pair_id, {})[sentence.language] = row
    complete = [rows for rows in by_pair.values() if len(rows) == len(probed)]
    count = min(most_pairs, len(complete))
    chosen = [complete[number * len(complete) // count] for number in range(count)]
    return np.array([[rows[language] for rows in chosen] for language in probed], np.int64).reshape(len(probed), -1)


def _all_gates(
    own_KLF: np.ndarray, recorder: Recorder, places: Mapping[int, int], ranks: Ranks
) -> np.ndarray:
    """int64 [K, L, F]: positive gates of all captured layers and neurons."""
    parts = ranks.gather_over(torch.from_numpy(own_KLF).to(ranks.device), "tensor")
    own = torch.cat(parts, dim=2)
    whole = torch.zeros(len(own), len(places), own.shape[2], dtype=own.dtype, device=own.device)
    for row, layer in enumerate(recorder.layers):
        whole[:, places[layer]] = own[:, row]
    return ranks.sum_over(whole, "pipeline").cpu().numpy()


def _lape_counts(
    gates_KLF: np.ndarray, sentences: Sequence[ProbeSentence], languages: Sequence[str], probed: Sequence[str],
    functions: ScoreFunctions,
) -> np.ndarray:
    tokens_K = np.zeros(len(probed), np.int64)
    for sentence in sentences:
        tokens_K[probed.index(sentence.language)] += len(sentence.tokens)
    own_KLF = gates_KLF[[list(languages).index(language) for language in probed]]
    return functions.lape_languages(own_KLF, tokens_K).sum(axis=2)


def _counts(names: Sequence[str], counts_KL: np.ndarray) -> dict[str, Any]:
    return {
        name: {"all": int(counts_L.sum()), "layers": [int(count) for count in counts_L]}
        for name, counts_L in zip(names, counts_KL, strict=True)
    }


def _means(names: Sequence[str], values_RM: np.ndarray) -> dict[str, Any]:
    return {
        name: {"mean": float(values_M.mean()), "layers": [float(value) for value in values_M]}
        for name, values_M in zip(names, values_RM, strict=True)
    }

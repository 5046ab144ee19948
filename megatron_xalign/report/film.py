"""The projections as a film: every probed step and every layer, small enough to lie in the page."""

# T steps, M layers and the embedding output, D documents

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from megatron_xalign.report.canvas import Palette
from megatron_xalign.report.series import Run, Series

MOST_BYTES = 1_500_000
"""Of all points together; with many steps, layers and runs fewer sentences are shown."""
MOST_SENTENCES = 150


def build_film(series: Series, palette: Palette) -> dict[str, Any] | None:
    """What the page's script draws; None if there is no projection.

    Returns:
        ``steps`` [T], ``layers`` M, ``languages`` (of each point an index into ``colors``), ``order`` in which points
        are drawn, and per run ``label``, ``points`` (URL-safe base64 of uint8 [T, M, D, 2], each layer on a scale of
        its own that holds over training) and ``silhouette`` [T][M].
    """
    runs = [group.runs[0] for group in series.groups]
    if not all({"pca_coordinates", "pca_steps", "document_languages"} <= set(run.results.arrays) for run in runs):
        return None
    shared = set.intersection(*(set(run.results.arrays["pca_steps"].tolist()) for run in runs))
    steps = sorted(step for step in shared if step <= series.step)
    if len(steps) < 2:
        return None
    languages = runs[0].results.arrays["document_languages"]
    per_sentence = 2 * len(runs) * len(steps) * (series.num_layers + 1) * len(series.probed)
    sentences = max(10, min(MOST_SENTENCES, MOST_BYTES // max(per_sentence, 1)))
    shown = np.concatenate([np.flatnonzero(languages == code)[:sentences] for code in np.unique(languages)])
    colors = {color: name for name, (color, _) in palette.variables.items()}
    return {
        "steps": steps,
        "layers": series.num_layers + 1,
        "languages": languages[shown].tolist(),
        "order": _interleaved(languages[shown]),
        "colors": [f"--{colors[palette.languages[code]]}" for code in series.languages],
        "runs": [
            {"label": run.label, "points": _points(run, steps, shown), "silhouette": _silhouettes(series, run, steps)}
            for run in runs
        ],
    }


def _interleaved(languages_D: np.ndarray) -> list[int]:
    """The first of each language, then the second of each, and so on."""
    place_D = np.zeros(len(languages_D), np.int64)
    for code in np.unique(languages_D):
        own = languages_D == code
        place_D[own] = np.arange(np.sum(own))
    return [int(index) for index in np.argsort(place_D, kind="stable")]


def _points(run: Run, steps: list[int], shown: np.ndarray) -> str:
    arrays = run.results.arrays
    rows = [arrays["pca_steps"].tolist().index(step) for step in steps]
    points_TMDC = arrays["pca_coordinates"][rows][:, :, shown].astype(np.float64)
    # One scale for both axes and all steps, or growing apart could not be told from growing.
    low = points_TMDC.min(axis=(0, 2), keepdims=True)
    width = np.maximum((points_TMDC.max(axis=(0, 2), keepdims=True) - low).max(axis=3, keepdims=True), 1e-12)
    scaled = np.rint(255 * (points_TMDC - low) / width)
    return base64.urlsafe_b64encode(scaled.astype(np.uint8).tobytes()).decode("ascii")


def _silhouettes(series: Series, run: Run, steps: list[int]) -> list[list[float | None]]:
    found = []
    for step in steps:
        rows = [run.at("silhouette", layer, "", step) for layer in range(-1, series.num_layers)]
        found.append([None if row is None else round(row.value, 3) for row in rows])
    return found

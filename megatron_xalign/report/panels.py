"""What is drawn inside one pair of axes: lines over training or over layers, distributions, projections.

Each function returns a ``draw(axes)`` for a ``canvas.Panel``, which is called once for the page and once for the files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_xalign.formats.results import Row
from megatron_xalign.report.canvas import HOVER, INK, MUTED, STEP_LABEL, Palette
from megatron_xalign.report.series import Run, Series
from megatron_xalign.report.wording import amount, layer_name, percent, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 150
"""Sentences drawn per language in one projection; the CSV holds all of them."""

Line = tuple[Run, list[Row]]
Draw = Callable[["Axes"], None]


def training_panel(
    series: Series,
    palette: Palette,
    lines: Sequence[Line],
    unit: str,
    *,
    scale: float = 1.0,
    chance: float | None = None,
    dashed: Sequence[Line] = (),
    floor: float | None = None,
) -> Draw:
    def draw(axes: Axes) -> None:
        _draw_lines(axes, series, palette, lines, dashed, _tokens, scale, chance)
        _token_axis(axes, series)
        _value_axis(axes, unit, floor)

    return draw


def layer_panel(
    series: Series,
    palette: Palette,
    lines: Sequence[Line],
    unit: str,
    *,
    scale: float = 1.0,
    chance: float | None = None,
    dashed: Sequence[Line] = (),
    floor: float | None = None,
) -> Draw:
    def draw(axes: Axes) -> None:
        _draw_lines(axes, series, palette, lines, dashed, _layer, scale, chance)
        first = min((row.layer for _, rows in lines for row in rows if row.layer is not None), default=0)
        stride = max(1, -(-series.num_layers // 8))
        ticks = ([-1] if first < 0 else []) + list(range(0, series.num_layers, stride))
        axes.set_xticks(ticks, [layer_name(layer) for layer in ticks])
        axes.set_xlim(first - 0.3, series.num_layers - 0.7)
        axes.set_xlabel("layer")
        _value_axis(axes, unit, floor)

    return draw


def survival_panel(
    series: Series, palette: Palette, curves: Sequence[tuple[Run, np.ndarray]], thresholds: np.ndarray
) -> Draw:
    def draw(axes: Axes) -> None:
        for run, counts in curves:
            shown = counts > 0
            color = palette.fraction(run.fraction)
            axes.plot(
                thresholds[shown], counts[shown], color=color, linestyle=_dash(series, run),
                linewidth=_thin(series, run) + 0.4, gid=f"{HOVER}{run.label}",
            )  # fmt: skip
        axes.axvline(1.0 / len(series.probed), color=INK, linestyle="--", linewidth=1.0)
        axes.set_yscale("log")
        axes.set_xlim(0.0, 1.0)
        axes.set_xlabel("average precision at least")
        axes.set_ylabel("neurons")
        axes.yaxis.set_major_formatter(_formatter(lambda value: thousands(value)))
        axes.yaxis.set_minor_formatter(_formatter(lambda value: ""))

    return draw


def projection_panel(
    codes: Sequence[str],
    palette: Palette,
    points: np.ndarray,
    ratio: np.ndarray,
    languages: np.ndarray,
    silhouette: Row | None,
) -> Draw:
    def draw(axes: Axes) -> None:
        for index, language in enumerate(codes):
            own = points[languages == index][:MAX_POINTS]
            axes.plot(
                own[:, 0], own[:, 1], linestyle="", marker="o", markersize=3.2, markeredgewidth=0, alpha=0.6,
                color=palette.languages[language],
            )  # fmt: skip
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.margins(0.08)
        axes.set_xlabel(f"PC 1 ({percent(float(ratio[0]), 0)})")
        axes.set_ylabel(f"PC 2 ({percent(float(ratio[1]), 0)})")
        if silhouette is not None:
            axes.text(
                1.0, -0.05, f"silhouette {silhouette.value:.2f}", transform=axes.transAxes, ha="right", va="top",
                color=INK, fontsize=8,
            )  # fmt: skip
            axes.xaxis.set_label_coords(0.0, -0.045)
            axes.xaxis.label.set_horizontalalignment("left")

    return draw


def loss_panel(
    series: Series, palette: Palette, curves: Sequence[tuple[Run, list[tuple[int, int, float]]]], level: float | None
) -> Draw:
    def draw(axes: Axes) -> None:
        for run, points in curves:
            axes.plot(
                [tokens for _, tokens, _ in points], [value for _, _, value in points],
                color=palette.fraction(run.fraction), linestyle=_dash(series, run), linewidth=_thin(series, run),
                gid=f"{HOVER}{run.label}",
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color=INK, linestyle="--", linewidth=1.0)
        _token_axis(axes, series)
        _value_axis(axes, "nats per token", None)

    return draw


def _draw_lines(
    axes: Axes,
    series: Series,
    palette: Palette,
    lines: Sequence[Line],
    dashed: Sequence[Line],
    place: Callable[[Row], float],
    scale: float,
    chance: float | None,
) -> None:
    for curve in _curves(series, dashed, place):
        axes.plot(
            curve.x, scale * curve.mean, color=palette.fraction(curve.runs[0].fraction), linestyle="--", linewidth=1.1
        )
    if chance is not None:
        axes.axhline(scale * chance, color=INK, linestyle="--", linewidth=1.1)
    curves = _curves(series, lines, place)
    for number, curve in enumerate(curves):
        color = palette.fraction(curve.runs[0].fraction)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, scale * curve.low, scale * curve.high, color=color, alpha=0.18, linewidth=0)
        for values in curve.each:
            axes.plot(curve.x, scale * values, color=color, linewidth=0.8, alpha=0.55)
        # Counts are often the same: a line is drawn wider where later ones would hide it.
        extra = 1.6 * sum(_share_a_stretch(curve, later) for later in curves[number + 1 :])
        (line,) = axes.plot(
            curve.x, scale * curve.mean, color=color, linestyle=_dash(series, curve.runs[0]), linewidth=2.0 + extra,
            marker="o" if len(curve.x) <= 16 else "", markersize=4.0 + extra,
        )  # fmt: skip
        line.set_gid(f"{HOVER}{curve.label}")


@dataclass(frozen=True)
class _Curve:
    """What one group of runs gives: a run with its interval over sentences, or the mean over seeds with their range."""

    label: str
    runs: list[Run]
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    each: list[np.ndarray]
    """Every seed, where there are several."""


def _curves(series: Series, lines: Sequence[Line], place: Callable[[Row], float]) -> list[_Curve]:
    by_name = {run.name: rows for run, rows in lines if rows}
    curves = []
    for group in series.groups:
        runs = [run for run in group.runs if run.name in by_name]
        if not runs:
            continue
        # Replicates are probed at the same places; where one was stopped early the others stop with it.
        shared = set.intersection(*({place(row) for row in by_name[run.name]} for run in runs))
        kept = [[row for row in by_name[run.name] if place(row) in shared] for run in runs]
        x = np.array([place(row) for row in kept[0]])
        values = np.array([[row.value for row in rows] for rows in kept])
        low = high = None
        if len(runs) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
        elif all(row.low is not None and row.high is not None for row in kept[0]):
            low, high = (np.array([getattr(row, end) for row in kept[0]]) for end in ("low", "high"))
        each = list(values) if len(runs) > 1 else []
        curves.append(_Curve(group.label, runs, x, values.mean(axis=0), low, high, each))
    return curves


def _share_a_stretch(one: _Curve, other: _Curve) -> bool:
    """Whether two lines coincide from one point to the next."""
    pairs = zip(zip(one.x, one.mean, strict=True), zip(other.x, other.mean, strict=True), strict=False)
    same = [a == b for a, b in pairs]
    return any(here and there for here, there in itertools.pairwise(same))


def _tokens(row: Row) -> float:
    return row.consumed_tokens


def _layer(row: Row) -> float:
    assert row.layer is not None
    return row.layer


_DASHES = ("-", (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)), (0, (4, 1.5)))
# Dots first, as the legend has them: plain dashes are chance.
# Groups that share a fraction share its colour, so the stroke tells them apart.


def stroke(series: Series, run: Run) -> int:
    """How many groups of the same fraction come before the run's."""
    same = [group.runs[0].name for group in series.groups if group.runs[0].fraction == run.fraction]
    return same.index(series.group_of(run).runs[0].name)


def _dash(series: Series, run: Run) -> Any:
    return _DASHES[stroke(series, run) % len(_DASHES)]


def _thin(series: Series, run: Run) -> float:
    """Line width of a run among others of its group."""
    return 1.6 if len(series.group_of(run).runs) == 1 else 0.9


def _token_axis(axes: Axes, series: Series) -> None:
    """Tokens below, steps above where one step is as many tokens in every run."""
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_locator(_locator())
    axes.xaxis.set_major_formatter(_formatter(lambda value: "0" if value == 0 else amount(value)))
    per_step = {run.config.training.global_batch_size * run.config.data.seq_length for run in series.runs}
    if len(per_step) == 1:
        tokens = per_step.pop()
        low, high = axes.get_xlim()
        steps = [step for step in _locator().tick_values(0.0, high / tokens) if low <= step * tokens <= high]
        for step in steps:
            axes.annotate(
                f"step {thousands(step)}" if step == steps[0] else thousands(step), (step * tokens, 1.0),
                xycoords=axes.get_xaxis_transform(), xytext=(0, 3), textcoords="offset points", ha="center",
                color=MUTED, fontsize=7.5, gid=STEP_LABEL,
            )  # fmt: skip


def _value_axis(axes: Axes, unit: str, floor: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(unit)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=unit == "neurons"))
    axes.yaxis.set_major_formatter(_formatter(_plain))
    if floor is not None:
        # From the floor up, but never cutting off what lies below it.
        low, high = axes.dataLim.y0, axes.get_ylim()[1]
        least = 1.0 if unit == "neurons" else 0.0
        if low >= floor:
            high = max(high, floor + least) if high > floor else floor + 1.0
            axes.set_ylim(floor - 0.02 * (high - floor), high + 0.02 * (high - floor))  # room for whole marks


def _formatter(write: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: write(value))


def _locator() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])


def _plain(value: float) -> str:
    """A tick without more digits than it needs, and with thousands separators."""
    if abs(value) >= 1000:
        return thousands(value)
    return f"{value:.4g}".replace("-", "\u2212")

"""From panels to files: one drawing as inline SVG that follows the page's colours, and as PNG, PDF and CSV.

The page places panels side by side or, on a phone, one below the other; PNG and PDF hold all of them in one image.
Colours are drawn as the light palette's hex codes and replaced by CSS variables in the SVG, so the same drawing is
readable in light and dark.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_LABEL = "step-label"
"""Marks the labels above an axis of tokens."""
HOVER = "hover:"
"""Begins the name of a line whose points tell their values under the pointer; what follows is its label."""

INK, MUTED, GRID = "#1d232a", "#5a6572", "#d5dae0"
FIXED_VARIABLES = {"ink": (INK, "#e8ecf1"), "muted": (MUTED, "#a3aebb"), "grid": (GRID, "#343c46")}

# After Okabe and Ito, made to be told apart with any colour vision; the second of each pair is for dark pages.
LANGUAGE_COLORS = (
    ("#0072b2", "#4fa9e6"), ("#d55e00", "#ff8c42"), ("#009e73", "#2fcf9f"), ("#cc79a7", "#e59cc5"),
    ("#b58900", "#e5bd4a"), ("#56b4e9", "#9bd6f7"), ("#8c564b", "#c99387"), ("#7f7f00", "#c2c24d"),
)  # fmt: skip

# No parallel data is grey; then viridis, the dark end for the largest share on white, the bright end on black.
_NO_PARALLEL = ("#868f99", "#8d97a3")
_LIGHT_RAMP, _DARK_RAMP = (0.64, 0.04), (0.5, 0.97)


@dataclass(frozen=True)
class Mark:
    """One entry of a legend."""

    label: str
    color: str
    """Hex code of the light palette."""
    kind: Literal["line", "dashed", "dotted", "band", "dot"] = "line"


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Picture:
    """One figure of the report: its panels, the numbers drawn, and its words."""

    name: str
    """File name without ending."""
    title: str
    panels: Sequence[Panel]
    num_columns: int
    legend: Sequence[Mark]
    header: Sequence[str]
    """Columns of the CSV."""
    records: Sequence[Sequence[Any]]
    """Rows of the CSV: every number that is drawn."""
    alt: str
    """What the figure shows, with its key numbers, for readers who do not see it."""
    caption: str
    panel_size: tuple[float, float] = (3.7, 2.7)
    """Width and height of one panel, inches."""
    margins: tuple[float, float, float, float] = (0.6, 0.12, 0.46, 0.46)
    """Inches left, right, below and above the axes; fixed, so that the axes of neighbours are aligned."""


@dataclass(frozen=True)
class Palette:
    """Colours of one report, the same for a fraction in every figure."""

    fractions: dict[float, tuple[str, str]]
    """Parallel fraction -> (light, dark) hex code."""
    languages: dict[str, str]
    """Language code -> hex code of the light palette."""
    variables: dict[str, tuple[str, str]] = field(default_factory=dict)
    """CSS variable -> (light, dark) hex code."""

    def fraction(self, fraction: float) -> str:
        """The light palette's colour of a fraction."""
        return self.fractions[fraction][0]

    def variable(self, color: str) -> str:
        """The CSS value that stands for a light-palette colour in the page."""
        for name, (light, _) in self.variables.items():
            if light == color:
                return f"var(--{name})"
        return color

    def css(self) -> str:
        """Declarations of every variable, for light and dark."""
        light = "".join(f"--{name}:{pair[0]};" for name, pair in self.variables.items())
        dark = "".join(f"--{name}:{pair[1]};" for name, pair in self.variables.items())
        return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def build_palette(fractions: Sequence[float], languages: Sequence[str]) -> Palette:
    """Give every fraction and language its colour; a larger share of parallel data is a stronger colour."""
    positive = sorted({fraction for fraction in fractions if fraction > 0})
    ramp: dict[float, tuple[str, str]] = {0.0: _NO_PARALLEL}
    for index, fraction in enumerate(positive):
        place = index / (len(positive) - 1) if len(positive) > 1 else 1.0
        ramp[fraction] = (_viridis(_LIGHT_RAMP, place), _viridis(_DARK_RAMP, place))
    colors = {code: LANGUAGE_COLORS[index % len(LANGUAGE_COLORS)] for index, code in enumerate(languages)}
    variables = dict(FIXED_VARIABLES)
    for index, fraction in enumerate(sorted(ramp)):
        variables[f"f{index}"] = ramp[fraction]
    for index, pair in enumerate(dict.fromkeys(colors.values())):
        variables[f"l{index}"] = pair
    return Palette(ramp, {code: pair[0] for code, pair in colors.items()}, variables)


def _viridis(ends: tuple[float, float], place: float) -> str:
    matplotlib = import_matplotlib()
    from matplotlib.colors import to_hex

    return str(to_hex(matplotlib.colormaps["viridis"](ends[0] + place * (ends[1] - ends[0]))))


def import_matplotlib() -> Any:
    """matplotlib, or an error that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "the report needs matplotlib, which is not installed: pip install 'megatron-xalign[report]'"
        ) from None
    return matplotlib


def drawing_style() -> AbstractContextManager[None]:
    """The look of every figure, as a context manager; global settings are left as they were."""
    matplotlib = import_matplotlib()
    style: AbstractContextManager[None] = matplotlib.rc_context(
        {
            "font.family": "DejaVu Sans", "font.size": 9.0, "text.color": INK, "text.parse_math": False,
            "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
            "axes.titlecolor": INK, "axes.labelcolor": MUTED, "axes.labelsize": 8.5,
            "axes.edgecolor": MUTED, "axes.linewidth": 0.8, "axes.facecolor": "none",
            "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
            "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.0, "ytick.labelsize": 8.0,
            "xtick.major.size": 3.0, "ytick.major.size": 0.0, "legend.frameon": False, "legend.fontsize": 9.0,
            "lines.linewidth": 2.0, "lines.markersize": 4.0, "lines.solid_capstyle": "round",
            "svg.fonttype": "none", "pdf.fonttype": 42, "figure.dpi": 100, "savefig.facecolor": "none",
        }
    )  # fmt: skip
    return style


def draw_panel(panel: Panel, picture: Picture, index: int, palette: Palette) -> str:
    """One panel as an ``<svg>`` element without outside references, ids of its own and the page's colours.

    ``data-points`` holds what the pointer can ask for: ``[[x, y, what it is], ...]`` in the drawing's own units.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=picture.panel_size)
    _draw_into(figure, panel, picture, 0.0, 0.0)
    points = _points(figure)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"{picture.name}-{index}"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = _inline(text.getvalue(), f"{picture.name}-{index}-", palette)
    if not points:
        return svg
    told = json.dumps(points, ensure_ascii=False, separators=(",", ":"))
    return svg.replace("<svg", f'<svg data-points="{html.escape(told)}"', 1)


MAX_HOVER_POINTS = 60
"""Of one line; of a longer one (losses) every so many."""


def _points(figure: Figure) -> list[tuple[float, float, str]]:
    """Where the points of the named lines lie, in points (1/72 inch) from the upper left, and their values as text."""
    figure.draw_without_rendering()  # places the axes' limits
    (axes,) = figure.axes
    height = figure.get_size_inches()[1] * 72
    points = []
    for line in axes.lines:
        name = str(line.get_gid() or "")
        if not name.startswith(HOVER):
            continue
        data = np.asarray(line.get_xydata(), np.float64)
        stride = max(1, -(-len(data) // MAX_HOVER_POINTS))
        for (x, y), (across, up) in zip(
            data[::stride], axes.transData.transform(data[::stride]) * 72 / figure.dpi, strict=True
        ):
            told = f"{name.removeprefix(HOVER)}: {_value(y)} at {_words_of(axes.get_xlabel())} {_value(x)}"
            points.append((round(float(across), 1), round(height - float(up), 1), told))
    return points


def _words_of(label: str) -> str:
    return "tokens" if label == "tokens seen" else label


def _value(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"
    return text.replace("-", "\u2212")


def write_files(picture: Picture, folder: Path) -> None:
    """Write NAME.png (200 dots an inch), NAME.pdf and NAME.csv."""
    figure = compose(picture)
    figure.savefig(folder / f"{picture.name}.png", dpi=200, facecolor="white")
    # A creation date would make two reports of the same numbers differ.
    figure.savefig(folder / f"{picture.name}.pdf", facecolor="white", metadata={"CreationDate": None})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(picture.header)
    writer.writerows(picture.records)
    write_text(folder / f"{picture.name}.csv", text.getvalue())


def compose(picture: Picture) -> Figure:
    """All panels and the legend in one figure, for paper."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    num_rows = -(-len(picture.panels) // picture.num_columns)
    panel_width, panel_height = picture.panel_size
    width = panel_width * picture.num_columns
    labels = [mark.label for mark in picture.legend]
    widths = [0.62 + 0.075 * len(label) for label in labels]  # inches, at the legend's nine points
    num_legend_columns = len(labels) if sum(widths) < width else max(1, int(width / max(widths)))
    legend_height = 0.12 + 0.2 * -(-len(labels) // num_legend_columns)
    figure = Figure(figsize=(width, panel_height * num_rows + legend_height))
    for index, panel in enumerate(picture.panels):
        row, column = divmod(index, picture.num_columns)
        _draw_into(figure, panel, picture, column * panel_width, (num_rows - 1 - row) * panel_height)
    shapes = {"line": ("-", ""), "dashed": ("--", ""), "dotted": (":", ""), "dot": ("", "o")}
    handles: list[Any] = [
        Patch(facecolor=mark.color, alpha=0.25)
        if mark.kind == "band"
        else Line2D([], [], color=mark.color, linestyle=shapes[mark.kind][0], marker=shapes[mark.kind][1])
        for mark in picture.legend
    ]
    figure.legend(handles=handles, labels=labels, loc="upper left", ncols=num_legend_columns, borderaxespad=0.3)
    return figure


def _draw_into(figure: Figure, panel: Panel, picture: Picture, left: float, bottom: float) -> None:
    """Draw a panel whose lower left corner is ``left`` and ``bottom`` inches into the figure."""
    total_width, total_height = figure.get_size_inches()
    (width, height), (west, east, south, north) = picture.panel_size, picture.margins
    axes = figure.add_axes(
        (
            (left + west) / total_width,
            (bottom + south) / total_height,
            (width - west - east) / total_width,
            (height - south - north) / total_height,
        )
    )
    panel.draw(axes)
    # Above the labels of the steps, where there are some.
    axes.set_title(panel.title, pad=16.0 if axes.texts and axes.texts[0].get_gid() == STEP_LABEL else 8.0)


def _inline(svg: str, prefix: str, palette: Palette) -> str:
    """Fit a standalone SVG into a page: no prologue, no metadata, ids of its own, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Inside tags only: what a run is called must come out as it is.
    svg = re.sub(r"<[^>]*>", lambda tag: _inline_tag(tag.group(), prefix, palette), svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"(<g[^>]*)>((?:<use[^>]*/>){2,})</g>", _hoist_style, svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", opening)
    return f'{opening} aria-hidden="true" focusable="false">{rest}'.strip()


def _hoist_style(group: re.Match[str]) -> str:
    """Say once, on the group, what hundreds of its points would each say again."""
    opening, uses = group.groups()
    styles = set(re.findall(r' style="[^"]*"', uses))
    if len(styles) != 1 or " style=" in opening:
        return group.group()
    (style,) = styles
    return f"{opening}{style}>{uses.replace(style, '')}</g>"


def _inline_tag(tag: str, prefix: str, palette: Palette) -> str:
    tag = tag.replace("xlink:href=", "href=")
    if tag.startswith("<g "):
        tag = re.sub(r'\sid="[^"]*"', "", tag)  # names of groups, which nothing refers to
    tag = re.sub(r'\bid="', f'id="{prefix}', tag)
    tag = re.sub(r'href="#', f'href="#{prefix}', tag)
    tag = re.sub(r"url\(#", f"url(#{prefix}", tag)
    for name, (light, _) in palette.variables.items():
        tag = tag.replace(light, f"var(--{name})")
    # Six decimals of a point are below what any screen shows, and half of the page's size.
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)

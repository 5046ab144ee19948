"""Figures of models side by side, over depth instead of layers; see ``report.models``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_xalign.formats.results import Row
from megatron_xalign.report.canvas import FIXED_VARIABLES, HOVER, INK, LANGUAGE_COLORS, Mark, Palette, Panel, Picture
from megatron_xalign.report.models import Model, Models
from megatron_xalign.report.panels import projection_panel
from megatron_xalign.report.series import RETRIEVAL, projection
from megatron_xalign.report.wording import language_name, layer_words, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ("model", "measure", "layer", "depth", "subject", "value", "low", "high")

_ALIGNMENT = (
    (RETRIEVAL, "", "Translations retrieved", "translations found (%),\nlanguages centred"),
    ("retrieval", "", "Retrieved, not centred", "translations found (%)"),
    ("cosine_centred_gap", "", "Cosine difference, centred", "difference of cosines,\nlanguages centred"),
    ("cka", "cka_permuted", "CKA", "similarity (0 to 1)"),
    ("pwcca", "pwcca_permuted", "PWCCA", "similarity (0 to 1)"),
    ("mexa", "", "MEXA", "score (%)"),
)

Line = tuple[Model, list[tuple[int, Row]]]


def build_model_palette(models: Models) -> Palette:
    """A colour for every model, and one for every language."""
    colors = {code: LANGUAGE_COLORS[index % len(LANGUAGE_COLORS)] for index, code in enumerate(models.probed)}
    used = [*LANGUAGE_COLORS[: len(models.models)], *colors.values()]
    variables = FIXED_VARIABLES | {f"l{index}": pair for index, pair in enumerate(dict.fromkeys(used))}
    return Palette({}, {code: pair[0] for code, pair in colors.items()}, variables)


def build_model_figures(models: Models, palette: Palette) -> dict[str, Picture]:
    """Every figure whose measures are there, by name, in reader's order."""
    pictures = [alignment_by_depth(models), neurons_by_depth(models), projections(models, palette)]
    return {picture.name: picture for picture in pictures if picture is not None}


def alignment_by_depth(models: Models) -> Picture:
    """The similarity measures over depth, a row of panels for every pair."""
    panels: list[Panel] = []
    drawn: list[Line] = []
    told: list[str] = []
    for pair in models.pairs:
        about = f"\n{models.pair_name(pair)}" if len(models.pairs) > 1 else ""
        for measure, baseline, title, unit in _ALIGNMENT:
            if not models.has(measure):
                continue
            lines = [(model, model.by_layer(measure, pair)) for model in models.models]
            dashed = [(model, model.by_layer(baseline, pair)) for model in models.models] if baseline else []
            chance = {RETRIEVAL: models.chance, "retrieval": models.chance, "cosine_centred_gap": 0.0}.get(measure)
            scale = 100.0 if "%" in unit else 1.0
            panels.append(Panel(title + about, _over_depth(models, lines, dashed, unit, scale, chance)))
            drawn += lines + dashed
        told += [
            f"{models.pair_name(pair)}, {model.name}: {percent(model.rows[RETRIEVAL, layer, pair].value)} found at "
            f"{layer_words(layer)}"
            for model in models.models
            for layer in (model.best_layer(pair),)
        ]
    return Picture(
        name="alignment_by_depth", title="Alignment by depth", panels=panels, num_columns=3,
        legend=[*_marks(models), Mark("95 % interval over sentences", INK, "band"), Mark("chance", INK, "dashed")],
        header=HEADER, records=_records(drawn), alt="Alignment by depth. " + "; ".join(told) + ".",
        caption="Depth 0 is the output of the embedding, 1 that of the last layer.",
        margins=(0.76, 0.12, 0.46, 0.34 + (0.17 if len(models.pairs) > 1 else 0.0)),
    )  # fmt: skip


def neurons_by_depth(models: Models) -> Picture:
    """Language-specific neurons as a share of their layer, a panel for every language."""
    panels: list[Panel] = []
    drawn: list[Line] = []
    for measure, baseline, title in (("ap_count_0.9", "ap_null_0.9", "AP at least 0.9"), ("lape_count", "", "LAPE")):
        for code in models.probed if models.has(measure) else ():
            lines = [(model, _shares(model, measure, code)) for model in models.models]
            dashed = [(model, _shares(model, baseline, code)) for model in models.models] if baseline else []
            panels.append(Panel(f"{title} · {language_name(code)}", _over_depth(
                models, lines, dashed, "% of the layer's neurons", 100.0, None)))  # fmt: skip
            drawn += lines + dashed
    return Picture(
        name="neurons_by_depth", title="Language-specific neurons by depth", panels=panels,
        num_columns=max(2, min(len(models.probed), 4)),
        legend=[*_marks(models), Mark("expected under permuted labels", INK, "dashed")], header=HEADER,
        records=_records(drawn), alt="Language-specific neurons as a share of each layer's neurons, over depth.",
        caption="Neurons of the last layer lie at depth 1. LAPE selects a fixed share of all neurons: its figures tell "
        "where they lie, not how many there are.",
        margins=(0.68, 0.12, 0.46, 0.34),
    )  # fmt: skip


def projections(models: Models, palette: Palette) -> Picture | None:
    """Sentences on two principal components: the embedding, the best layer and the last of every model."""
    panels: list[Panel] = []
    records: list[tuple[Any, ...]] = []
    for model in models.models:
        arrays = projection(model, model.step)
        if arrays is None:
            return None
        points_MD2, explained_M2, languages_D = arrays
        codes = list(model.results.context["languages"])
        layers = dict.fromkeys((-1, model.best_layer(models.pairs[0]), model.num_layers - 1))
        for layer in (*layers, *(-2,) * (3 - len(layers))):
            if layer == -2:
                panels.append(Panel("", _nothing))
                continue
            points_D2, ratio = points_MD2[layer + 1], explained_M2[layer + 1]
            apart = model.at("silhouette", layer, "")
            panels.append(Panel(
                f"{model.name} · {'emb' if layer < 0 else f'layer {layer}'}",
                projection_panel(codes, palette, points_D2, ratio, languages_D, apart),
            ))  # fmt: skip
            records += [
                (model.name, layer, number, codes[code], float(x), float(y))
                for number, (code, (x, y)) in enumerate(zip(languages_D.tolist(), points_D2, strict=True))
            ]
    return Picture(
        name="model_projections", title="Where sentences lie", panels=panels, num_columns=3,
        legend=[Mark(language_name(code), palette.languages[code], "dot") for code in models.probed],
        header=("model", "layer", "sentence", "language", "pc1", "pc2"), records=records,
        alt="Principal components of sentence representations, coloured by language.",
        caption="The embedding output, the layer that retrieves best, and the last layer, with axes of their own. "
        "Silhouette: near 1 the languages lie apart, near 0 they are mixed.",
        panel_size=(2.9, 2.7), margins=(0.3, 0.1, 0.34, 0.34),
    )  # fmt: skip


def _shares(model: Model, measure: str, code: str) -> list[tuple[int, Row]]:
    width = int(model.results.context["ffn_hidden_size"])
    return [
        (layer, Row(row.step, row.consumed_tokens, f"{measure}_share", layer, code, row.value / width))
        for layer, row in model.by_layer(measure, code)
    ]


def _marks(models: Models) -> list[Mark]:
    return [Mark(model.name, _color(models, model)) for model in models.models]


def _color(models: Models, model: Model) -> str:
    return LANGUAGE_COLORS[[other.name for other in models.models].index(model.name)][0]


def _records(lines: Sequence[Line]) -> list[tuple[Any, ...]]:
    return [
        (model.name, row.measure, layer, round(model.depth(layer), 6), row.subject, row.value, row.low, row.high)
        for model, rows in lines
        for layer, row in rows
    ]


def _over_depth(
    models: Models, lines: Sequence[Line], dashed: Sequence[Line], unit: str, scale: float, chance: float | None
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for model, rows in dashed:
            axes.plot(
                [model.depth(layer) for layer, _ in rows], [scale * row.value for _, row in rows],
                color=_color(models, model), linestyle="--", linewidth=1.1,
            )  # fmt: skip
        if chance is not None:
            axes.axhline(scale * chance, color=INK, linestyle="--", linewidth=1.1)
        for model, rows in lines:
            depths, color = [model.depth(layer) for layer, _ in rows], _color(models, model)
            if rows and all(row.low is not None and row.high is not None for _, row in rows):
                low, high = ([scale * float(getattr(row, end)) for _, row in rows] for end in ("low", "high"))
                axes.fill_between(depths, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(
                depths, [scale * row.value for _, row in rows], color=color, linewidth=2.0,
                marker="o" if len(rows) <= 16 else "", markersize=4.0, gid=f"{HOVER}{model.name}",
            )  # fmt: skip
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("depth")
        axes.set_ylabel(unit)

    return draw


def _nothing(axes: Axes) -> None:
    """Where the best layer is the last, or the embedding, there is one panel less."""
    axes.set_axis_off()

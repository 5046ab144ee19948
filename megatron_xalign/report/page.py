"""One self-contained page about a series of runs, or about captured models, and every figure as PNG, PDF and CSV.

```
OUT/index.html        styles, figures and a small script inside, no request to anywhere
OUT/figures/NAME.png NAME.pdf NAME.csv
```
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign import __version__
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import read_json, whole_folder, write_text
from megatron_xalign.progress import progress_bar
from megatron_xalign.report import answer, models, tables
from megatron_xalign.report.canvas import Palette, Picture, build_palette, draw_panel, drawing_style, write_files
from megatron_xalign.report.figures import build_figures
from megatron_xalign.report.film import build_film
from megatron_xalign.report.model_figures import build_model_figures, build_model_palette
from megatron_xalign.report.series import Series, read_series
from megatron_xalign.report.wording import amount, language_name, listing, percent, thousands

if TYPE_CHECKING:
    from jinja2 import Template


def write_report(
    run_folders: Sequence[Path],
    out: Path,
    *,
    title: str = "Parallel data and cross-lingual alignment",
    commands: Sequence[str] = (),
    corpus: Path | None = None,
    hf: Mapping[str, Path] | None = None,
    controls: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
    claims: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the report of a series.

    Args:
        run_folders: 1 to 64 run folders with ``analysis/`` inside; the order does not matter.
        out: folder to write; ``out/figures`` is replaced, other files in it stay.
        title: heading of the page.
        commands: what to type to make all of this again, one line each.
        corpus: ``corpus.json`` or the folder that holds it.
        hf: Hugging Face folder by run name, where a run was converted.
        controls: name of the control by run name, of runs that belong to one.
        missing: why a run that belongs here is not here, by its name; told at the top.
        claims: what the comparison says for and against each claim (``analysis.claims``).

    Returns:
        ``out/index.html``, the last file written.

    Raises:
        FormatError: a piece of a run is missing or unreadable, or the runs cannot be compared (see ``read_series``).
        ConfigError: matplotlib or jinja2 is not installed, or the number of runs is not 1 to 64.
    """
    template = _template("page.html")
    series = read_series([Path(folder) for folder in run_folders], controls)
    corpus_facts = None
    if corpus is not None:
        corpus_facts = read_json(corpus / "corpus.json" if corpus.is_dir() else corpus)
    palette = build_palette([run.fraction for run in series.runs], series.languages)
    pictures, drawn = _draw(lambda: build_figures(series, palette), palette, Path(out))
    page = template.render(
        **_common(title, pictures, drawn, palette),
        series=series,
        answer=answer.answer(series),
        languages=answer.languages_in_words(series),
        explanations=answer.explanations(series),
        tables=tables,
        commands=list(commands),
        corpus=corpus_facts,
        hf=dict(hf or {}),
        notes=_notes(series, missing or {}),
        missing=missing or {},
        claims=list(claims),
        vocabulary=tables.vocabulary_table(series),
        evaluation=tables.evaluation_table(series),
        film=build_film(series, palette),
        fractions=listing(dict.fromkeys(percent(run.fraction, digits=None) for run in series.runs)),
        tokens=" / ".join(dict.fromkeys(amount(count) for count in series.tokens)),
    )
    return _write(page, Path(out))


def write_model_report(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str = "Cross-lingual alignment of language models",
) -> Path:
    """Write a page about captured models, which were not trained here.

    Args:
        folders: 1 to 8 folders of ``xalign capture`` with ``analysis/`` inside, in the order of the page.
        out: folder to write; ``out/figures`` is replaced, other files in it stay.
        title: heading of the page.

    Returns:
        ``out/index.html``, the last file written.

    Raises:
        FormatError: a model was not analysed or was captured with another probe (see ``models.read_models``).
        ConfigError: matplotlib or jinja2 is not installed, or the number of models is not 1 to 8.
    """
    template = _template("models.html")
    found = models.read_models(folders)
    palette = build_model_palette(found)
    pictures, drawn = _draw(lambda: build_model_figures(found, palette), palette, Path(out))
    page = template.render(
        **_common(title, pictures, drawn, palette),
        models=found,
        languages=listing(language_name(code) for code in found.probed),
        summary=models.summary(found),
        notes=models.notes(found),
        explanations=answer.explanations(found),
        tables=models,
        commands=models.commands(found),
    )
    return _write(page, Path(out))


def _draw(
    build: Callable[[], dict[str, Picture]], palette: Palette, out: Path
) -> tuple[dict[str, Picture], dict[str, list[str]]]:
    """Draw every figure into files, and every panel for the page."""
    with drawing_style(), whole_folder(out / "figures") as folder:
        pictures, drawn = build(), {}
        with progress_bar(len(pictures), "report", " figures") as bar:
            for name, picture in pictures.items():
                write_files(picture, folder)
                drawn[name] = [draw_panel(panel, picture, index, palette) for index, panel in enumerate(picture.panels)]
                bar.update(1)
    return pictures, drawn


def _common(
    title: str, pictures: Mapping[str, Picture], drawn: Mapping[str, list[str]], palette: Palette
) -> dict[str, Any]:
    """What every page needs."""
    script = _file("page.js")
    return {
        "title": title, "pictures": pictures, "drawn": drawn, "palette": palette, "style": _file("page.css"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        "thousands": thousands, "version": __version__, "now": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def _write(page: str, out: Path) -> Path:
    write_text(out / "index.html", page)
    return out / "index.html"


def _notes(series: Series, missing: Mapping[str, str]) -> list[str]:
    """What a reader must know before comparing: runs that failed or went on, measures that were not taken."""
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(missing) + len(series.runs)} runs are not on this page: {listing(missing)}. What "
            "became of them is told below; nothing here stands for them."
        )
    notes += [
        f"{run.name} was analysed up to step {thousands(run.last_step)}; tables and layer figures compare all runs at "
        f"step {thousands(series.step)}, the last one they share."
        for run in series.runs
        if run.last_step != series.step
    ]
    notes += [
        f"{run.name}: the mixture that was built differs from the one asked for; see the audit."
        for run in series.runs
        if not run.audit["holds"]
    ]
    if not series.has("lape_count"):
        notes.append("LAPE neurons were not counted: the runs kept no sums over training text (capture.stream).")
    return notes


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    try:
        import jinja2
    except ImportError:
        raise ConfigError(
            "the report needs jinja2, which is not installed: pip install 'megatron-xalign[report]'"
        ) from None
    environment: Any = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template: Template = environment.get_template(name)
    return template

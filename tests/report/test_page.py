"""The page as a reader gets it: parsed, compared with the results it was made from, and opened in a browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.atomic import write_json
from megatron_xalign.formats.results import Results, Row, read_results, write_results
from megatron_xalign.report.page import write_report
from megatron_xalign.report.series import RETRIEVAL, read_series
from megatron_xalign.report.tables import alignment_table

MakeRun = Callable[..., Path]
FIGURES = (
    "alignment_over_training", "alignment_by_layer", "neurons_by_layer", "neurons_over_training", "ap_distribution",
    "projections", "training_loss", "probe_loss",
)  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags with attributes, tables as lists of cell texts, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._caption: str | None = None
        self._open: str | None = None
        self._rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        if tag in ("th", "td", "caption", "style", "script"):
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            assert self._caption is not None
            self.tables[self._caption] = self._rows
        if tag == self._open:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open in ("style", "script"):
            return
        self.text += data
        if self._open in ("th", "td"):
            self._rows[-1][-1] += data
        elif self._open == "caption":
            self._caption = (self._caption or "") + data


@pytest.fixture(scope="module")
def page_path(series_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_json(
        out / "corpus.json",
        {"languages": ["eng_Latn", "fin_Latn"], "sources": [{"package": "words", "licence": "GPL-2.0-or-later"}]},
    )
    return write_report(
        series_folders, out / "page", title="Three runs", commands=["xalign quickstart --out 'a b'"],
        corpus=out, hf={"p0.3": Path("hf/p0.3")},
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(page_path: Path) -> Page:
    return Page(page_path.read_text(encoding="utf-8"))


def test_the_page_fetches_nothing_from_anywhere(page_path: Path, page: Page) -> None:
    html = page_path.read_text(encoding="utf-8")
    assert not re.search(r"(?:https?:)?//\w", html)
    assert not re.search(r"@import|url\((?!#)", html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "img", "object", "embed", "base"}
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "figures/"))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")
    # Only the script that is in the page may run, and data is no script.
    scripts = re.findall(r"<script(.*?)>(.*?)</script>", html, flags=re.DOTALL)
    assert [kind for kind, _ in scripts] == [' type="application/json" id="film-data"', ""]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_every_figure_is_in_the_page_and_beside_it(page_path: Path, page: Page) -> None:
    assert [a["id"] for tag, a in page.tags if tag == "figure"] == [f"figure-{name}" for name in FIGURES]
    # three measures x 1 pair; 7; 2 x 2 languages twice; 2; 3 runs x 4 layers; 3; 2 x 2
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 7 + 4 + 4 + 2 + 12 + 3 + 4
    for name in FIGURES:
        assert (page_path.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (page_path.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (page_path.parent / "figures" / f"{name}.csv").stat().st_size > 100
    linked = {a["href"] for tag, a in page.tags if tag == "a" and (a["href"] or "").startswith("figures/")}
    assert linked == {f"figures/{name}.{ending}" for name in FIGURES for ending in ("png", "pdf", "csv")}


def test_every_id_is_there_once_and_every_reference_leads_somewhere(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for value in attributes.values():
            for target in re.findall(r"^#(.+)$|url\(#([^)]+)\)", value or ""):
                assert (target[0] or target[1]) in ids


def test_drawings_use_the_colours_of_the_page_so_that_dark_mode_reaches_them(page_path: Path) -> None:
    html = page_path.read_text(encoding="utf-8")
    declared = set(re.findall(r"--(\w+):#", html))
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert {"ink", "muted", "grid", "f0", "f1", "f2", "l0", "l1"} <= set(re.findall(r"var\(--(\w+)\)", drawn))
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= declared
    assert not re.findall(r"#[0-9a-f]{6}", drawn)


def test_numbers_in_the_table_are_those_of_the_results(page: Page, series_folders: list[Path]) -> None:
    rows = page.tables["Alignment at step 600, each run at its best layer"]
    assert rows[0][:4] == ["parallel data", "layer", "retrieved, centred", "95\u00a0% interval"]
    assert [row[0] for row in rows[1:]] == ["0\u00a0%", "5\u00a0%", "30\u00a0%"]
    by_label = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    for folder, label in zip(series_folders, ("30\u00a0%", "0\u00a0%", "5\u00a0%"), strict=True):
        results = read_results(folder / "analysis")
        best = max(results.select(RETRIEVAL, step=600), key=lambda row: row.value)
        assert best.low is not None and best.high is not None
        shown = by_label[label]
        assert shown["layer"] == ("emb" if best.layer == -1 else str(best.layer))
        assert shown["retrieved, centred"] == f"{100 * best.value:.1f}\u00a0%"
        (plain,) = results.select("retrieval", layer=best.layer, step=600)
        assert shown["not centred"] == f"{100 * plain.value:.1f}\u00a0%"
        untrained = max(row.value for row in results.select(RETRIEVAL, step=0))
        assert shown["untrained, best layer"] == f"{100 * untrained:.1f}\u00a0%"
        assert shown["95\u00a0% interval"] == f"{100 * best.low:.1f} to {100 * best.high:.1f}\u00a0%"
        assert shown["chance"] == "0.5\u00a0%"
        (cka,) = results.select("cka", layer=best.layer, step=600)
        assert shown["CKA"] == f"{cka.value:.3f}"
        assert f"{100 * best.value:.1f}\u00a0% ({100 * best.low:.1f} to" in page.text


def test_the_audit_is_shown_as_it_was_counted(page: Page, series_folders: list[Path]) -> None:
    caption = next(caption for caption in page.tables if caption.startswith("The mixture"))
    shown = {row[0]: dict(zip(page.tables[caption][0], row, strict=True)) for row in page.tables[caption][1:]}
    audit = json.loads((series_folders[0] / "audit.json").read_text())
    assert shown["p0.3"]["asked"] == "30\u00a0%"
    assert shown["p0.3"]["of all tokens"] == f"{100 * audit['achieved']['parallel_fraction_all']:.3f}\u00a0%"
    assert shown["p0.3"]["tokens"] == f"{audit['tokens']:,}"
    assert {row["holds"] for row in shown.values()} == {"yes"}
    pairs = page.tables["Sources of p0.3"][-1]
    assert pairs[0] == "pairs" and f"{audit['sources'][-1]['documents_cut']:,}" in pairs


def test_every_table_tells_rows_and_columns_apart(page: Page) -> None:
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads and {attributes.get("scope") for attributes in heads} == {"row", "col"}
    assert all(page.tables) and all(len({len(row) for row in rows}) == 1 for rows in page.tables.values())


def test_figures_have_words_with_their_key_numbers(page: Page, series_folders: list[Path]) -> None:
    words = [a["aria-label"] or "" for tag, a in page.tags if tag == "div" and a.get("role") == "img"]
    assert len(words) == len(FIGURES)
    best = max(row.value for row in read_results(series_folders[0] / "analysis").select(RETRIEVAL, step=600))
    said = f"30\u00a0% parallel data {100 * best:.1f}\u00a0% retrieved, languages centred (chance 0.5\u00a0%)"
    assert said in words[0]


def test_the_csv_of_a_figure_holds_the_rows_of_the_results(page_path: Path, series_folders: list[Path]) -> None:
    with (page_path.parent / "figures" / "alignment_by_layer.csv").open(newline="") as file:
        shown = list(csv.DictReader(file))
    wanted = {
        RETRIEVAL, "retrieval", "mexa", "cosine_gap", "cosine_centred_gap", "cka", "cka_permuted", "pwcca",
        "pwcca_permuted",
    }  # fmt: skip
    expected = {
        (f"p{read_results(folder / 'analysis').context['parallel_fraction']:g}", row.measure, row.layer, row.value,
         row.low, row.high)
        for folder in series_folders
        for row in read_results(folder / "analysis").select(step=600)
        if row.measure in wanted
    }  # fmt: skip
    read = {
        (row["run"], row["measure"], int(row["layer"]), float(row["value"]),
         *(float(row[end]) if row[end] else None for end in ("low", "high")))
        for row in shown
    }  # fmt: skip
    assert read == expected and len(shown) == len(expected)


def test_points_of_a_projection_say_their_style_once(page_path: Path) -> None:
    html = page_path.read_text(encoding="utf-8")
    drawn = html[html.index('id="figure-projections"') : html.index('id="loss"')]
    points = re.findall(r'<use href="#projections-\d+-\w+" x="[\d.]+" y="[\d.]+"/>', drawn)
    assert len(points) == 3 * 4 * 2 * 150
    assert len(re.findall(r'<g[^>]*style="fill: var\(--l[01]\); fill-opacity: 0.6"><use', drawn)) == 3 * 4 * 2


def test_what_rounds_to_nothing_has_no_minus(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.05, steps=(0, 50), num_layers=1)
    path = run / "analysis" / "results.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        if row["measure"] == "cka_permuted":
            row["value"] = -0.0001
    path.write_text(json.dumps(content))
    table = alignment_table(read_series([run]))
    assert table.rows[0][1][table.columns.index("CKA permuted") - 1].text == "0.000"


def test_the_caption_says_how_many_neurons_lape_selects(page: Page) -> None:
    assert "LAPE selects 1\u00a0% of all neurons whatever training does, here 20 of 2,048" in page.text


def test_plain_retrieval_may_be_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.05, steps=(0, 50), num_layers=1, skip_measures=("retrieval",))
    page = Page(write_report([run], tmp_path / "out").read_text(encoding="utf-8"))
    assert "not centred" not in page.text
    assert "not centred" not in page.tables["Alignment at step 50, each run at its best layer"][0]


def test_commands_configs_and_places_are_told(page: Page) -> None:
    assert "xalign quickstart --out 'a b'" in page.text
    assert "parallel_fraction: 0.05" in page.text
    facts = {row[0]: row[1:] for row in page.tables["How each run was made"]}
    assert facts["Hugging Face folder"] == ["\u2013", "\u2013", "hf/p0.3"]
    assert facts["layout"] == ["tensor 2, pipeline 1, data 1"] * 3
    assert facts["training time"] == ["3\u00a0min 45\u00a0s"] * 3
    assert page.tables["Corpus: sources"][1] == ["words", "GPL-2.0-or-later"]


def test_a_run_name_is_text_and_never_markup(make_run: MakeRun, tmp_path: Path) -> None:
    name = '<script>alert("1")</script> & $x_1$ 1.23456'
    names = [("a", name), ("b", "plain")]
    # Two runs of one fraction are told apart by name, so the name reaches legends, drawings and attributes.
    runs = [make_run(tmp_path / folder, 0.3, name=given, steps=(0, 50), num_layers=1) for folder, given in names]
    html = write_report(runs, tmp_path / "out", title="<b>&").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<b>" not in html
    page = Page(html)
    assert name in page.text and "<b>&" in page.text
    assert any(name in (a.get("aria-label") or "") for _, a in page.tags)
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert '&lt;script&gt;alert("1")&lt;/script&gt; &amp; $x_1$ 1.23456' in drawn


def test_three_languages_make_three_pairs(make_run: MakeRun, tmp_path: Path) -> None:
    languages = ("eng_Latn", "fin_Latn", "xx-yy")  # the last in no table, with a hyphen like the one between two codes
    runs = [make_run(tmp_path / f"{f}", f, languages=languages, steps=(0, 50), num_layers=2) for f in (0.0, 0.2)]
    page = Page(write_report(runs, tmp_path / "out").read_text(encoding="utf-8"))
    shown = page.tables["Alignment at step 50, each run at its best layer"]
    assert [row[1] for row in shown[1::2]] == ["English-Finnish", "English-xx-yy", "Finnish-xx-yy"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 9 + 21 + 6 + 6 + 3 + 6 + 4 + 6


@pytest.fixture(scope="module")
def odd_run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single run whose mixture does not hold and which lacks some measures, reported into a folder in use."""
    root = tmp_path_factory.mktemp("odd")
    (root / "out" / "figures").mkdir(parents=True)
    (root / "out" / "figures" / "old.png").touch()
    (root / "out" / "mine.txt").write_text("kept")
    run = make_run(
        root / "run", 0.05, steps=(0, 50), num_layers=1, holds=False,
        skip_measures=("lape_count", "mexa", "silhouette"),
    )  # fmt: skip
    write_report([run], root / "out")
    return root


def test_evaluation_and_shared_vocabulary_are_shown_where_they_were_measured(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(tmp_path / "a", 0.0), make_run(tmp_path / "b", 0.1)]
    pair = "eng_Latn-fin_Latn"
    for number, run in enumerate(runs):
        rows = [
            Row(600, 1000, measure, None, subject, center + number / 10, center - 0.1, center + 0.2)
            for measure, subject, center in (
                ("eval_bits_per_byte", "eng_Latn", 2.25), ("eval_nll_per_token", "eng_Latn", 4.0),
                ("translation_choice", pair, 0.31), ("lm_eval.acc", "belebele_fin", 0.257),
            )
        ]
        write_results(run / "analysis" / "evaluation", Results({"most": 10}, rows))
        results = read_results(run / "analysis")
        shared = [
            Row(600, 1000, measure, None, pair, 0.4321)
            for measure in ("vocabulary_jaccard", "vocabulary_mass", "pairs_sharing_tokens", "pairs_identical")
        ]
        own = [Row(600, 1000, "retrieval_centred_unshared", layer, pair, 0.1234) for layer in range(-1, 4)]
        write_results(run / "analysis", Results(results.context, [*results.rows, *shared, *own], results.arrays))
    path = write_report(runs, tmp_path / "report")
    text = path.read_text(encoding="utf-8")
    for words in (
        "perplexity, English", "54.6 (49.4 to 66.7)", "right translation, English to Finnish", "31.0",
        "belebele_fin, acc", "0.357", "43.2", "12.3",
    ):
        assert words in text, words
    with (tmp_path / "report" / "figures" / "evaluation.csv").open(encoding="utf-8") as file:
        assert {line["measure"] for line in csv.DictReader(file)} == {"eval_bits_per_byte", "translation_choice"}


def test_one_run_makes_a_report_that_claims_nothing_about_parallel_data(odd_run: Path) -> None:
    page = Page((odd_run / "out" / "index.html").read_text(encoding="utf-8"))
    assert "This is one training run" in page.text and "higher" not in page.text


def test_a_mixture_that_does_not_hold_is_said_at_the_top(odd_run: Path) -> None:
    page = Page((odd_run / "out" / "index.html").read_text(encoding="utf-8"))
    assert "the mixture that was built differs from the one asked for" in page.text
    assert any(tag == "td" and attributes.get("class") == "bad" for tag, attributes in page.tags)


def test_a_measure_that_no_run_has_is_left_out(odd_run: Path) -> None:
    html = (odd_run / "out" / "index.html").read_text(encoding="utf-8")
    assert "LAPE neurons were not counted" in html
    assert "MEXA" not in html and "silhouette 0" not in html


def test_a_report_replaces_earlier_figures_and_leaves_other_files(odd_run: Path) -> None:
    out = odd_run / "out"
    assert not (out / "figures" / "old.png").exists() and (out / "mine.txt").read_text() == "kept"


def test_a_failed_report_leaves_the_earlier_one(odd_run: Path, make_run: MakeRun, tmp_path: Path) -> None:
    before = (odd_run / "out" / "index.html").read_bytes()
    run = make_run(tmp_path / "run", 0.05, steps=(0, 50))
    (run / "analysis" / "results.json").write_text("{")
    with pytest.raises(FormatError, match=r"results\.json"):
        write_report([run], odd_run / "out")
    assert (odd_run / "out" / "index.html").read_bytes() == before
    assert (odd_run / "out" / "figures" / "probe_loss.png").is_file()


def test_without_matplotlib_the_message_says_what_to_install(
    series_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-xalign\[report\]'"):
        write_report(series_folders, tmp_path / "out")


def test_the_pointer_is_told_the_values_that_are_drawn(page: Page, series_folders: list[Path]) -> None:
    drawn = [json.loads(a["data-points"] or "") for tag, a in page.tags if tag == "svg" and "data-points" in a]
    told = [text for points in drawn for _, _, text in points]
    best = max(row.value for row in read_results(series_folders[0] / "analysis").select(RETRIEVAL, step=600))
    assert any(text.startswith(f"30\u00a0%: {100 * best:.4g} at tokens 4,915,200") for text in told)
    # Where a value lies follows from its axis: larger values are higher up.
    first = [(x, y, float(text.split(": ")[1].split(" ")[0])) for x, y, text in drawn[0] if text.startswith("30")]
    assert [value for _, _, value in sorted(first, key=lambda point: -point[1])] == sorted(v for _, _, v in first)
    assert all(0 < x < 3.7 * 72 and 0 < y < 2.7 * 72 for points in drawn for x, y, _ in points if points is drawn[0])


def test_the_film_holds_the_projections_of_every_step(page_path: Path, series_folders: list[Path]) -> None:
    html = page_path.read_text(encoding="utf-8")
    match = re.search(r'id="film-data">(.*?)</script>', html, flags=re.DOTALL)
    assert match is not None
    film = json.loads(match.group(1))
    assert film["steps"] == list(range(0, 601, 50)) and film["layers"] == 5
    assert [run["label"] for run in film["runs"]] == ["0\u00a0%", "5\u00a0%", "30\u00a0%"]
    arrays = read_results(series_folders[0] / "analysis").arrays
    wanted = arrays["pca_coordinates"][:, :, np.r_[:150, 200:350]]
    raw = np.frombuffer(base64.urlsafe_b64decode(film["runs"][2]["points"]), np.uint8)
    shown = raw.reshape(13, 5, 300, 2).astype(float)
    for layer in range(5):  # equal up to one scale and shift for all steps
        for axis in range(2):
            fit = np.polyfit(wanted[:, layer, :, axis].ravel(), shown[:, layer, :, axis].ravel(), 1)
            assert np.abs(np.polyval(fit, wanted[:, layer, :, axis]) - shown[:, layer, :, axis]).max() < 0.75
    assert sorted(film["order"]) == list(range(300))
    assert [film["languages"][index] for index in film["order"][:4]] == [0, 1, 0, 1]


def test_seeds_are_drawn_as_their_mean_and_range_and_controls_apart(make_run: MakeRun, tmp_path: Path) -> None:
    def made(name: str, fraction: float, seed: int) -> Path:
        folder = make_run(tmp_path / name, fraction, name=name, steps=(0, 50), num_layers=1, seed=seed)
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("seed: 1234", f"seed: {seed}"))
        return folder

    runs = [made(f"p{f:g}-s{seed}", f, seed) for f in (0.0, 0.2) for seed in (1, 2)]
    runs.append(made("p0.2-shuffled-s1", 0.2, 1))
    series = read_series(runs, {"p0.2-shuffled-s1": "shuffled"})
    assert [group.label for group in series.groups] == ["0\u00a0%", "20\u00a0%", "20\u00a0% shuffled"]
    assert [run.label for run in series.groups[1].runs] == ["20\u00a0%, seed 1", "20\u00a0%, seed 2"]
    claims = [{"claim": "A", "pair": "eng_Latn-fin_Latn", "verdict": "for", "numbers": "1", "test": "t"}]
    html = write_report(
        runs, tmp_path / "out", controls={"p0.2-shuffled-s1": "shuffled"}, claims=claims,
        missing={"p0.5-s1": "worker 1 was killed by SIGKILL <&>"},
    ).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tables["Claims, and the evidence of this series"][1] == ["A", "English-Finnish", "for", "1", "t"]
    assert page.tables["Runs that are not on this page"][1] == ["p0.5-s1", "worker 1 was killed by SIGKILL <&>"]
    assert "1 of 6 runs are not on this page: p0.5-s1" in page.text
    # The control is told beside the series and not averaged into it.
    aligned = [max(row.value for row in read_results(run / "analysis").select(RETRIEVAL, step=50)) for run in runs[2:]]
    mean, control = f"{50 * (aligned[0] + aligned[1]):.1f}", f"{100 * aligned[2]:.1f}"
    told = page.text.replace("\u00a0", " ")
    assert re.search(rf"is {mean} % \(mean of 2 runs, [^)]*\) with 20 % parallel data", told)
    assert re.search(rf"It is {control} % .*in the control shuffled at 20 %", told)
    points = json.loads(next(a["data-points"] for tag, a in page.tags if tag == "svg" and "data-points" in a) or "")
    last = [text for _, _, text in points if "409,600" in text]
    at_end = {text.split(":")[0]: float(text.split(": ")[1].split(" ")[0]) for text in last}
    values = [
        max(row.value for row in read_results(run / "analysis").select(RETRIEVAL, step=50)) for run in runs[2:4]
    ]
    assert at_end["20\u00a0%"] == pytest.approx(100 * np.mean(values), rel=1e-3)


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(_chromium() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_page_without_errors_and_without_scrolling_sideways(
    page_path: Path, tmp_path: Path, width: int
) -> None:
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth <= innerWidth,"
        " [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100),"
        " [...document.querySelectorAll('caption span')].every(s => s.getBoundingClientRect().right <= innerWidth),"
        # The film has drawn something, and moving its slider draws something else.
        " (() => { const c = document.getElementById('film-0'), s = document.getElementById('film-step');"
        " const ink = () => c.toDataURL(); const last = ink(); s.value = 0; s.dispatchEvent(new Event('input'));"
        " return !document.getElementById('film').hidden && last.length > 2000 && ink() !== last; })(),"
        # A pointer over a point is told its value.
        " (() => { const v = document.querySelector('svg[data-points]'), p = JSON.parse(v.dataset.points)[3];"
        " const r = v.getBoundingClientRect(), k = r.width / v.viewBox.baseVal.width;"
        " v.dispatchEvent(new PointerEvent('pointermove', {clientX: r.left + p[0] * k, clientY: r.top + p[1] * k}));"
        " return document.querySelector('.told').textContent === p[2]; })()"
        "].join(' ')</script>"
    )
    # A copy that may run the lines of measuring too; the page itself forbids other scripts.
    html = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page_path.read_text(encoding="utf-8"))
    copy = tmp_path / "measured.html"
    copy.write_text(html.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    chromium = _chromium()
    assert chromium is not None
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000", "--enable-logging=stderr",
            "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>true true true true true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr

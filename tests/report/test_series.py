"""Which runs may share a report, and what is said when they may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.results import Results, Row, write_results
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.report.page import write_report
from megatron_xalign.report.series import RETRIEVAL, read_series

MakeRun = Callable[..., Path]
STEPS = (0, 50, 100)


def test_runs_are_ordered_by_fraction_whatever_order_they_are_given_in(series_folders: list[Path]) -> None:
    series = read_series(series_folders)
    assert [run.fraction for run in series.runs] == [0.0, 0.05, 0.3]
    assert [run.label for run in series.runs] == ["0\u00a0%", "5\u00a0%", "30\u00a0%"]
    assert (series.step, series.pairs, series.chance) == (600, ["eng_Latn-fin_Latn"], 1 / 200)


def test_runs_that_share_a_fraction_carry_their_names(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0.1, name=name, steps=STEPS) for name in ("a", "b")]
    assert [run.label for run in read_series(runs).runs] == ["10\u00a0% (a)", "10\u00a0% (b)"]


def test_a_scheduled_run_is_known_by_its_mean_and_by_when_its_parallel_text_comes(
    make_run: MakeRun, tmp_path: Path
) -> None:
    early, late, never = make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.1), make_run(tmp_path / "c", 0.0)
    for run, first, second in ((early, 0.4, 0.0), (late, 0.0, 0.4)):
        config = yaml.safe_load((run / "config.yaml").read_text())
        tokens = RunFolder(run).config().train_tokens
        middle = {"until_tokens": tokens // 2, "parallel_fraction": first}
        config["data"]["mixture"] |= {
            "parallel_fraction": 0.0, "schedule": [middle, {"until_tokens": 10 * tokens, "parallel_fraction": second}]
        }
        config["name"] = "early" if first else "late"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    series = read_series([late, never, early])
    assert [(run.label, run.fraction) for run in series.runs] == [
        ("0\u00a0%", 0.0), ("20\u00a0% on average (early)", 0.2), ("20\u00a0% on average (late)", 0.2)
    ]
    page = write_report([early, late], tmp_path / "report").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "All runs have the same share of parallel data on average; what differs is when it comes." in page
    assert "20 % on average: 0 % until 2.46 M tokens, then 40 % until" in page
    assert "0 % parallel data" not in page.replace("20 %", "").replace("40 %", "")


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / folder, 0.1, name="run", steps=STEPS) for folder in ("a", "b")]
    assert [run.name for run in read_series(runs).runs] == ["run (a)", "run (b)"]


def test_the_last_step_is_the_last_that_all_runs_share(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0.0, steps=(0, 50, 100)), make_run(tmp_path / "b", 0.1, steps=(0, 50, 100, 150))]
    assert read_series(runs).step == 100


def test_runs_without_a_common_step_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0.0, steps=(50,)), make_run(tmp_path / "b", 0.1, steps=(60,))]
    with pytest.raises(FormatError, match=r"no step was analysed in every run \(p0: 50; p0\.1: 60\)"):
        read_series(runs)


def test_the_lower_of_two_equal_layers_is_the_best(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.0, steps=STEPS)
    path = run / "analysis" / "results.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        if row["measure"] == RETRIEVAL:
            row["value"] = 0.5 if row["layer"] in (1, 2) else 0.1
    path.write_text(json.dumps(content))
    assert read_series([run]).runs[0].best_layer("eng_Latn-fin_Latn", 100) == 1


def test_steps_logged_twice_by_a_resumed_run_count_once(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.0, steps=STEPS)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    again = json.dumps({**json.loads(lines[4]), "loss": 1.25})
    path.write_text("\n".join([*lines[:6], again, *lines[5:]]) + "\n")
    metrics = read_series([run]).runs[0].metrics
    assert [line["step"] for line in metrics] == list(range(10, 101, 10))
    assert metrics[4]["loss"] == 1.25


@pytest.mark.parametrize(
    ("piece", "verb"),
    [
        ("config.yaml", "xalign train"),
        ("run.json", "xalign train"),
        ("audit.json", "xalign train"),
        ("metrics.jsonl", "xalign train"),
        ("analysis/results.json", "xalign analyze"),
        ("analysis/arrays.safetensors", "xalign analyze"),
    ],
)
def test_a_missing_piece_is_named_with_its_run_and_the_verb_that_makes_it(
    make_run: MakeRun, tmp_path: Path, piece: str, verb: str
) -> None:
    run = make_run(tmp_path / "p05", 0.05, steps=STEPS)
    (run / piece).unlink()
    with pytest.raises(FormatError) as caught:
        read_series([run])
    for words in ("p05", Path(piece).name, verb):
        assert words in str(caught.value)


def test_a_missing_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere does not exist"):
        read_series([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_layers": 3}, r"num_layers is 4 in .* and 3 in"),
        ({"num_pairs": 150}, r"num_pairs is 200 in .* and 150 in"),
        ({"languages": ("eng_Latn", "swe_Latn")}, r"languages is .*fin_Latn.* and .*swe_Latn"),
        ({"skip_measures": ("mexa",)}, r"run p0\.1: .* has no mexa of eng_Latn-fin_Latn, which run p0 has"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    make_run: MakeRun, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    runs = [make_run(tmp_path / "a", 0.0, steps=STEPS), make_run(tmp_path / "b", 0.1, steps=STEPS, **changed)]
    with pytest.raises(FormatError, match=words):
        read_series(runs)


def test_a_measure_the_report_stands_on_must_be_there(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.0, steps=STEPS, skip_measures=(RETRIEVAL,))
    with pytest.raises(FormatError, match=r"has no rows of retrieval_centred; run `xalign analyze"):
        read_series([run])


def test_an_audit_that_is_none_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.0, steps=STEPS)
    (run / "audit.json").write_text("{}")
    with pytest.raises(FormatError, match="has no entry 'asked'"):
        read_series([run])


def write_evaluation(run: Path, context: dict[str, object], last: int = 100) -> None:
    rows = [
        Row(step, step * 10, measure, None, subject, number + step / 1000, number - 0.01, number + 0.2)
        for step in (50, last)
        for measure, subject, number in (
            ("eval_bits_per_byte", "eng_Latn", 2.0), ("eval_nll_per_token", "eng_Latn", 4.0),
            ("translation_choice", "eng_Latn-fin_Latn", 0.31), ("translation_choice_raw", "eng_Latn-fin_Latn", 0.3),
            ("lm_eval.acc", "belebele_fin", 0.25),
        )
    ]
    write_results(run / "analysis" / "evaluation", Results(context, rows))


def test_runs_are_evaluated_alike_or_not_at_all(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0.0, steps=STEPS), make_run(tmp_path / "b", 0.1, steps=STEPS)]
    facts: dict[str, object] = {"texts_sha256": "0" * 64, "most": 200, "lm_eval_tasks": []}
    write_evaluation(runs[0], facts)
    with pytest.raises(FormatError, match=r"run p0\.1 was not evaluated, and run p0 was; .*`xalign evaluate .*/b`"):
        read_series(runs)
    write_evaluation(runs[1], facts | {"most": 20})
    with pytest.raises(FormatError, match="evaluated differently: most is 200 and 20"):
        read_series(runs)
    write_evaluation(runs[1], facts, last=80)
    with pytest.raises(FormatError, match=r"p0 was evaluated up to step 100 and run p0\.1 up to 80"):
        read_series(runs)
    write_evaluation(runs[1], facts)
    series = read_series(runs)
    assert [row.step for row in series.runs[1].evaluated("eval_bits_per_byte", "eng_Latn")] == [50, 100]


def test_one_folder_given_twice_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.0, steps=STEPS)
    with pytest.raises(FormatError, match="give each folder once"):
        read_series([run, run])


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="65 run folders given; one report compares 1 to 64"):
        read_series([tmp_path / str(index) for index in range(65)])

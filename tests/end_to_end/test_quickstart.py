"""The quickstart in small, from the user's side: a corpus of one's own in, a page and Hugging Face folders out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_of_nonsense import LANGUAGES, write_corpus
from xalign_process import Xalign, environment

from megatron_xalign.formats.results import read_results

pytestmark = pytest.mark.end_to_end
STEPS = 16
FRACTIONS = ("0", "0.3")


def arguments(folder: Path) -> list[str]:
    return [
        "quickstart", "--corpus", str(folder / "text"), "--out", str(folder / "out"), "--steps", str(STEPS),
        "--fractions", ",".join(FRACTIONS),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, xalign: Xalign) -> Path:
    """A folder with a finished small quickstart in ``out``."""
    folder = tmp_path_factory.mktemp("quickstart")
    write_corpus(folder / "text")
    done = xalign(*arguments(folder), timeout=900)
    (folder / "said.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def metrics(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("seconds", "seconds_left", "tokens_per_second", "tflops_per_device", "memory_gib")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def test_it_ends_by_saying_where_everything_lies(finished: Path) -> None:
    said = (finished / "said.txt").read_text(encoding="utf-8")
    for place in ("report/index.html", "runs/p0.3/checkpoints", "hf/p0", "hf/p0.3"):
        assert str(finished / "out" / place) in said
        assert (finished / "out" / place).exists()


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_mixture_is_what_was_asked_for(finished: Path, fraction: str) -> None:
    audit = json.loads((finished / "out" / "runs" / f"p{fraction}" / "audit.json").read_text(encoding="utf-8"))
    assert audit["holds"] is True
    one_sample = 1 / audit["samples"]
    assert abs(audit["achieved"]["parallel_fraction"] - float(fraction)) <= one_sample
    for language in LANGUAGES:
        assert abs(audit["languages"][language]["achieved"] - 0.5) <= 2 * one_sample


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_model_learns_and_every_language_has_its_loss(finished: Path, fraction: str) -> None:
    logged = metrics(finished / "out" / "runs" / f"p{fraction}")
    assert logged[-1]["step"] == STEPS
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5
    assert set(logged[-1]["loss_by_language"]) >= set(LANGUAGES)


def test_the_layouts_of_the_runs_are_tensor_and_pipeline_parallel(finished: Path) -> None:
    layouts = []
    for fraction in FRACTIONS:
        facts = json.loads((finished / "out" / "runs" / f"p{fraction}" / "run.json").read_text(encoding="utf-8"))
        layouts.append((facts["layout"]["tensor_size"], facts["layout"]["pipeline_size"]))
    assert layouts == [(2, 1), (1, 2)]


def test_runs_start_from_the_same_weights_whatever_their_layout(finished: Path) -> None:
    untrained = []
    for fraction in FRACTIONS:
        results = read_results(finished / "out" / "runs" / f"p{fraction}" / "analysis")
        untrained.append({(r.layer, r.subject): r.value for r in results.select(measure="nll_per_token", step=0)})
    assert untrained[0].keys() == untrained[1].keys()
    assert list(untrained[0].values()) == pytest.approx(list(untrained[1].values()), rel=1e-5)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_every_probed_step_has_every_kind_of_measure(finished: Path, fraction: str) -> None:
    results = read_results(finished / "out" / "runs" / f"p{fraction}" / "analysis")
    steps = sorted({row.step for row in results.rows})
    assert (steps[0], steps[-1]) == (0, STEPS)
    for measure in ("ap_count_0.9", "lape_count", "cosine_gap", "pwcca", "cka", "retrieval", "nll_per_token"):
        assert sorted({row.step for row in results.select(measure=measure)}) == steps, measure


def test_the_hugging_face_folder_loads_and_generates(finished: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = finished / "out" / "hf" / "p0.3"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    line = (finished / "text" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[0]
    text = json.loads(line)["texts"]["eng_Latn"]
    encoded = tokenizer(text, return_tensors="pt")
    generated = model.generate(**encoded, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > encoded["input_ids"].shape[1]
    assert tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True) == text


def test_the_page_is_whole_and_asks_nothing_of_the_network(finished: Path) -> None:
    page = (finished / "out" / "report" / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "p0.3" in page
    assert not re.findall(r"""(?:src|href)=["']https?://""", page)


def test_the_same_command_again_does_nothing_twice(finished: Path, xalign: Xalign) -> None:
    kinds = (".bin", ".idx", ".distcp", ".safetensors")
    files = [path for path in (finished / "out").rglob("*") if path.is_file() and path.suffix in kinds]
    watched = [path for path in files if "analysis" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in watched}
    xalign(*arguments(finished), timeout=300)
    assert {path: path.stat().st_mtime_ns for path in watched} == before


def test_another_seed_in_the_same_folder_is_refused_by_name(finished: Path, xalign: Xalign) -> None:
    before = {path: path.read_bytes() for path in (finished / "out").rglob("*.yaml")}
    done = xalign(*arguments(finished), "--seed", "5", check=False, timeout=300)
    assert done.returncode == 1
    assert "seed: 1234 -> 5" in done.stderr
    assert {path: path.read_bytes() for path in (finished / "out").rglob("*.yaml")} == before


def test_a_run_told_to_stop_interrupted_and_then_killed_ends_with_the_numbers_of_an_undisturbed_one(
    finished: Path, tmp_path: Path, xalign: Xalign
) -> None:
    """SIGUSR1 and SIGTERM, Ctrl-C, a hard kill, then to the end: metrics and statistics equal the undisturbed run's."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out" / "corpus", out / "corpus")
    shutil.copytree(finished / "out" / "tokenizer", out / "tokenizer")
    shutil.copytree(finished / "out" / "tokens", out / "tokens")
    config = (finished / "out" / "configs" / "p0.yaml").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(config.replace(str(finished / "out"), str(out)), encoding="utf-8")
    run = out / "runs" / "p0"
    command = [sys.executable, "-m", "megatron_xalign", "train", str(tmp_path / "run.yaml"), "--nproc-per-node", "2"]
    exit_codes = {signal.SIGUSR1: 75, signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    num_lines = len(metrics_so_far(finished / "out" / "runs" / "p0"))
    # Logged steps seen before the end; each more than the one before left, so that the signal meets a run that trains.
    for wanted, ending in zip((1, 4, 7, 10), exit_codes, strict=True):
        for _ in range(5):
            code = send_when_logged(command, run, wanted, ending)
            if code != 0 and len(metrics_so_far(run)) < num_lines:
                break
            # This process was away for so long that the job came to its end, or was about to.
            if code == 0:
                assert_same_run(run, finished / "out" / "runs" / "p0")
            shutil.rmtree(run)
        assert code == exit_codes[ending]
        wait_for_orphans(str(tmp_path / "run.yaml"))
    xalign("train", tmp_path / "run.yaml", "--nproc-per-node", "2")
    assert_same_run(run, finished / "out" / "runs" / "p0")


def send_when_logged(command: list[str], run: Path, wanted: int, ending: signal.Signals) -> int:
    """Start a job, send it a signal when it has logged so many steps, and return its exit code."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while process.poll() is None and not (
        (run / "metrics.jsonl").is_file() and len(metrics_so_far(run)) >= wanted
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(ending)
    return process.wait(timeout=300)


def assert_same_run(run: Path, undisturbed: Path) -> None:
    assert metrics(run) == metrics(undisturbed)
    last = f"neurons/step-{STEPS:06d}"
    for shard in sorted((undisturbed / last).glob("*.safetensors")):
        assert (run / last / shard.name).read_bytes() == shard.read_bytes()


def metrics_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def wait_for_orphans(mark: str, seconds: float = 300) -> None:
    """Workers of a killed job die with it; wait until no process has ``mark`` in its command line."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if mark.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                    alive.append(path.parent.name)
            except OSError:
                continue
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {alive} outlived their job")

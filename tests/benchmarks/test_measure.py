"""The stop watch of the benchmarks measures what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", BENCHMARKS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    return module


def burn(seconds: float) -> int:
    end, turns = time.process_time() + seconds, 0
    while time.process_time() < end:
        turns += 1
    return turns


def test_cpu_seconds_of_a_function_are_its_own(measure: ModuleType) -> None:
    asleep = measure.run_once(lambda: time.sleep(0.4))
    awake = measure.run_once(lambda: burn(0.4))
    assert asleep.wall_seconds >= 0.4
    assert asleep.cpu_seconds < 0.2
    assert 0.3 < awake.cpu_seconds < 0.8
    assert awake.result > 0


def test_cpu_seconds_of_a_program_include_its_children(measure: ModuleType) -> None:
    code = (
        "import time\ndef burn(s):\n end = time.process_time() + s\n while time.process_time() < end: pass\n"
        "import subprocess, sys\nif len(sys.argv) > 1: burn(0.5)\n"
        "else: subprocess.run([sys.executable, '-c', sys.orig_argv[2], 'child'], check=True)"
    )
    cost = measure.run_once([sys.executable, "-c", code])
    assert 0.5 <= cost.cpu_seconds < 2.0


def test_peak_memory_is_of_this_program_and_not_of_what_started_it(measure: ModuleType) -> None:
    held = bytearray(300 << 20)
    small = measure.run_once([sys.executable, "-c", "import time; time.sleep(0.3)"])
    # It is looked at while it runs; long enough that a tester who stands still for seconds does not miss it.
    large = measure.run_once([sys.executable, "-c", "import time; x = bytearray(200 << 20); time.sleep(5)"])
    assert small.peak_rss_bytes < 100 << 20 < len(held)
    assert 180 << 20 < large.peak_rss_bytes < 300 << 20


def test_growth_of_a_function_is_what_it_took_at_once(measure: ModuleType) -> None:
    cost = measure.run_once(lambda: len(bytearray(150 << 20)))
    assert 100 << 20 < cost.rss_growth_bytes < 250 << 20


def test_contestants_take_turns_and_each_has_its_median(measure: ModuleType) -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    costs = measure.interleaved(runs, 3)
    assert "".join(order) == "abcbcacab"
    assert set(costs) == {"a", "b", "c"}
    made = [measure.Cost(wall, 2 * wall, int(wall), 0, name) for wall, name in ((3.0, "x"), (1.0, "y"), (2.0, "z"))]
    assert measure.median(made) == measure.Cost(2.0, 4.0, 2, 0, "z")


def test_a_program_that_fails_or_does_not_end_says_so(measure: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="what went wrong"):
        measure.run_once([sys.executable, "-c", "raise SystemExit('what went wrong')"])
    with pytest.raises(RuntimeError, match="took over"):
        measure.run_once(measure.Command([sys.executable, "-c", "import time; time.sleep(60)"], timeout_seconds=0.5))


@pytest.mark.parametrize(
    ("ours", "peer", "goal", "better", "ratio", "holds"),
    [
        (10.0, 2.0, 5.0, "higher", 5.0, True),
        (9.9, 2.0, 5.0, "higher", 4.95, False),
        (1.0, 10.0, 10.0, "lower", 10.0, True),
        (2.0, 10.0, 10.0, "lower", 5.0, False),
        (900.0, None, 1000.0, "lower", None, True),
        (1100.0, None, 1000.0, "lower", None, False),
        (3.0, None, None, "higher", None, None),
    ],
)
def test_an_answer_holds_or_not(
    measure: ModuleType, ours: float, peer: float | None, goal: float | None, better: str, ratio: float | None,
    holds: bool | None,
) -> None:
    found = measure.answer("q", ours=ours, peer=peer, goal=goal, unit="u", better=better)
    assert (found["ratio"], found["holds"]) == (ratio, holds)
    assert set(found) == {"name", "ours", "peer", "ratio", "goal", "holds", "unit", "machine"}


def test_the_last_line_is_json(measure: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    measure.print_result([measure.answer("q", ours=1, peer=2, goal=1, unit="u", better="higher")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["name"] == "q"

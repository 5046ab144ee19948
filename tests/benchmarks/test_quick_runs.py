"""Every benchmark of samples runs with ``--quick`` and answers in the agreed form; never how fast it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the peer of these benchmarks")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FIELDS = {"name", "ours", "peer", "ratio", "goal", "holds", "unit", "machine"}


@pytest.mark.parametrize("name", ["blend_order", "fetch", "index", "plan", "train_step"])
def test_quick_run_answers_in_the_agreed_form(name: str, tmp_path: Path) -> None:
    where = [] if name in ("blend_order", "train_step") else ["--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *where],
        capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers
    for answer in answers:
        assert set(answer) >= FIELDS
        assert answer["ours"] is not None

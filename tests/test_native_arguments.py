"""Whatever is handed to the C++ library is answered or refused, and never ends the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_any_arguments_are_answered_or_refused(seed: int) -> None:
    program = str(Path(__file__).with_name("fuzz_native.py"))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", program, str(seed), "400"],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    passed, refused = map(int, done.stdout.split())
    assert passed > 1000
    assert refused > 1000

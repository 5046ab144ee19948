"""The C++ library's own tests and fuzzers, under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "csrc" / "tests"
SANITIZERS = {"--sanitize": "address,undefined", "--threads": "thread"}
THREADED = ["test_average_precision", "test_stream"]
"""Programs of the only files that start threads."""


def run(mode: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Compile what changed (in build/, which is kept) and run it; skips where the compiler has no such sanitizer."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    asked = subprocess.run(
        [*compiler.split(), f"-fsanitize={SANITIZERS[mode]}", "-x", "c++", "-", "-o", os.devnull],
        input="int main() {}", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if asked.returncode:
        pytest.skip(f"{compiler} has no {SANITIZERS[mode]} sanitizer: {asked.stderr.strip()[:200]}")
    return subprocess.run(
        [str(TESTS / "run.sh"), mode, "--fuzz", "2", *arguments],
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip


def test_all_programs_pass_under_the_address_and_undefined_behaviour_sanitizers() -> None:
    done = run("--sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    programs = sorted(path.stem for path in TESTS.glob("*_*.cpp"))
    assert [line for line in done.stdout.splitlines() if line.startswith("passed: ")] == [
        f"passed: {name}" for name in sorted(programs, key=lambda name: (name.startswith("fuzz"), name))
    ]


def test_no_two_threads_meet_in_what_starts_threads() -> None:
    done = run("--threads", *THREADED)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_starts_threads_is_watched() -> None:
    starting = {
        path.stem for path in (TESTS.parent / "src").glob("*.cpp") if '"parallel.h"' in path.read_text(encoding="utf-8")
    }
    assert {f"test_{name}" for name in starting} <= set(THREADED)


def test_every_header_is_tested_or_fuzzed() -> None:
    files = [path for path in TESTS.iterdir() if path.suffix in (".cpp", ".h")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for header in (TESTS.parent / "include" / "xalign").glob("*.h"):
        assert f'#include "xalign/{header.name}"' in text, header.name

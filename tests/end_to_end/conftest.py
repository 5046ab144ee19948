"""Runs the ``xalign`` command as a user does."""

from __future__ import annotations

import subprocess
import sys

import pytest
from xalign_process import Xalign, environment


@pytest.fixture(scope="session")
def xalign() -> Xalign:
    """``xalign("blend", path)`` -> the finished process; ``check=False`` lets it fail."""

    def run(*arguments: object, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_xalign", *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=environment(),
        )
        assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run

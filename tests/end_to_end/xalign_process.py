"""The ``xalign`` command as a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Xalign = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """One thread per process, and this checkout first."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}

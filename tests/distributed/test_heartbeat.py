"""A process that stands still ends the job in bounded time, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ProcessError, run_processes

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("heartbeat_job.py")


@pytest.mark.parametrize(
    ("how", "expected"), [("sleeps", "the others wait for it"), ("stopped", "has not been heard of for")]
)
def test_a_process_that_stands_still_is_named_and_ends_the_job(how: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="exit code 3"):
        run_processes(JOB, "stand_still", {"folder": str(tmp_path), "how": how}, 2, timeout_seconds=400)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert said.startswith("process 1 ") and expected in said
    if how == "sleeps":
        assert "step 2, reading samples" in said and "time.sleep(600)" in said


def test_what_may_take_long_ends_nobody(tmp_path: Path) -> None:
    assert run_processes(JOB, "go_on", {"folder": str(tmp_path)}, 2, timeout_seconds=400) == [0, 1]

"""``xalign train`` whose losses on the last rank are no numbers at the steps that XALIGN_TEST_POISONED names."""

from __future__ import annotations

import math
import os
from typing import Any

from megatron_xalign.cli import main
from megatron_xalign.training import forward, loop

POISONED = {int(step) for step in os.environ["XALIGN_TEST_POISONED"].split(",")}
"""Steps, counted from 1."""


def poison() -> None:
    """Break the losses, and with them the gradients, of the steps named; everything else is the product's."""
    step_now = 0
    numbers, run_model = loop.sample_numbers, forward.call_model

    def sample_numbers(step: int, *rest: Any) -> list[int]:
        nonlocal step_now
        step_now = step + 1
        return numbers(step, *rest)

    def call_model(*arguments: Any) -> Any:
        out = run_model(*arguments)
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return out * math.nan if is_last and step_now in POISONED else out

    loop.sample_numbers, forward.call_model = sample_numbers, call_model  # type: ignore[assignment]


if __name__ == "__main__":
    poison()
    raise SystemExit(main("train"))

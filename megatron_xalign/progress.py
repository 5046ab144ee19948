"""Progress bars with time left on standard error; silent on every process but the first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def _silent() -> bool:
    return os.environ.get("RANK", "0") != "0" or os.environ.get("XALIGN_PROGRESS", "1") == "0"


@contextmanager
def progress_bar(total: int | None, what: str, unit: str, initial: int = 0) -> Iterator[tqdm]:
    """A bar to ``update(n)`` and ``set_postfix_str(text)``; ``unit`` is what one count is (" docs", " steps").

    Shown in a terminal, and as one line every ten seconds where standard error is a file. ``XALIGN_PROGRESS=0``
    turns all bars off.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=total, desc=what, unit=unit, initial=initial, disable=_silent(), mininterval=interval,
        unit_scale=total is not None and total > 1_000_000, dynamic_ncols=True, smoothing=0.1,
    )
    try:
        yield bar
    finally:
        bar.close()


def track(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar."""
    with progress_bar(total, what, unit) as bar:
        for item in items:
            yield item
            bar.update(1)

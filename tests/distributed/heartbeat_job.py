"""Jobs whose second process stands still; called by the tests through ``run_processes``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from megatron_xalign import topology
from megatron_xalign.config import ParallelConfig


def stand_still(folder: str, how: str) -> None:
    """Three steps of which the second process does two; it ``sleeps`` or is ``stopped`` whole."""
    from megatron_xalign.training.heartbeat import Heartbeat

    def end(text: str) -> None:
        Path(folder, "said.new").write_text(text, encoding="utf-8")
        Path(folder, "said.new").replace(Path(folder, "said"))
        os._exit(3)

    parallel = ParallelConfig(distributed_timeout_seconds=600)
    with topology.start(parallel, seed=1) as ranks, Heartbeat(ranks, 10.0, 0.5, end) as heartbeat:
        for step in range(3):
            heartbeat.at(step, "reading samples")
            if step == 2 and ranks.rank == 1:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
            heartbeat.at(step, "in forward and backward passes")
            ranks.sum_over(torch.ones(3), "world")


def go_on(folder: str) -> int:
    """A place that may take longer than the limit, on all; nobody is ended."""
    from megatron_xalign.training.heartbeat import Heartbeat

    with topology.start(ParallelConfig(), seed=1) as ranks:
        with Heartbeat(ranks, 5.0, 0.1, lambda text: os._exit(3)) as heartbeat:
            heartbeat.at(0, "saving", bounded=False)
            time.sleep(8)
            heartbeat.at(1, "reading samples")
        return ranks.rank

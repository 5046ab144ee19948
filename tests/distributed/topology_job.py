"""What processes of a job see of their topology; called by the tests through ``run_processes``."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from megatron_xalign import topology
from megatron_xalign.config import ParallelConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import ConfigError, WorkerError


def describe(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join several layouts one after another; for each, the ranks and what every collective gives."""
    return [_describe(from_tree(ParallelConfig, layout)) for layout in layouts]


def _describe(parallel: ParallelConfig) -> dict[str, Any]:
    with topology.start(parallel, seed=3) as ranks:
        own = torch.tensor([float(ranks.rank), 1.0])
        axes: tuple[topology.Axis, ...] = get_args(topology.Axis)
        seen = {
            "ranks": {k: v for k, v in dataclasses.asdict(ranks).items() if k != "device"},
            "device": str(ranks.device), "first": ranks.is_first_stage, "last": ranks.is_last_stage,
            "data_context_rank": ranks.data_context_rank,
            "sum": {axis: ranks.sum_over(own, axis).tolist() for axis in axes},
            "gather": {axis: [int(t[0]) for t in ranks.gather_over(own, axis)] for axis in axes},
            "broadcast": {
                axis: int(ranks.broadcast_over(own, axis, ranks.size_of(axis) - 1)[0]) for axis in axes
            },
            "object": ranks.broadcast_object({"from": ranks.rank}, source=ranks.world_size - 1),
            "own": own.tolist(),
        }
        ranks.barrier()
    seen["left"] = not torch.distributed.is_initialized()
    return seen


def go_alone(taken_port: int, empty_port: int) -> dict[str, Any]:
    """What one process is told that starts a job which cannot start, and then one that can."""
    said: dict[str, Any] = {
        "indivisible": _try(ParallelConfig(tensor_model_parallel_size=3, pipeline_model_parallel_size=2))
    }
    os.environ["WORLD_SIZE"] = "2"
    os.environ["MASTER_PORT"] = str(taken_port)
    said["taken"] = _try(ParallelConfig(distributed_timeout_seconds=5))
    os.environ["MASTER_PORT"] = str(empty_port)
    said["empty"] = _try(ParallelConfig(distributed_timeout_seconds=3))
    del os.environ["MASTER_PORT"]
    said["no launcher"] = _try(ParallelConfig())
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        del os.environ[name]
    said["alone"] = describe([{}, {}])
    return said


def _try(parallel: ParallelConfig) -> str:
    try:
        with topology.start(parallel, seed=3):
            return "started"
    except (ConfigError, WorkerError) as error:
        return str(error)


def lose_a_peer() -> dict[str, Any]:
    """The second process goes without a word; what the first one is told, and after how long."""
    started = time.monotonic()
    try:
        with topology.start(ParallelConfig(tensor_model_parallel_size=2, distributed_timeout_seconds=20), 3) as ranks:
            ranks.barrier()
            if ranks.rank == 1:
                (Path(sys.argv[3]) / "1.json").write_text("null", encoding="utf-8")
                os._exit(0)
            started = time.monotonic()
            for _ in range(1000):
                ranks.sum_over(torch.ones(1), "tensor")
    except WorkerError as error:
        return {"error": str(error), "seconds": time.monotonic() - started}
    return {"error": "", "seconds": 0.0}

"""Ranks and their collectives under real process groups, and what goes wrong on the way into a job."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from processes import free_port, run_processes

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("topology_job.py")
AXES = ("tensor", "pipeline", "data", "context", "data_context", "world")
LAYOUTS = [
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {},
    {"context_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "context_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
]


@pytest.fixture(scope="module")
def four_processes() -> list[list[dict[str, Any]]]:
    """By layout, what each of four processes saw; the layouts are joined one after another."""
    by_rank = run_processes(JOB, "describe", {"layouts": LAYOUTS}, num_processes=4)
    return [[seen[layout] for seen in by_rank] for layout in range(len(LAYOUTS))]


def neighbours(layout: int, rank: int, axis: str) -> list[int]:
    """Processes along an axis through ``rank``; from the innermost: tensor, context, data, pipeline, as Megatron's."""
    tensor = LAYOUTS[layout].get("tensor_model_parallel_size", 1)
    pipeline = LAYOUTS[layout].get("pipeline_model_parallel_size", 1)
    context = LAYOUTS[layout].get("context_parallel_size", 1)
    data = 4 // (tensor * pipeline * context)
    stride = {
        "tensor": 1, "context": tensor, "data": tensor * context, "data_context": tensor,
        "pipeline": tensor * context * data,
    }.get(axis, 1)
    size = {
        "tensor": tensor, "context": context, "data": data, "data_context": data * context, "pipeline": pipeline
    }.get(axis, 4)
    first = rank - (rank // stride % size) * stride
    return [first + i * stride for i in range(size)]


def test_groups_that_connect_when_they_first_speak_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    seen = run_processes(JOB, "describe", {"layouts": [LAYOUTS[1]]}, num_processes=2, timeout_seconds=120)
    assert [one[0]["gather"]["tensor"] for one in seen] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_collectives_reach_the_processes_of_their_axis(
    four_processes: list[list[dict[str, Any]]], layout: int
) -> None:
    for rank, seen in enumerate(four_processes[layout]):
        for axis in AXES:
            peers = neighbours(layout, rank, axis)
            assert seen["gather"][axis] == peers
            assert seen["sum"][axis] == [sum(peers), len(peers)]
            assert seen["broadcast"][axis] == peers[-1]
            if axis == "data_context":
                assert seen["data_context_rank"] == peers.index(rank)
            elif axis != "world":
                assert seen["ranks"][f"{axis}_size"] == len(peers)
                assert seen["ranks"][f"{axis}_rank"] == peers.index(rank)
        assert seen["object"] == {"from": 3}
        assert seen["own"] == [rank, 1.0], "a collective changed its argument"
        assert seen["ranks"]["rank"] == rank and seen["ranks"]["world_size"] == 4
        assert seen["left"] and seen["device"] == "cpu"


def test_the_first_and_last_stage_know_it(four_processes: list[list[dict[str, Any]]]) -> None:
    assert [(seen["first"], seen["last"]) for seen in four_processes[2]] == [(True, False)] * 2 + [(False, True)] * 2
    assert all(seen["first"] and seen["last"] for seen in four_processes[3])


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What a process is told whose job cannot start, because of its size, its port, its peers, its launcher."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = {"taken_port": taken.getsockname()[1], "empty_port": free_port()}
        return {**run_processes(JOB, "go_alone", ports)[0], **ports}


def test_one_process_needs_no_launcher(alone: dict[str, Any]) -> None:
    assert [seen["gather"]["world"] for seen in alone["alone"]] == [[0], [0]]


def test_processes_that_cannot_be_divided_are_refused_with_the_three_numbers(alone: dict[str, Any]) -> None:
    for part in ("1 process(es)", "tensor_model_parallel_size=3", "pipeline_model_parallel_size=2", "per-node 6"):
        assert part in alone["indivisible"]


def test_a_port_in_use_is_named_with_the_way_out(alone: dict[str, Any]) -> None:
    assert f"port {alone['taken_port']} on localhost is in use" in alone["taken"]
    assert "--master-port" in alone["taken"]


def test_a_peer_that_never_comes_ends_the_wait(alone: dict[str, Any]) -> None:
    assert f"did not find the others at localhost:{alone['empty_port']} within 3 s" in alone["empty"]


def test_a_job_of_several_processes_without_a_launcher_is_told_about_torchrun(alone: dict[str, Any]) -> None:
    assert "MASTER_PORT=None" in alone["no launcher"] and "torchrun" in alone["no launcher"]


def test_a_process_that_dies_is_an_error_for_the_others_in_bounded_time() -> None:
    survivor, _ = run_processes(JOB, "lose_a_peer", num_processes=2)
    assert "process 0 of 2 lost another process of this job" in survivor["error"]
    assert survivor["seconds"] < 40

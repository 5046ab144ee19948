"""What the watch makes of beats: who is silent, who is behind, who is waited for; jobs in tests/distributed."""

from __future__ import annotations

from typing import Any

from megatron_xalign.training.heartbeat import Beat, Watch


def beat(rank: int, number: int = 1, **changes: Any) -> Beat:
    values: dict[str, Any] = {
        "host": f"node{rank}", "marks": 40, "step": 10, "place": "in forward and backward passes", "bounded": True,
        "seconds": 1.0, "waits": True, "stack": f"line of {rank}",
    } | changes
    return Beat(rank=rank, number=number, **values)


def test_nothing_is_wrong_while_all_beat_and_move() -> None:
    watch = Watch(60, 2)
    for number in range(100):
        assert watch.problem([beat(0, number, marks=number), beat(1, number, marks=number)], 5.0 * number) is None


def test_a_process_that_says_nothing_any_more_is_named_with_where_it_was() -> None:
    watch, said = Watch(60, 2), None
    for number in range(20):
        said = watch.problem([beat(0, number), beat(1, 3, place="reading samples")], 5.0 * number)
        if said:
            break
    assert said is not None
    assert "process 1 on node1 has not been heard of for 65 s" in said and "step 10, reading samples" in said


def test_the_one_that_is_behind_is_named_with_its_line() -> None:
    stuck = [beat(0, seconds=70.0), beat(1, seconds=71.0, marks=39, place="in Mine.before_step", bounded=False)]
    said = Watch(60, 2).problem(stuck, 0.0)
    assert said is not None
    assert "process 1 on node1 has been at step 10, in Mine.before_step" in said and "line of 1" in said


def test_where_all_are_at_one_place_the_one_that_does_not_wait_is_named() -> None:
    said = Watch(60, 3).problem([beat(0, seconds=70.0), beat(1, seconds=70.0, waits=False), beat(2, seconds=70.0)], 0.0)
    assert said is not None and "process 1 on node1" in said


def test_a_deadlock_of_all_is_said_to_be_one() -> None:
    said = Watch(60, 2).problem([beat(0, seconds=70.0), beat(1, seconds=70.0)], 0.0)
    assert said is not None and said.startswith("all 2 processes have been at step 10")


def test_what_may_take_long_on_all_is_let_be() -> None:
    saving = [beat(rank, seconds=1e6, place="saving", bounded=False) for rank in range(2)]
    assert Watch(60, 2).problem(saving, 0.0) is None


def test_a_process_that_never_spoke_is_named_once_the_others_wait_for_it() -> None:
    watch = Watch(60, 2)
    assert watch.problem([beat(0, 1)], 0.0) is None
    said = watch.problem([beat(0, 2, seconds=61.0)], 61.0)
    assert said is not None and said.startswith("process 1 has not been heard of for 61 s")

"""Checkpoints of real jobs: resuming bit for bit, loading on other layouts, conversion, damage, kills.

Oracles: the run that was never interrupted; the tensors themselves, saved again from another layout and read without
Megatron; transformers' own model for the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ProcessError, run_processes

from megatron_xalign.convert.check import check
from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.formats.checkpoint_folder import check_whole

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("checkpoint_job.py")
SAVED_AT = 3
OLMO_TIED = {"normalization": "LayerNorm", "untie_embeddings_and_output_weights": False}
TIED = {"untie_embeddings_and_output_weights": False}
DISTRIBUTED = {"use_distributed_optimizer": True}

FOUR = [
    {
        "name": "tp2pp2", "resume": True,
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    },
    {
        "name": "tp2dp2-olmo", "resume": True, "model": OLMO_TIED,
        "parallel": {"tensor_model_parallel_size": 2, **DISTRIBUTED},
    },
]
TWO = [
    {"name": "dp2", "resume": True, "parallel": DISTRIBUTED},
    {"name": "pp2-tied-bf16", "resume": True, "model": TIED, "params_dtype": "bf16",
     "parallel": {"pipeline_model_parallel_size": 2, **DISTRIBUTED}},
    # Without the distributed optimizer, from runs that had it.
    {"name": "tp2", "load": ["dp2", "tp2pp2"], "parallel": {"tensor_model_parallel_size": 2}},
]
ONE = [
    {"name": "one", "load": ["tp2pp2", "dp2"]},
    {"name": "one-sharded", "load": ["tp2pp2"], "parallel": DISTRIBUTED},
    {"name": "one-olmo", "load": ["tp2dp2-olmo"], "model": OLMO_TIED},
    {"name": "one-bf16", "load": ["pp2-tied-bf16"], "model": TIED, "params_dtype": "bf16"},
]
RESUMED = [scenario["name"] for scenario in FOUR + TWO if scenario.get("resume")]
MOVED = [(scenario["name"], source) for scenario in TWO + ONE for source in scenario.get("load", [])]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Folder of all runs, and what each process of each run saw."""
    folder = tmp_path_factory.mktemp("runs")
    seen: dict[str, list[dict[str, Any]]] = {}
    for num_processes, scenarios in ((4, FOUR), (2, TWO), (1, ONE)):
        results = run_processes(JOB, "train", {"folder": str(folder), "scenarios": scenarios}, num_processes)
        for scenario in scenarios:
            seen[scenario["name"]] = [result[scenario["name"]] for result in results]
    return folder, seen


def rest(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in metrics if line["step"] > SAVED_AT]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(jobs: Any, name: str) -> None:
    for process in jobs[1][name]:
        assert [line["step"] for line in process[name]["metrics"]] == [4, 5, 6]
        assert process[name]["metrics"] == rest(process["whole"]["metrics"])
        assert process[name]["weights"] == process["whole"]["weights"]


@pytest.mark.parametrize(("name", "source"), MOVED)
def test_a_run_goes_on_on_another_layout_with_the_same_losses(jobs: Any, name: str, source: str) -> None:
    theirs = rest(jobs[1][source][0]["whole"]["metrics"])
    tolerance = 2e-3 if "bf16" in name else 2e-6
    for process in jobs[1][name]:
        for ours, line in zip(process[source]["metrics"], theirs, strict=True):
            assert ours["loss"] == pytest.approx(line["loss"], rel=tolerance)
            assert ours["grad_norm"] == pytest.approx(line["grad_norm"], rel=30 * tolerance)
            assert ours["lr"] == line["lr"]


@pytest.mark.parametrize(("name", "source"), MOVED)
def test_weights_and_optimizer_state_move_to_another_layout_bit_for_bit(jobs: Any, name: str, source: str) -> None:
    here = CheckpointReader(jobs[0] / f"{name}-from-{source}" / "step-000003")
    there = CheckpointReader(jobs[0] / source / "step-000003")
    assert here.names() == there.names()
    assert {name.split(".")[2] for name in here.names() if name.startswith("optimizer.")} >= {"exp_avg", "exp_avg_sq"}
    for tensor in here.names():
        assert torch.equal(here.tensor(tensor), there.tensor(tensor)), tensor


def test_moments_are_there_and_not_zero(jobs: Any) -> None:
    reader = CheckpointReader(jobs[0] / "dp2" / "step-000003")
    for name in reader.names():
        if name.startswith("optimizer."):
            assert reader.tensor(name).abs().max() > 0


def test_only_a_bf16_run_stores_main_weights_and_they_round_to_its_weights(jobs: Any) -> None:
    for name, expected in (("pp2-tied-bf16", True), ("dp2", False)):
        reader = CheckpointReader(jobs[0] / name / "step-000003")
        main = [tensor for tensor in reader.names() if tensor.startswith("optimizer.state.param.")]
        assert bool(main) == expected
        for tensor in main:
            weight = reader.tensor(tensor.removeprefix("optimizer.state.param."))
            assert torch.equal(reader.tensor(tensor).bfloat16(), weight) and weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def megatron_logits(jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("logits") / "logits.pt"
    checkpoints = [str(jobs[0] / name / "step-000006") for name in RESUMED]
    run_processes(JOB, "logits", {"checkpoints": checkpoints, "out": str(out)})
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", RESUMED)
def test_the_converted_model_computes_megatrons_logits(
    jobs: Any, megatron_logits: Any, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("transformers")
    checkpoint = jobs[0] / name / "step-000006"
    tokens, logits = megatron_logits["tokens"], megatron_logits["logits"][str(checkpoint)]
    answers: dict[tuple[int, ...], torch.Tensor] = {
        tuple(row.tolist()): logit for row, logit in zip(tokens, logits, strict=True)
    }
    ask: Callable[[torch.Tensor], torch.Tensor] = lambda row: answers[tuple(row[0].tolist())][None]  # noqa: E731
    report = check(checkpoint, to_hf(checkpoint, tmp_path / "hf"), tokens, ask, tolerance=2e-5)
    report.require()
    assert report.architecture == ("OlmoForCausalLM" if "olmo" in name else "LlamaForCausalLM")
    assert report.logit_deviation > 0.5  # not a model of zeros


def test_a_failure_of_one_process_fails_all_and_leaves_nothing_behind(jobs: Any, tmp_path: Path) -> None:
    good = jobs[0] / "tp2pp2" / "step-000003"
    first, second = run_processes(JOB, "hopeless", {"folder": str(tmp_path / "x"), "good": str(good)}, 2)
    for said in (first, second):
        assert "process 1: [Errno 28] No space left on device" in said["full disk"]
        assert "process 0: [Errno 28] No space left on device" in said["full disk later"]
        assert said["left"] == ""
        assert "__1_0.distcp has another content" in said["one bit"]
        assert "asks for posix.mkdir" in said["malicious"] and said["ran"] == "False"
        assert "linear_fc1.weight" in said["other model"] and "does not fit this model" in said["other model"]
        assert "max_lr 0.003 (now 0.005)" in said["other schedule"]
        assert all(said[name].startswith("CheckpointError") for name in said if " " in name)
    assert check_whole(good)


def test_a_save_killed_before_it_has_its_name_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    # Before the tensors, with the tensors written by a thread, and with everything written but the name.
    moments = {"write_random_state": False, "describe_file": True, "replace_folder": False}
    folders = [str(tmp_path / moment) for moment in moments]
    for folder, (moment, in_background) in zip(folders, moments.items(), strict=True):
        with pytest.raises(ProcessError, match="exit code -9"):
            run_processes(JOB, "killed", {"folder": folder, "moment": moment, "in_background": in_background})
    ((*found, random_states, missing),) = run_processes(JOB, "after_kill", {"folders": folders})
    for state in found:
        assert state == {
            "before": [".step-000002.partial", "step-000001"], "step": 1, "after": ["step-000001", "step-000002"]
        }
    # The last save left its generators as they were, so a process that loads it draws the same numbers.
    assert random_states["drawn after loading"] == random_states["drawn"]
    assert "step-000077 does not exist" in missing["missing"]


def test_a_save_behind_the_run_s_back_has_the_bytes_of_one_at_once_and_a_full_disk_leaves_the_one_before(
    tmp_path: Path,
) -> None:
    for result in run_processes(JOB, "behind", {"folder": str(tmp_path)}, 2):
        assert not result["existed before"] and result["changed"]
        said = result["said"]
        for in_background in (False, True):
            assert "process 1: " in said[f"no room, in background {in_background}"] or "File too large" in said[
                f"no room, in background {in_background}"
            ], said
        assert said["left"] == "step-000006"
    here, there = tmp_path / "at-once" / "step-000006", tmp_path / "behind" / "step-000006"
    names = sorted(path.name for path in here.iterdir())
    assert names == sorted(path.name for path in there.iterdir()) and len(names) > 5
    for name in names:
        if name not in ("xalign.json", ".metadata"):
            assert (here / name).read_bytes() == (there / name).read_bytes(), name
    manifest = check_whole(tmp_path / "unhashed" / "step-000001")
    assert manifest["files"] and all(set(facts) == {"bytes"} for facts in manifest["files"].values())

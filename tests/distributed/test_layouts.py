"""Interleaved pipelines, context parallelism and documents apart: 20 steps on each layout against one process.

Tolerances: loss 2e-6 and gradient norm 5e-5 (relative) at every step, weights after 20 steps 2e-5: float32 sums taken
in another order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_job import LENGTH, SAVED_AT, STEPS
from processes import run_processes
from training_job import VOCAB

from megatron_xalign.formats.checkpoint import CheckpointReader

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("layout_job.py")
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True}
TIED = {"untie_embeddings_and_output_weights": False}
SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
BLOCK = {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2}
Z_LOSS = {"z_loss_coefficient": 0.02}
# 4 steps of 2 samples, then 18 of 4.
RAMP = {"rampup_batch_size": [2, 2, 8], "micro_batch_size": 1}
APART = {"reset_attention_mask": True}
APART_AND_RESET = APART | {"reset_position_ids": True}

ONE = {
    "one": {},
    "one tied": {"model": TIED},
    "one apart": {"data": APART},
    "one apart reset": {"data": APART_AND_RESET},
    "one reset": {"data": {"reset_position_ids": True}},
    "one z": {"training": Z_LOSS},
    "one ramp": {"training": RAMP},
    "one selective": {"training": SELECTIVE},
    "one block": {"training": BLOCK},
    "one ramp from dp2": {"training": RAMP, "load": "dp2 ramp"},
    "one from vp2": {"load": "vp2"},
    "one from cp2": {"load": "cp2 sharded"},
}
TWO = {
    "vp2": {"parallel": VP2},
    "vp2 tied": {"parallel": VP2 | SHARDED, "model": TIED, "training": {"recompute": "full"}},
    "vp2 from one": {"parallel": VP2, "load": "one"},
    "cp2 sharded": {"parallel": CP2 | SHARDED},
    "cp2 recompute apart": {"parallel": CP2, "training": SELECTIVE, "data": APART},
    "cp2 reset": {"parallel": CP2, "data": {"reset_position_ids": True}},
    "tp2 z": {"parallel": TP2, "training": Z_LOSS},
    "dp2 ramp": {"training": RAMP},
    "pp2 apart": {"parallel": PP2, "data": APART},
}
FOUR = {
    "tp2 vp2 sp tied": {"parallel": TP2 | VP2 | SP, "model": TIED},
    "tp2 cp2 sp": {"parallel": TP2 | CP2 | SP},
    "vp2 cp2 apart": {"parallel": VP2 | CP2, "data": APART},
    "vp2 dp2 from cp2": {"parallel": VP2 | SHARDED, "load": "cp2 sharded", "training": {"micro_batch_size": 1}},
    "cp4": {"parallel": {"context_parallel_size": 4}},
    "cp2 dp2 from vp2": {"parallel": CP2 | SHARDED, "load": "vp2"},
}
# What a run on one process with the same model and data is called.
LIKE = {
    name: "one" + "".join(f" {word}" for word in ("tied", "apart", "reset", "z", "ramp") if word in name.split())
    for name in TWO | FOUR | ONE
}
LOADED = [name for name in ONE | TWO | FOUR if " from " in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every process of every run saw, by the run's name."""
    results: dict[str, list[dict[str, Any]]] = {}
    afresh = {name: settings for name, settings in ONE.items() if name not in LOADED}
    loaded = {name: settings for name, settings in ONE.items() if name in LOADED}
    for num_processes, scenarios in ((1, afresh), (2, TWO), (4, FOUR), (1, loaded)):
        arguments = {"folder": str(folder), "scenarios": [{"name": name, **s} for name, s in scenarios.items()]}
        by_rank = run_processes(JOB, "run", arguments, num_processes, timeout_seconds=600)
        results |= {name: [result[name] for result in by_rank] for name in scenarios}
    return results


def curve(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> np.ndarray:
    return np.array([line[key] for line in runs[name][0]["metrics"]])


def weights(folder: Path, name: str, step: int = STEPS) -> dict[str, np.ndarray]:
    """Whole weights of a run's checkpoint, read without Megatron, whatever layout wrote it."""
    reader = CheckpointReader(folder / name / f"step-{step:06d}")
    names = [key for key in reader.names() if not key.startswith(("optimizer.", "observers."))]
    return {key: reader.tensor(key).float().numpy() for key in names}


@pytest.mark.parametrize("name", [name for name in LIKE if LIKE[name] != name])
def test_twenty_steps_do_not_depend_on_the_layout(
    runs: dict[str, list[dict[str, Any]]], folder: Path, name: str
) -> None:
    first = SAVED_AT if name in LOADED else 0
    loss, grad_norm = (curve(runs, LIKE[name], key)[first:] for key in ("loss", "grad_norm"))
    np.testing.assert_allclose(curve(runs, name, "loss"), loss, rtol=0, atol=2e-6)
    np.testing.assert_allclose(curve(runs, name, "grad_norm"), grad_norm, rtol=5e-5)
    found, expected = weights(folder, name), weights(folder, LIKE[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", [name for name in LIKE if LIKE[name] != name and name not in LOADED])
def test_losses_by_language_and_source_are_summed_over_every_token(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for line, expected in zip(runs[name][0]["metrics"], runs[LIKE[name]][0]["metrics"], strict=True):
        for key in ("loss_by_language", "loss_by_source"):
            assert line[key] == pytest.approx(expected[key], abs=2e-6)
        for key in ("tokens_by_language", "tokens_by_source"):
            assert line[key] == expected[key]


@pytest.mark.parametrize("name", [name for name in LIKE if LIKE[name] != name and name not in LOADED])
def test_losses_of_batches_that_are_only_read_are_whole_and_in_order(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    expected = runs[LIKE[name]][0]["held_out"]
    assert len(expected) == 2
    for result in runs[name]:
        assert len(result["held_out"]) == (2 if result["is_last_stage"] else 0)
        for moment, wanted in zip(result["held_out"], expected, strict=False):
            for found, losses in zip(moment, wanted, strict=True):
                np.testing.assert_allclose(found, losses, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LOADED)
def test_arrays_of_observers_find_their_layers_on_another_layout(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    assert all(result["observed"] for result in runs[name])


def test_batches_that_grow_read_the_same_samples_in_more_steps(runs: dict[str, list[dict[str, Any]]]) -> None:
    lines = runs["one ramp"][0]["metrics"]
    consumed = [line["consumed_tokens"] // LENGTH for line in lines]
    assert consumed == [2, 4, 6, 8, *range(12, 81, 4)]
    # Warm-up is 2 full batches, or 8 samples, and the first step has read none.
    assert [line["lr"] for line in lines[:5]] == pytest.approx([2e-3 * part for part in (0, 0.25, 0.5, 0.75, 1.0)])
    for line, samples in zip(lines[5:], consumed[4:], strict=False):
        done = (samples - 8) / (80 - 8)
        assert line["lr"] == pytest.approx(5e-4 + 1.5e-3 * (1 + math.cos(math.pi * done)) / 2)


def test_the_z_loss_moves_weights_and_is_not_in_the_reported_loss(runs: dict[str, list[dict[str, Any]]]) -> None:
    plain, with_z = curve(runs, "one", "loss"), curve(runs, "one z", "loss")
    # Step 1 has learning rate zero, so both report the losses of the same weights twice.
    assert with_z[:2].tolist() == plain[:2].tolist()
    assert np.abs(with_z[2:] - plain[2:]).max() > 1e-5
    # Of all but even logits, and logged apart.
    expected = Z_LOSS["z_loss_coefficient"] * math.log(VOCAB) ** 2
    assert curve(runs, "one z", "z_loss")[0] == pytest.approx(expected, rel=0.02)
    assert np.abs(curve(runs, "one z", "grad_norm") / curve(runs, "one", "grad_norm") - 1).max() > 1e-3


def test_documents_apart_and_positions_matter(runs: dict[str, list[dict[str, Any]]]) -> None:
    together, apart = curve(runs, "one", "loss"), curve(runs, "one apart", "loss")
    assert np.abs(together - apart).max() > 1e-3
    assert np.abs(together - curve(runs, "one reset", "loss")).max() > 1e-4
    # Rotary positions are relative: inside a document nothing changes where it starts to count.
    np.testing.assert_allclose(curve(runs, "one apart reset", "loss"), apart, rtol=0, atol=1e-5)


def test_an_interleaved_stage_holds_as_many_blocks_as_asked(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert [result["chunks"] for result in runs["vp2"]] == [2, 2]
    assert [result["chunks"] for result in runs["pp2 apart"]] == [1, 1]
    assert sum(result["parameters"] for result in runs["vp2"]) == runs["one"][0]["parameters"]

"""What capture writes under every layout, against raw activations collected in one process and summed by NumPy."""

# S sequence, B global batch, F ffn width, K languages, L layers, D probe sentences

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.formats.neuron_stats import NeuronStats, list_neuron_stats, read_neuron_stats, stats_folder

pytestmark = pytest.mark.distributed

JOB = Path(__file__).parents[1] / "capture" / "job.py"
LAYERS, FFN = 2, 48
# Steps of the stream window of every file.
WINDOWS = {2: (1, 2), 3: (3,)}
Outcome = dict[str, np.ndarray]


def run_job(folder: Path, processes: int, *scenarios: dict[str, Any]) -> None:
    command = [sys.executable, str(JOB)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, str(JOB)]
    environment = os.environ | {
        "PYTHONPATH": str(JOB.parents[2]), "OMP_NUM_THREADS": "1", "XALIGN_PROGRESS": "0", "PYTHONWARNINGS": "ignore",
    }
    result = subprocess.run(
        [*command, str(folder), *map(json.dumps, scenarios)], env=environment, capture_output=True, text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_job(
        folder, 1,
        {"name": "naive", "micro_batch": 8, "capture": False, "naive": True},
        {"name": "whole", "micro_batch": 8},
        {"name": "off", "micro_batch": 2, "capture": False},
        {"name": "on", "micro_batch": 2},
        {"name": "recompute", "micro_batch": 2, "recompute": "full"},
        {"name": "resumed", "micro_batch": 2, "resume_at": 2},
        {"name": "resumed in a window", "micro_batch": 2, "resume_at": 1},
        {"name": "stopped", "micro_batch": 2, "stop_at": 1, "checkpoint": "saved"},
        {"name": "continued", "micro_batch": 2, "checkpoint": "saved"},
    )
    return folder


@pytest.fixture(scope="module")
def naive(alone: Path) -> Outcome:
    return outcome_of(alone / "naive")


def outcome_of(run: Path) -> Outcome:
    with np.load(run / "outcome.npz") as file:
        return dict(file)


def assert_counts(actual_KF: np.ndarray, values_SBF: np.ndarray, ids_SB: np.ndarray) -> None:
    """Positive counts per language; a value within rounding of zero may fall on either side."""
    for k, count_F in enumerate(actual_KF):
        values_TF = values_SBF[ids_SB == k]
        near_F = (np.abs(values_TF) < 1e-6 * np.abs(values_SBF).mean()).sum(0)
        assert near_F.sum() <= 2, "too many values near zero for this to test anything"
        assert (np.abs(count_F - (values_TF > 0).sum(0)) <= near_F).all()


def assert_stream(stats: NeuronStats, naive: Outcome) -> None:
    steps = WINDOWS[stats.step]
    assert (stats.index.stream_first_step, stats.index.stream_last_step) == (steps[0], steps[-1])
    ids_SB = np.concatenate([naive[f"step{step}_language_ids"].T for step in steps])
    tokens = [(ids_SB == k).sum() for k in range(2)]
    np.testing.assert_array_equal(stats.stream_tokens_K, tokens)
    assert (ids_SB == -1).sum() > 20
    for layer in range(LAYERS):
        act = np.concatenate([naive[f"step{step}_act{layer}"] for step in steps]).astype(np.float64)
        gate = np.concatenate([naive[f"step{step}_fc1_{layer}"] for step in steps])[..., :FFN]
        scale = np.abs(act).mean()
        for k in range(2):
            mine = act[ids_SB == k]
            np.testing.assert_allclose(stats.stream_sum_KLF[k, layer], mine.sum(0), rtol=1e-5, atol=1e-5 * scale)
            squares = stats.stream_sum_of_squares_KLF[k, layer]
            np.testing.assert_allclose(squares, (mine**2).sum(0), rtol=1e-5)
            np.testing.assert_allclose(stats.stream_max_KLF[k, layer], mine.max(0), rtol=1e-5, atol=1e-6 * scale)
        assert_counts(stats.stream_positive_KLF[:, layer], act, ids_SB)
        assert_counts(stats.stream_gate_positive_KLF[:, layer], gate, ids_SB)


def assert_probe(stats: NeuronStats, naive: Outcome) -> None:
    prefix = f"probe{stats.step}_"
    np.testing.assert_allclose(stats.probe_nll_D, naive[f"{prefix}nll"], rtol=1e-6)
    ids_T = np.repeat(stats.document_language_ids, stats.probe_tokens_D)
    np.testing.assert_array_equal(stats.probe_tokens_K, np.bincount(ids_T))
    np.testing.assert_array_equal(stats.probe_bytes_D, np.repeat(10 + np.arange(5), 2))
    for row in range(LAYERS + 1):
        expected = naive[f"{prefix}residual{row}_mean"]
        close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).mean()}
        np.testing.assert_allclose(stats.probe_residual_mean_DMH[:, row], expected, **close)
    for layer in range(LAYERS):
        expected = naive[f"{prefix}act{layer}_mean"]
        close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(expected).mean()}
        np.testing.assert_allclose(stats.probe_neuron_mean_DLF[:, layer], expected, **close)
        gate_TF = naive[f"{prefix}fc1_{layer}"][:, :FFN]
        assert_counts(stats.probe_gate_positive_KLF[:, layer], gate_TF[:, None], ids_T[:, None])


def assert_like_naive(run: Path, naive: Outcome) -> None:
    found = list_neuron_stats(run)
    assert [step for step, _ in found] == [0, 2, 3]
    for step, path in found:
        stats = read_neuron_stats(path)
        assert stats.consumed_tokens == step * 8 * 16
        assert_probe(stats, naive)
        assert stats.has_stream == (step > 0)
        if stats.has_stream:
            assert_stream(stats, naive)


@pytest.mark.parametrize("name", ["whole", "on", "recompute"])
def test_one_process_captures_what_naive_hooks_collect(alone: Path, naive: Outcome, name: str) -> None:
    """In one micro-batch, in four, and with every forward running twice."""
    assert_like_naive(alone / name, naive)


def test_training_is_the_same_bits_with_capture_on_and_off(alone: Path) -> None:
    on, off = outcome_of(alone / "on"), outcome_of(alone / "off")
    assert on["weights"].tobytes() == off["weights"].tobytes()
    assert on["loss"] == off["loss"] and on["grad_norm"] == off["grad_norm"]


@pytest.mark.parametrize("name", ["resumed", "resumed in a window"])
def test_a_resumed_run_writes_the_same_bytes(alone: Path, name: str) -> None:
    shard = "shard-tp0-pp0.safetensors"
    for step in (0, 2, 3):
        uninterrupted, resumed = (stats_folder(alone / run, step) / shard for run in ("on", name))
        assert uninterrupted.read_bytes() == resumed.read_bytes()


def test_a_checkpoint_in_a_window_carries_its_sums(alone: Path) -> None:
    shard = "shard-tp0-pp0.safetensors"
    assert [step for step, _ in list_neuron_stats(alone / "stopped")] == [0]
    assert [step for step, _ in list_neuron_stats(alone / "continued")] == [2, 3]
    for step in (2, 3):
        uninterrupted, resumed = (stats_folder(alone / run, step) / shard for run in ("on", "continued"))
        assert uninterrupted.read_bytes() == resumed.read_bytes()


def test_no_hook_is_left_after_training(alone: Path) -> None:
    assert outcome_of(alone / "on")["hooks"] == outcome_of(alone / "off")["hooks"]


@pytest.mark.parametrize(
    ("scenario", "shards"),
    [
        ({"name": "tensor parallel", "tensor": 2, "micro_batch": 4}, {"tp0-pp0", "tp1-pp0"}),
        (
            {
                "name": "sequence parallel, recompute", "tensor": 2, "sequence_parallel": True, "recompute": "full",
                "micro_batch": 4,
            },
            {"tp0-pp0", "tp1-pp0"},
        ),
        ({"name": "pipeline", "pipeline": 2, "micro_batch": 2}, {"tp0-pp0", "tp0-pp1"}),
        ({"name": "data parallel", "micro_batch": 2}, {"tp0-pp0"}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_two_processes_capture_what_one_collects(
    tmp_path: Path, naive: Outcome, scenario: dict[str, Any], shards: set[str]
) -> None:
    run_job(tmp_path, 2, scenario)
    run = tmp_path / scenario["name"]
    assert {path.stem.removeprefix("shard-") for path in stats_folder(run, 3).glob("*.safetensors")} == shards
    assert_like_naive(run, naive)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tensor": 2, "micro_batch": 4}, {"pipeline": 2, "micro_batch": 2}),
        ({"pipeline": 2, "micro_batch": 2}, {"micro_batch": 2}),
        ({"micro_batch": 2}, {"tensor": 2, "sequence_parallel": True, "micro_batch": 4}),
    ],
    ids=["tp2 to pp2", "pp2 to dp2", "dp2 to tp2 sp"],
)
def test_sums_of_a_cut_window_go_on_under_another_layout(
    tmp_path: Path, naive: Outcome, before: dict[str, Any], after: dict[str, Any]
) -> None:
    run_job(
        tmp_path, 2,
        {"name": "stopped", "stop_at": 1, "checkpoint": "saved", **before},
        {"name": "continued", "checkpoint": "saved", **after},
    )
    found = list_neuron_stats(tmp_path / "continued")
    assert [step for step, _ in found] == [2, 3]
    for _, path in found:
        stats = read_neuron_stats(path)
        assert_stream(stats, naive)
        assert_probe(stats, naive)

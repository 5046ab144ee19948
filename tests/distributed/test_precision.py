"""Runs in FP8 and fp16: near bf16's, the same on every layout, resumed to the bit, and what export and capture see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_processes

from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.names import FP8_STATE

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("precision_job.py")
STEPS, RESUMED_FROM = 100, 60
WHOLE = {"training": {"micro_batch_size": 8}}  # one micro-batch: a quarter of the time
DELAYED = {"precision": {"fp8": {"recipe": "delayed", "amax_history_len": 16}}}
TENSORWISE = {"precision": {"fp8": {"recipe": "tensorwise"}}}
TP2 = {"tensor_model_parallel_size": 2}
SHORT: dict[str, Any] = {"steps": 6}

ONE = {
    "bf16": {"steps": STEPS, "precision": "bf16", **WHOLE},
    "delayed": {"steps": STEPS, "resume_from": RESUMED_FROM, "probed": True, **DELAYED, **WHOLE},
    "tensorwise": {"steps": STEPS, **TENSORWISE, **WHOLE},
    "edges": {"steps": 6, "precision": {"fp8": {"recipe": "delayed", "first_last_layers_bf16": True}}},
    "short bf16": SHORT | {"precision": "bf16"},
    "short": SHORT | DELAYED,
    "short probed": SHORT | DELAYED | {"probed": True},
    "short recomputed": SHORT | DELAYED | {"training": {"recompute": "full"}},
    "short e4m3": SHORT | {"precision": {"fp8": {"recipe": "delayed", "format": "e4m3"}}},
    "fp16": SHORT | {"precision": "fp16", "resume_from": 3},
    "fp16 overflowing": SHORT | {"precision": {"fp16": {"initial_loss_scale": 2.0**24, "hysteresis": 1}},
                                 "resume_from": 3},
    "fp32": SHORT | {"precision": "fp32"},
    "unfused": SHORT | {"precision": "fp32", "backend": {"attention": "unfused", "layers": "local"}},
}
TWO = {
    "tp2 delayed": {"steps": STEPS, "parallel": TP2, **DELAYED, **WHOLE},
    "tp2 sp": SHORT | DELAYED | {"parallel": TP2 | {"sequence_parallel": True}},
    "tp2": SHORT | DELAYED | {"parallel": TP2, "resume_from": 3},
    "tp2 tensorwise": SHORT | TENSORWISE | {"parallel": TP2},
    "dp2": SHORT | DELAYED | {"parallel": {"use_distributed_optimizer": True}},
    "pp2": SHORT | DELAYED | {"parallel": {"pipeline_model_parallel_size": 2}},
}
RESUMED = ["delayed", "fp16", "fp16 overflowing", "tp2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for num_processes, scenarios in ((1, ONE), (2, TWO)):
        arguments = {"folder": str(folder), "scenarios": [{"name": name, **s} for name, s in scenarios.items()]}
        by_rank = run_processes(JOB, "train", arguments, num_processes, timeout_seconds=1200)
        found |= {name: [result[name] for result in by_rank] for name in scenarios}
    return found


def losses(runs: Any, name: str) -> np.ndarray:
    return np.array([line["loss"] for line in runs[name][0]["metrics"]])


def numbers(metrics: list[dict[str, Any]]) -> list[Any]:
    return [[line[key] for key in ("step", "loss", "grad_norm", "lr")] + [line.get("loss_scale")] for line in metrics]


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "tp2 delayed"])
def test_a_hundred_steps_in_fp8_stay_within_two_hundredths_of_bf16(runs: Any, name: str) -> None:
    bf16, fp8 = losses(runs, "bf16"), losses(runs, name)
    assert bf16[0] - bf16[-1] > 2.5  # it learns, so there is something to lose
    assert np.abs(fp8 - bf16).max() < 0.05
    assert abs(fp8[-20:].mean() - bf16[-20:].mean()) < 0.02
    assert not np.array_equal(fp8, bf16)
    assert "FP8: this project's own" in runs[name][0]["described"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(runs: Any, name: str) -> None:
    for process in runs[name]:
        again = process["again"]
        assert numbers(again["metrics"]) == numbers(process["metrics"])[-len(again["metrics"]) :]
        assert (again["weights"], again["scales"]) == (process["weights"], process["scales"])


def test_probes_and_recomputation_change_no_bit(runs: Any) -> None:
    for name in ("short probed", "short recomputed"):
        assert numbers(runs[name][0]["metrics"]) == numbers(runs["short"][0]["metrics"])
        assert runs[name][0]["scales"] == runs["short"][0]["scales"]


@pytest.mark.parametrize("name", ["tp2", "tp2 sp", "dp2", "pp2", "short e4m3", "edges"])
def test_every_layout_gives_the_losses_of_one_process(runs: Any, name: str) -> None:
    np.testing.assert_allclose(losses(runs, name), losses(runs, "short"), atol=5e-3)
    np.testing.assert_allclose(losses(runs, "tp2 tensorwise"), losses(runs, "short bf16"), atol=5e-3)


@pytest.mark.parametrize("name", ["tp2", "tp2 sp", "dp2"])
def test_scales_are_the_same_on_every_process(runs: Any, name: str) -> None:
    first, second = (process["scales"] for process in runs[name])
    assert first == second and len(first) == 4 * 4
    # Their largest values are those of the whole tensors: one process sees nearly the same.
    ours, alone = (np.array([scale for scale, _ in found]) for found in (first, runs["short"][0]["scales"]))
    np.testing.assert_allclose(ours, alone, rtol=0.25)


def test_first_and_last_layers_keep_an_empty_state(runs: Any) -> None:
    scales = np.array([scale for scale, _ in runs["edges"][0]["scales"]]).reshape(4, 4, 3)
    assert (scales[[0, 3]] == 0).all() and (scales[1:3] > 0).all()


def test_a_checkpoint_holds_the_state_of_every_layer(runs: Any, folder: Path) -> None:
    reader = CheckpointReader(folder / "delayed" / f"step-{STEPS:06d}")
    stored = {name for name in reader.names() if name.endswith(FP8_STATE) and not name.startswith("optimizer.")}
    linear = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert stored == {f"decoder.layers.{module}.{state}" for module in linear for state in FP8_STATE}
    histories = reader.tensor("decoder.layers.mlp.linear_fc2.fp8_amax_history")
    assert histories.shape == (4, 3, 16) and histories.dtype == torch.float32
    at_the_end = [history for _, history in runs["delayed"][0]["scales"]]
    assert sorted(map(str, at_the_end)) == sorted(
        str(reader.tensor(f"decoder.layers.{module}.fp8_amax_history", layer).tolist())
        for module in linear for layer in range(4)
    )


def test_fp16_follows_fp32_and_skips_what_overflows(runs: Any) -> None:
    np.testing.assert_allclose(losses(runs, "fp16"), losses(runs, "fp32"), atol=5e-3)
    lines = runs["fp16 overflowing"][0]["metrics"]
    assert lines[0]["grad_norm"] is None and lines[1]["loss_scale"] == lines[0]["loss_scale"] / 2
    assert runs["fp16"][0]["metrics"][-1]["grad_norm"] > 0
    # A step that moves no weight leaves the loss of the same samples as it is, and the learning rate where it was.
    assert lines[1]["lr"] == lines[0]["lr"] == 0


def test_unfused_attention_computes_the_same(runs: Any) -> None:
    np.testing.assert_allclose(losses(runs, "unfused"), losses(runs, "fp32"), atol=1e-5)
    assert "attention: unfused (asked for" in runs["unfused"][0]["described"]


def test_export_takes_the_weights_and_where_they_were_in_fp8_the_main_weights(
    runs: Any, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    checkpoint = folder / "delayed" / f"step-{STEPS:06d}"
    reader = CheckpointReader(checkpoint)
    name, hf_name = "decoder.layers.mlp.linear_fc2.weight", "model.layers.2.mlp.down_proj.weight"
    exported = load_file(to_hf(checkpoint, tmp_path / "bf16") / "model.safetensors")
    assert torch.equal(exported[hf_name], reader.tensor(name, 2)) and exported[hf_name].dtype == torch.bfloat16
    main = reader.tensor(f"optimizer.state.param.{name}", 2)
    assert main.dtype == torch.float32 and torch.equal(main.bfloat16(), exported[hf_name])
    # As a run that keeps its weights in FP8 would have left it: only the main weights are exact.
    manifest = json.loads((checkpoint / "xalign.json").read_text(encoding="utf-8"))
    manifest["extra"]["config"]["precision"]["fp8"]["param_gather"] = True
    (checkpoint / "xalign.json").write_text(json.dumps(manifest), encoding="utf-8")
    gathered = load_file(to_hf(checkpoint, tmp_path / "gathered", dtype="float32") / "model.safetensors")
    assert torch.equal(gathered[hf_name], main) and set(gathered) == set(exported)
    halved = load_file(to_hf(checkpoint, tmp_path / "halved") / "model.safetensors")
    assert all(torch.equal(halved[key], exported[key]) for key in exported)


def test_megatrons_configs_accept_the_fields_and_keep_their_values() -> None:
    settings: list[dict[str, Any]] = [
        {"recipe": "delayed", "format": "e4m3", "margin": 2, "amax_history_len": 8, "amax_compute_algo": "most_recent"},
        {"recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2},
        {"recipe": "blockwise", "param_gather": True}, {"recipe": "mxfp8"},
    ]
    (found,) = run_processes(JOB, "accepted", {"settings": settings})
    for asked, built in zip(settings, found, strict=True):
        assert built == {"same": True, "param_gather": "param_gather" in asked, "recipe": asked["recipe"]}


def test_capture_sees_neurons_before_or_after_quantisation(tmp_path: Path) -> None:
    (seen,) = run_processes(JOB, "captured", {"folder": str(tmp_path)})
    first, *others = seen["steps"]
    assert first == 0  # the layer that stays in bf16
    # Half a step of E4M3 at its largest numbers is a sixteenth of them; rounding to bf16 comes on top.
    assert all(0.001 < step < 1 / 16 + 0.01 for step in others)
    assert seen["on grid"] == [True] * 4 and seen["same state"] and seen["types"] == ["torch.bfloat16"]

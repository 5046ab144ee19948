"""Megatron's wrappers of Transformer Engine over a stand-in: names, initial weights, checkpoints, export, hooks.

What is proved is what this project does with Transformer Engine's modules. Their kernels, and FP8, are not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes

from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.formats.checkpoint import CheckpointReader

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("te_job.py")
SMALL = {"num_layers": 2}
MODELS = {
    "llama": SMALL, "olmo": SMALL | {"normalization": "LayerNorm"}, "qwen3": SMALL | {"qk_layernorm": True},
    "qwen2": SMALL | {"add_qkv_bias": True},
}
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("te")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    (alone,) = run_processes(
        JOB, "compare", {"folder": str(folder / "one"), "parallel": {}, "models": MODELS}, timeout_seconds=600
    )
    split, _ = run_processes(
        JOB, "compare", {"folder": str(folder / "two"), "parallel": SPLIT, "models": {"llama": SMALL}}, 2,
        timeout_seconds=600,
    )
    return alone | {f"split {name}": found for name, found in split.items()}


@pytest.mark.parametrize("name", [*MODELS, "split llama"])
def test_both_kinds_of_layers_start_and_train_alike(seen: dict[str, Any], name: str) -> None:
    te, local = seen[f"{name} te"], seen[f"{name} local"]
    assert te["losses"] == pytest.approx(local["losses"], abs=2e-5)
    assert te["norms"] == pytest.approx(local["norms"], rel=1e-4)
    assert te["neurons"] == pytest.approx(local["neurons"], rel=1e-4)
    assert te["described"].startswith("layers: Transformer Engine (asked for, version 2.6.0)")


def test_norms_lie_inside_the_layers_where_they_have_weights_and_apart_where_not(seen: dict[str, Any]) -> None:
    fused, bare = seen["llama te"], seen["olmo te"]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in fused["names"]
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in fused["names"]
    assert fused["kinds"] == ["TELayerNormColumnParallelLinear", "TEDotProductAttention"]
    assert bare["kinds"][0] == "TEColumnParallelLinear" and not [n for n in bare["names"] if "norm" in n]


@pytest.mark.parametrize("name", [*MODELS, "split llama"])
def test_a_checkpoint_of_either_kind_is_read_by_the_other(seen: dict[str, Any], name: str) -> None:
    # The local run comes second and reads what the other wrote.
    assert seen[f"{name} local"]["crossed"] == pytest.approx(seen[f"{name} te"]["evaluated"], rel=1e-5)


@pytest.mark.parametrize("place", ["one/llama", "one/olmo", "one/qwen3", "one/qwen2", "two/llama"])
def test_checkpoints_have_the_same_tensors_and_are_exported_alike(
    seen: dict[str, Any], folder: Path, tmp_path: Path, place: str
) -> None:
    from safetensors.torch import load_file

    te, local = (folder / f"{place} {kind}" / "step-000003" for kind in ("te", "local"))
    assert CheckpointReader(te).names() == CheckpointReader(local).names()
    ours, theirs = (
        load_file(to_hf(checkpoint, tmp_path / str(number)) / "model.safetensors")
        for number, checkpoint in enumerate((te, local))
    )
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3)

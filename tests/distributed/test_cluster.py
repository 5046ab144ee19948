"""64 machines of 8 GPUs without one: shapes and memory of every pipeline stage against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

from megatron_xalign.config import ModelConfig, ParallelConfig
from megatron_xalign.training.sizes import memory_by_stage, stage_parameters

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("cluster_job.py")
STUDY: dict[str, Any] = {
    "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 5504, "num_attention_heads": 16,
    "normalization": "LayerNorm",
}
LARGE: dict[str, Any] = {
    "num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64, "num_query_groups": 8,
}
LAYOUT = ParallelConfig(
    tensor_model_parallel_size=4, pipeline_model_parallel_size=4, sequence_parallel=True, use_distributed_optimizer=True
)
# By hand, on one of 4 tensor-parallel ranks. 1.4B: q, k, v and o 2048 x 2048 and three of 5504 x 2048 over 4, no norms.
STUDY_LAYER = (4 * 2048 * 2048 + 3 * 5504 * 2048) // 4
# 70B: q and o 8192 x 8192, k and v 1024 x 8192, three of 28672 x 8192, over 4; two norms of 8192, whole.
LARGE_LAYER = (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192) // 4 + 2 * 8192
BY_HAND = {
    # 6 layers a stage; tables of 50,688 rows (99 x 512) over 4 at both ends.
    "1.4B": (STUDY, 50_688, [6 * STUDY_LAYER + (12_672 * 2048 if stage in (0, 3) else 0) for stage in range(4)]),
    # 20 layers a stage; 128,512 rows (251 x 512); the last stage has the final norm.
    "70B": (
        LARGE, 128_512,
        [
            20 * LARGE_LAYER + (32_128 * 8192 if stage in (0, 3) else 0) + (8192 if stage == 3 else 0)
            for stage in range(4)
        ],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_stage_has_the_parameters_counted_by_hand(name: str) -> None:
    model, rows, expected = BY_HAND[name]
    arguments = {"model": model, "tensor": 4, "pipeline": 4, "world_size": 512, "padded_vocab_size": rows}
    (stages,) = run_processes(JOB, "rehearse", arguments, timeout_seconds=600)
    assert [stage["parameters"] for stage in stages] == expected
    assert [stage["ranks"] for stage in stages] == [[stage, 0, 32] for stage in range(4)]
    network = ModelConfig(**model)
    assert [stage_parameters(network, LAYOUT, rows, stage) for stage in range(4)] == expected
    hidden, ffn = model["hidden_size"], model["ffn_hidden_size"]
    for stage in stages:
        shapes = stage["shapes"]
        assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == [2 * ffn // 4, hidden]
        assert shapes["decoder.layers.0.mlp.linear_fc2.weight"] == [hidden, ffn // 4]
        assert shapes["decoder.layers.0.self_attention.linear_proj.weight"] == [hidden, hidden // 4]


@pytest.mark.parametrize("name", BY_HAND)
def test_memory_of_a_rank_is_what_its_parameters_take(name: str) -> None:
    model, rows, expected = BY_HAND[name]
    table = memory_by_stage(
        ModelConfig(**model), LAYOUT, padded_vocab_size=rows, seq_length=2048, micro_batch_size=1, num_microbatches=16,
        params_dtype="bf16", recompute="none", data_size=32,
    )
    for found, parameters in zip(table, expected, strict=True):
        # bf16 weights, float32 gradients; two moments and main weights in float32, over 32 data-parallel ranks.
        assert (found.weights, found.gradients) == (2 * parameters, 4 * parameters)
        assert found.optimizer == 12 * parameters // 32
        assert found.total < 80 * 2**30

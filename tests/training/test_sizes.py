"""Counts of parameters, FLOPs and memory against sums written out by hand; counts against built models elsewhere."""

from __future__ import annotations

import pytest
import torch

from megatron_xalign.config import ModelConfig, ParallelConfig
from megatron_xalign.training.sizes import flops_per_token, memory_by_stage, num_parameters, stage_parameters
from megatron_xalign.training.speed import peak_tflops, speed_of

MODEL = ModelConfig(num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2)
STUDY = ModelConfig(
    num_layers=24, hidden_size=2048, ffn_hidden_size=5504, num_attention_heads=16, normalization="LayerNorm"
)


def test_parameters_of_a_small_model_by_hand() -> None:
    # Per layer: q 24x24, k and v 8x24 each, o 24x24; gate, up, down 40x24 each; two norms of 24.
    layer = 24 * 24 + 2 * 8 * 24 + 24 * 24 + 3 * 40 * 24 + 2 * 24
    assert num_parameters(MODEL, 128) == 4 * layer + 2 * 128 * 24 + 24


def test_flops_of_the_study_s_model_are_six_a_parameter_and_attention() -> None:
    matrices = 24 * (4 * 2048**2 + 3 * 2048 * 5504) + 50_304 * 2048
    attention = 24 * 3 * 4 * 2048 * (2048 + 1) / 2
    assert flops_per_token(STUDY, 50_304, 2048) == pytest.approx(6 * matrices + attention)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_add_up_to_the_model_and_a_copied_table(tied: bool) -> None:
    model = ModelConfig(
        num_layers=4, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2,
        untie_embeddings_and_output_weights=not tied, qk_layernorm=True,
    )
    parallel = ParallelConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
    total = sum(stage_parameters(model, parallel, 128, stage) for stage in range(2))
    assert total == num_parameters(model, 128) + (128 * 24 if tied else 0)


def test_memory_of_the_study_s_model_on_one_device() -> None:
    (rank,) = memory_by_stage(
        STUDY, ParallelConfig(), padded_vocab_size=50_304, seq_length=2048, micro_batch_size=1, num_microbatches=8,
        params_dtype="bf16", recompute="none", data_size=1,
    )
    parameters = 24 * (4 * 2048**2 + 3 * 2048 * 5504) + 2 * 50_304 * 2048
    assert (rank.weights, rank.gradients, rank.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    # The 18 bytes a parameter of bf16 training with float32 gradients and AdamW.
    assert rank.total - rank.activations == 18 * parameters


def test_layouts_divide_what_they_should() -> None:
    def stages(**changes: object) -> list[int]:
        parallel = ParallelConfig(
            **{key: value for key, value in changes.items() if key in ParallelConfig.__dataclass_fields__}
        )
        found = memory_by_stage(
            STUDY, parallel, padded_vocab_size=50_304, seq_length=2048, micro_batch_size=1, num_microbatches=8,
            params_dtype="bf16", recompute=str(changes.get("recompute", "none")),
            data_size=int(str(changes.get("data_size", 1))),
        )
        return [rank.total for rank in found]

    (alone,) = stages()
    assert all(part < alone for part in stages(pipeline_model_parallel_size=2))
    assert stages(tensor_model_parallel_size=2)[0] < 0.6 * alone
    tensor = stages(tensor_model_parallel_size=2)[0]
    assert stages(tensor_model_parallel_size=2, sequence_parallel=True)[0] < tensor
    assert stages(recompute="full")[0] < alone
    assert stages(context_parallel_size=2)[0] < alone
    plain = stages(pipeline_model_parallel_size=2)
    interleaved = stages(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    # The first stage has 2 * (2 - 0 - 1) + 2 + 1 = 5 half blocks under way instead of 2 whole ones.
    assert interleaved[0] > plain[0] and interleaved[1] > plain[1]
    assert stages(use_distributed_optimizer=True, data_size=8)[0] < stages(data_size=8)[0] == alone


def test_speed_is_said_for_each_device() -> None:
    found = speed_of(8000.0, 1e9, 4, torch.device("cpu"))
    assert found["tokens_per_second"] == 8000.0
    assert found["tflops_per_device"] == pytest.approx(8000 * 1e9 / 4 / 1e12)
    assert 0.01 < found["memory_gib"] < 1000
    assert "mfu" not in found
    assert "tflops_per_device" not in speed_of(8000.0, None, 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("AMD Instinct MI250X", 191.5), ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_is_found_by_the_device_s_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak

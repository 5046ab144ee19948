"""Models of 512 GPUs on none: torch's fake process group and the meta device; called by ``run_processes``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_xalign import platform
from megatron_xalign.config import ModelConfig, ParallelConfig
from megatron_xalign.config.tree import from_tree


def rehearse(
    model: dict[str, Any], tensor: int, pipeline: int, world_size: int, padded_vocab_size: int
) -> list[dict[str, Any]]:
    """Megatron's model as the first tensor rank of every pipeline stage would build it: shapes, no numbers."""
    platform.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_xalign.training.backends import PLAIN
    from megatron_xalign.training.layers import Norm
    from megatron_xalign.training.model import _layer_spec, transformer_config

    network = from_tree(ModelConfig, model)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, sequence_parallel=True,
        use_distributed_optimizer=True,
    )
    stages = []
    for stage in range(pipeline):
        dist.init_process_group(
            "fake", store=FakeStore(), rank=stage * (world_size // pipeline), world_size=world_size
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
            create_gloo_process_groups=False,
        )
        config = transformer_config(network, parallel, "bf16", "none")
        with torch.device("meta"):
            built = GPTModel(
                config=config, vocab_size=padded_vocab_size, max_sequence_length=2048,
                transformer_layer_spec=TransformerBlockSubmodules(
                    layer_specs=[_layer_spec(network, PLAIN)] * get_num_layers_to_build(config), layer_norm=Norm
                ),
                pre_process=stage == 0, post_process=stage == pipeline - 1,
                share_embeddings_and_output_weights=False, position_embedding_type="rope",
            )
        stages.append({
            "ranks": [
                parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
            ],
            "shapes": {name: list(parameter.shape) for name, parameter in built.named_parameters()},
            "parameters": sum(parameter.numel() for parameter in built.parameters()),
        })
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return stages

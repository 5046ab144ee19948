"""Checkpoints as Megatron-LM leaves them, written with megatron.core alone: tensors, ``common.pt`` with ``args``."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import topology
from megatron_xalign.config import ParallelConfig, RunConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.formats.checkpoint_folder import read_manifest


def arguments_of(config: RunConfig, padded_vocab_size: int) -> argparse.Namespace:
    """What Megatron-LM's command line would hold for this model, by its own names."""
    from megatron.core.transformer.enums import AttnBackend

    model = config.model
    return argparse.Namespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.num_query_groups or 1, kv_channels=model.head_size, qk_layernorm=model.qk_layernorm,
        add_qkv_bias=model.add_qkv_bias, normalization=model.normalization, norm_epsilon=model.layernorm_epsilon,
        rotary_base=model.rotary_base, use_rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 8.0, swiglu=True, add_bias_linear=False,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights, rotary_percent=1.0,
        position_embedding_type="rope", init_method_std=0.02, padded_vocab_size=padded_vocab_size, vocab_size=None,
        make_vocab_size_divisible_by=128, seq_length=config.data.seq_length, iteration=7, consumed_train_samples=56,
        global_batch_size=8, tokenizer_model="/somewhere/tokenizer", params_dtype=torch.float32, num_experts=None,
        multi_latent_attention=False, window_size=None, attention_backend=AttnBackend.auto, some_path=Path("/data"),
        rotary_interleaved=False, apply_layernorm_1p=False,
    )


def save(out: str, imported: dict[str, str], parallel: dict[str, Any], with_optimizer: list[str]) -> None:
    """Load each imported checkpoint on this layout and save it the way Megatron-LM does."""
    layout = from_tree(ParallelConfig, {"distributed_timeout_seconds": 120, **parallel})
    with topology.start(layout, seed=1) as ranks:
        for name, checkpoint in imported.items():
            _save_one(Path(out) / name, Path(checkpoint), layout, ranks, name in with_optimizer)


def _save_one(folder: Path, checkpoint: Path, layout: ParallelConfig, ranks: Any, with_optimizer: bool) -> None:
    from megatron.core import dist_checkpointing

    from megatron_xalign.training import checkpoint as ours
    from megatron_xalign.training.model import build_model, padded_vocab_size
    from megatron_xalign.training.optimizer import build_optimizer
    from megatron_xalign.training.optimizer_state import initialize_state, sharding

    extra = read_manifest(checkpoint)["extra"]
    config = from_tree(RunConfig, extra["config"])
    rows = padded_vocab_size(extra["vocab_size"], 128, ranks.tensor_size)
    chunks = build_model(
        config.model, padded_vocab_size=rows, seq_length=config.data.seq_length, parallel=layout, params_dtype="fp32",
        recompute="none", ranks=ranks, seed=99, vocab_size=extra["vocab_size"],
    )
    ours.load_weights(checkpoint, chunks, ranks)
    model_state = ours.unwrap(chunks[0]).sharded_state_dict(metadata=sharding())
    state: dict[str, Any] = {
        "args": arguments_of(config, rows), "checkpoint_version": 3.0, "iteration": 7, "model": model_state,
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 56}, "num_floating_point_operations_so_far": 1e9,
    }
    if with_optimizer:
        optimizer = build_optimizer(chunks, config.optimizer, parallel=layout, params_dtype="fp32", train_steps=100)
        initialize_state(optimizer.megatron)
        state["optimizer"] = optimizer.megatron.sharded_state_dict(model_state, metadata=sharding())
    target = folder / "iter_0000007"
    if ranks.rank == 0:
        target.mkdir(parents=True)
    ranks.barrier()
    strategy = dist_checkpointing.serialization.get_default_save_sharded_strategy()
    strategy.thread_count = 1
    options: dict[str, Any] = {"sharded_strategy": strategy}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"
    with ours._writing_in_this_process():
        dist_checkpointing.save(state, str(target), **options)
    if ranks.rank == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    ranks.barrier()

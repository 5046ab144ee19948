"""Megatron-Core's GPT model as our configuration describes it, laid out, initialised and wrapped for training."""

# B micro-batch, S sequence, V vocabulary

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import Any, Literal

import torch

from megatron_xalign.config import ModelConfig, ParallelConfig, ParamsDtype, TrainingConfig
from megatron_xalign.errors import ConfigError
from megatron_xalign.platform import WEIGHT_GRADIENT_KERNELS
from megatron_xalign.topology import Ranks
from megatron_xalign.training import precision
from megatron_xalign.training.backends import (
    PLAIN,
    Choice,
    attention_class,
    final_norm,
    mlp_submodules,
    te_layer_spec,
    with_own_fp8,
)
from megatron_xalign.training.cross_entropy import use_whole_vocabulary
from megatron_xalign.training.fp8_linear import enable_fp8
from megatron_xalign.training.fused import SwiGLU
from megatron_xalign.training.initial_weights import initialize
from megatron_xalign.training.layers import CausalAttention, Norm
from megatron_xalign.training.positions import place_tokens
from megatron_xalign.training.rotating import rotating_attention
from megatron_xalign.training.whole_matrices import use_whole_matrices
from megatron_xalign.training.z_loss import add_z_loss

Recompute = Literal["none", "selective", "full"]

log = logging.getLogger(__name__)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_size: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of ``divisible_by * tensor_size``, as Megatron's.

    Raises:
        ValueError: a number is not positive.
    """
    if min(vocab_size, divisible_by, tensor_size) <= 0:
        raise ValueError(f"{vocab_size=}, {divisible_by=} and {tensor_size=} must be positive.")
    multiple = divisible_by * tensor_size
    return -(-vocab_size // multiple) * multiple


def transformer_config(
    config: ModelConfig, parallel: ParallelConfig, params_dtype: ParamsDtype, recompute: Recompute,
    choice: Choice = PLAIN,
    training: TrainingConfig | None = None,
) -> Any:
    """Megatron's ``TransformerConfig`` for a model of ours.

    ``training`` says how ``recompute`` is done, in its ``recompute_*`` settings; the defaults if left out.

    Raises:
        ConfigError: the installed Megatron-Core has no field for something the model needs.
    """
    # Imported late, here and below: the CPU backend must be in place first.
    from megatron.core.transformer import TransformerConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[params_dtype]
    settings: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.query_groups,
        "kv_channels": config.head_size,
        "normalization": config.normalization,
        "layernorm_epsilon": config.layernorm_epsilon,
        "init_method_std": config.init_method_std,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": params_dtype == "bf16",
        "fp16": params_dtype == "fp16",
        # The loss of a micro-batch is a sum over tokens; gradients are divided by the tokens of the global batch.
        "calculate_per_token_loss": True,
        # training.initial_weights fills them.
        "use_cpu_initialization": True,
        "perform_initialization": False,
        # Fused kernels need CUDA extensions, or a compiler at run time.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": _adds_weight_gradients(),
        # Only waits for the device, for versions of torch long past.
        "batch_p2p_sync": False,
    }
    if parallel.virtual_size > 1:
        # In one batch of messages both directions of a pipeline of two stages would be mixed up: they go between the
        # same two processes. Megatron-LM sets the same for interleaved schedules.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    settings |= _recompute_settings(config, parallel, recompute, training or TrainingConfig())
    if choice.layers == "local":
        # Megatron's name for an activation that the layer specification brings: ours.
        settings["use_te_activation_func"] = True
    if choice.layers == "te":
        # Our own FP8 is no setting of Megatron's.
        settings |= precision.megatron_settings(choice.fp8)
    known = {item.name for item in dataclasses.fields(TransformerConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        import megatron.core

        raise ConfigError(
            f"megatron-core {megatron.core.__version__} has no setting {', '.join(unknown)}; versions 0.16.1 to 0.19.x "
            "are supported."
        )
    return TransformerConfig(**settings)


def _adds_weight_gradients() -> bool:
    """Whether Megatron found a kernel that adds weight gradients to its buffer: apex's, or on the CPU our own."""
    from megatron.core.tensor_parallel import layers

    return hasattr(layers, WEIGHT_GRADIENT_KERNELS)


def _recompute_settings(
    config: ModelConfig, parallel: ParallelConfig, recompute: Recompute, training: TrainingConfig
) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        if "layernorm" in training.recompute_modules and importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError(
                "training.recompute_modules names layernorm, which Megatron-Core computes again only where Transformer "
                "Engine is installed; leave it out (core_attn and mlp need nothing), or pip install "
                "'transformer-engine[pytorch]'."
            )
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)}
    block_layers = config.num_layers // (parallel.pipeline_model_parallel_size * parallel.virtual_size)
    if training.recompute_num_layers > block_layers or (
        training.recompute_method == "uniform" and block_layers % training.recompute_num_layers
    ):
        raise ConfigError(
            f"training.recompute_num_layers={training.recompute_num_layers} with recompute_method="
            f"{training.recompute_method} does not go into blocks of {block_layers} layers (model.num_layers over "
            "pipeline stages and their virtual stages); use "
            + ("a divisor of it." if training.recompute_method == "uniform" else f"{block_layers} or less.")
        )
    return {
        "recompute_granularity": "full", "recompute_method": training.recompute_method,
        "recompute_num_layers": training.recompute_num_layers,
    }


def build_model(
    config: ModelConfig,
    *,
    padded_vocab_size: int,
    seq_length: int,
    parallel: ParallelConfig,
    params_dtype: ParamsDtype,
    recompute: Recompute,
    ranks: Ranks,
    seed: int,
    vocab_size: int | None = None,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    training: TrainingConfig | None = None,
    choice: Choice = PLAIN,
) -> list[Any]:
    """Build this rank's part of the model, with initial weights, wrapped for data-parallel training.

    Args:
        config: the network.
        padded_vocab_size: V, rows of the embedding; see the function of that name.
        seq_length: S, tokens of a training sample.
        parallel: the layout; must be the one ``ranks`` was made from.
        params_dtype: type of weights and activations; main weights and gradients are float32 either way.
        recompute: what is computed again in the backward pass: nothing, parts of every layer, or whole layers.
        ranks: this process's place, from ``topology.start``.
        seed: seed of the initial weights, which depend on it and on parameter names alone.
        vocab_size: ids of the tokenizer; rows from here on are padding and get no probability, so that losses do not
            depend on how far the tensor-parallel size pads. None: every row is a token.
        reset_position_ids: rotary positions are those of the batch, which start again at every document; else they
            count the tokens of a sample.
        reset_attention_mask: tokens attend to tokens with their document id only.
        training: how recomputation is done and the weight of the z-loss; the defaults if left out.
        choice: whose kernels compute, and whether in FP8, as ``backends.choose`` found.

    Returns:
        Model chunks of this pipeline stage, one for each of its blocks of layers in their order: Megatron's
        ``DistributedDataParallel`` around, for bf16, its ``Float16Module`` around its ``GPTModel``.

    Raises:
        ConfigError: the model or its recomputation does not fit the layout or the installed Megatron-Core.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    if padded_vocab_size % ranks.tensor_size:
        raise ConfigError(
            f"a vocabulary of {padded_vocab_size} rows cannot be divided over tensor_model_parallel_size="
            f"{ranks.tensor_size}; pad it with model.make_vocab_size_divisible_by."
        )
    if choice.attention != "sdpa" and (reset_attention_mask or ranks.context_size > 1):
        raise ConfigError(
            f"backend.attention={choice.attention} knows neither data.reset_attention_mask nor "
            "parallel.context_parallel_size above 1; use backend.attention=sdpa."
        )
    megatron_config = transformer_config(config, parallel, params_dtype, recompute, choice, training)
    if megatron_config.gradient_accumulation_fusion and ranks.device.type == "cuda" and ranks.rank == 0:
        log.info("weight gradients: added to the gradient buffer by apex's kernel (it is there)")
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=parallel.use_distributed_optimizer,
        **precision.data_parallel_settings(choice.fp8 if choice.layers == "te" else None),
    )
    chunks = []
    for virtual in range(ranks.virtual_size):
        stage = virtual if ranks.virtual_size > 1 else None
        is_first, is_last = ranks.holds_embedding(virtual), ranks.holds_output(virtual)
        model = GPTModel(
            config=megatron_config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[_layer_spec(config, choice)] * get_num_layers_to_build(megatron_config, stage),
                layer_norm=final_norm(config, choice, Norm),
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=seq_length,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling_factor is not None,
            rope_scaling_factor=config.rope_scaling_factor or 1.0,
            vp_stage=stage,
        )
        initialize(model, config, seed, ranks)
        if vocab_size is not None and is_last:
            _mask_padding(model, vocab_size, ranks)
        if is_last and ranks.tensor_size == 1:
            use_whole_vocabulary(model)
        if ranks.tensor_size == 1 and ranks.device.type == "cpu":
            use_whole_matrices(model)
        if is_last and training is not None and training.z_loss_coefficient:
            add_z_loss(model, training.z_loss_coefficient, ranks)
        if choice.fp8 is not None and choice.layers == "local":
            enable_fp8(model, choice.fp8, config.num_layers)
        place_tokens(model, ranks, reset_position_ids=reset_position_ids, reset_attention_mask=reset_attention_mask)
        model.to(ranks.device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        log.debug("process %d holds %d parameters.", ranks.rank, num_parameters)
        if params_dtype != "fp32":
            model = Float16Module(megatron_config, model)
        chunks.append(
            DistributedDataParallel(
                config=megatron_config,
                ddp_config=ddp_config,
                module=model,
                # As in Megatron: only the first chunk has gradients to send while others are still computed.
                disable_bucketing=virtual > 0,
            )
        )
    return chunks


def _mask_padding(model: Any, vocab_size: int, ranks: Ranks) -> None:
    """Give padded rows of the vocabulary no probability: Megatron's softmax runs over all rows of its shards."""
    rows = model.output_layer.output_size_per_partition
    first = max(0, vocab_size - rows * ranks.tensor_rank)
    if first >= rows:
        return

    def hook(module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        output[0][..., first:].fill_(torch.finfo(output[0].dtype).min)

    model.output_layer.register_forward_hook(hook)


def _layer_spec(config: ModelConfig, choice: Choice) -> Any:
    """Megatron's own layer with our norm and attention in it, or with Transformer Engine's parts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    if choice.layers == "te":
        return te_layer_spec(config, choice, Norm, CausalAttention)
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = Norm
    spec.submodules.pre_mlp_layernorm = Norm
    mlp_submodules(spec).activation_func = SwiGLU
    spec.submodules.self_attention.module = rotating_attention()
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = attention_class(choice, CausalAttention)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if choice.fp8 is not None:
        with_own_fp8(spec)
    return spec

"""Parameters, floating-point operations and memory of a model on a layout: arithmetic on the config, nothing is built.

Counts of parameters are exact (tests compare them with built models); memory of activations is an estimate of what the
backward pass keeps.
"""

# H hidden size, F ffn width, V padded vocabulary, Q width of all query heads, K width of all key heads, D head width

from __future__ import annotations

from dataclasses import dataclass

from megatron_xalign.config import ModelConfig, ParallelConfig


def layer_parameters(model: ModelConfig, tensor_size: int = 1) -> int:
    """Parameters of one layer on one tensor-parallel rank."""
    hidden, head = model.hidden_size, model.head_size
    query, key = model.num_attention_heads * head, model.query_groups * head
    qkv_rows = (query + 2 * key) // tensor_size
    matrices = qkv_rows * hidden + hidden * query // tensor_size + 3 * hidden * model.ffn_hidden_size // tensor_size
    vectors = 2 * hidden if model.normalization == "RMSNorm" else 0
    vectors += qkv_rows if model.add_qkv_bias else 0
    vectors += 2 * head if model.qk_layernorm else 0
    return matrices + vectors


def num_parameters(model: ModelConfig, padded_vocab_size: int) -> int:
    """Parameters of the whole model, padded vocabulary rows included."""
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    final_norm = model.hidden_size if model.normalization == "RMSNorm" else 0
    return (
        tables * padded_vocab_size * model.hidden_size + model.num_layers * layer_parameters(model) + final_norm
    )


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, padded_vocab_size: int, stage: int) -> int:
    """Parameters on one rank of a pipeline stage; the last stage of a tied model holds a copy of the embedding."""
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    table = padded_vocab_size // tensor * model.hidden_size
    count = model.num_layers // stages * layer_parameters(model, tensor)
    if stage == 0:
        count += table
    if stage == stages - 1:
        count += model.hidden_size if model.normalization == "RMSNorm" else 0
        count += table if model.untie_embeddings_and_output_weights or stages > 1 else 0
    return count


def flops_per_token(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> float:
    """Model FLOPs of one token's forward and backward pass, recomputation not counted.

    Two for every parameter of a matrix that the token meets, and causal attention over half the sequence on average;
    the backward pass costs twice the forward pass.

    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix; halved attention as in PaLM's MFU without its bound.
    """
    hidden, head = model.hidden_size, model.head_size
    query, key = model.num_attention_heads * head, model.query_groups * head
    matrices = (query + 2 * key) * hidden + hidden * query + 3 * hidden * model.ffn_hidden_size
    # Scores and weighted values: 2 FLOPs each for every query coordinate and every position looked at.
    attention = 2 * 2 * query * (seq_length + 1) / 2
    forward = model.num_layers * (2 * matrices + attention) + 2 * padded_vocab_size * hidden
    return 3.0 * forward


@dataclass(frozen=True)
class MemoryOfRank:
    """Bytes one process holds, by part."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_by_stage(
    model: ModelConfig, parallel: ParallelConfig, *, padded_vocab_size: int, seq_length: int, micro_batch_size: int,
    num_microbatches: int, params_dtype: str, recompute: str, data_size: int,
) -> list[MemoryOfRank]:
    """What a process of each pipeline stage holds while it trains.

    Weights in ``params_dtype``, gradients in float32, AdamW's two moments and, unless weights are, main weights in
    float32; the distributed optimizer divides these three. Activations: the tensors that the backward pass of each
    layer reads, for as many micro-batches as are under way on that stage in Megatron's 1F1B schedule, plain or
    interleaved; with full recompute each layer's input only, and one layer's tensors while it is recomputed; on the
    last stage logits in float32 and their gradient. Of every sequence a context-parallel rank keeps its part, and one
    layer's keys and values of the whole. Fragmentation, communication buffers and the libraries themselves come on top.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width = 4 if params_dtype == "fp32" else 2
    context = parallel.context_parallel_size
    sharded = data_size * context if parallel.use_distributed_optimizer else 1
    tokens = seq_length * micro_batch_size / context
    # What sequence parallelism divides, and what tensor parallelism alone divides.
    along = tensor if parallel.sequence_parallel else 1
    head = model.head_size
    query, key = model.num_attention_heads * head, model.query_groups * head
    inside = (2 * query + 2 * key + 4 * model.ffn_hidden_size) / tensor * width
    # Inputs of both norms and of the matrices after them; norms compute in float32.
    outside = model.hidden_size / along * (4 * width + 2 * 4)
    kept_input = model.hidden_size / along * width
    stage_layers = model.num_layers // stages
    found = []
    for stage in range(stages):
        parameters = stage_parameters(model, parallel, padded_vocab_size, stage)
        under_way = _under_way(stages, stage, parallel.virtual_size, num_microbatches)
        if recompute == "full":
            per_token = stage_layers * kept_input * under_way + inside + outside
        else:
            per_token = stage_layers * (inside + outside) * under_way
        if context > 1:
            per_token += context * 2 * key / tensor * width
        if stage == stages - 1:
            per_token += 2 * 4 * padded_vocab_size / tensor
        found.append(
            MemoryOfRank(
                stage=stage,
                parameters=parameters,
                weights=parameters * width,
                gradients=parameters * 4,
                optimizer=parameters * (8 + (0 if params_dtype == "fp32" else 4)) // sharded,
                activations=int(tokens * per_token),
            )
        )
    return found


def _under_way(stages: int, stage: int, virtual: int, num_microbatches: int) -> float:
    """Micro-batches whose activations a stage keeps at once, each counted for all of the stage's layers."""
    if virtual == 1:
        return min(stages - stage, num_microbatches)
    blocks = min(2 * (stages - stage - 1) + (virtual - 1) * stages + 1, num_microbatches * virtual)
    return blocks / virtual

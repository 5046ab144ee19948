"""A checkpoint's model run one layer at a time, for models that do not fit into memory.

Every layer is Megatron's own module; between layers only the hidden states of all sequences are kept.
"""

# S tokens, B = 1 sequence, H hidden, V vocabulary

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import names, topology
from megatron_xalign.config import ParallelConfig, RunConfig
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.training.backends import PLAIN
from megatron_xalign.training.layers import Norm
from megatron_xalign.training.listening import fill, listening
from megatron_xalign.training.model import _layer_spec, transformer_config

Stages = Iterator[tuple[str, list[torch.Tensor]]]
"""Name of a place and what leaves it, [S, H] for each sequence; at last ``logits``, [S, V]."""

_ROWS = 4096
"""Rows of the output matrix that are float32 at a time."""


@contextmanager
def load_layerwise(
    checkpoint: str | Path, config: RunConfig, vocab_size: int
) -> Iterator[Callable[[Sequence[torch.Tensor]], Stages]]:
    """Give a function from token sequences [S] to the states of the whole model, place by place.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not hold this model.
    """
    reader = CheckpointReader(checkpoint)
    with topology.start(ParallelConfig(), config.seed):
        layer = _one_layer(config)
        yield lambda sequences: _run(reader, config, vocab_size, layer, sequences)


def _one_layer(config: RunConfig) -> Any:
    """A pipeline stage of one layer, neither the first nor the last."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    model = dataclasses.replace(config.model, num_layers=1)
    built = GPTModel(
        config=transformer_config(model, ParallelConfig(), "fp32", "none"),
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[_layer_spec(model, PLAIN)], layer_norm=Norm),
        vocab_size=model.make_vocab_size_divisible_by, max_sequence_length=config.data.seq_length, pre_process=False,
        post_process=False, position_embedding_type="rope", rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling_factor is not None, rope_scaling_factor=model.rope_scaling_factor or 1.0,
    )
    return built.eval()


@torch.no_grad()
def _run(
    reader: CheckpointReader, config: RunConfig, vocab_size: int, layer: Any, sequences: Sequence[torch.Tensor]
) -> Stages:
    table = reader.tensor("embedding.word_embeddings.weight")
    hidden = [table[tokens].float() for tokens in sequences]
    del table
    yield names.EMBEDDING.hugging_face, hidden
    for number in range(config.model.num_layers):
        fill(layer, reader, first_layer=number)
        found: list[dict[str, torch.Tensor]] = []
        for state_SH in hidden:
            inside: dict[str, torch.Tensor] = {}
            with listening(layer, inside):
                layer.set_input_tensor(state_SH[:, None])
                layer(None, None, None)
            found.append({name: value[:, 0] for name, value in inside.items()})
        for point in names.COMPARED:
            yield names.place_in_layer(point, number), [item[names.place_in_layer(point, 0)] for item in found]
        hidden = [item[names.place_in_layer(names.RESIDUAL, 0)] for item in found]
    norm = Norm(layer.config, config.model.hidden_size, eps=config.model.layernorm_epsilon)
    if norm.weight is not None:
        norm.weight.copy_(reader.tensor("decoder.final_layernorm.weight"))
    hidden = [norm(state_SH) for state_SH in hidden]
    name = "output_layer.weight" if config.model.untie_embeddings_and_output_weights else (
        "embedding.word_embeddings.weight"
    )
    yield "logits", project(reader.tensor(name), hidden, vocab_size)


def project(matrix_VH: torch.Tensor, hidden: Sequence[torch.Tensor], vocab_size: int) -> list[torch.Tensor]:
    """Logits [S, V] of each state [S, H], without the whole matrix in float32."""
    logits = [torch.empty(len(state_SH), vocab_size) for state_SH in hidden]
    for first in range(0, vocab_size, _ROWS):
        last = min(first + _ROWS, vocab_size)
        rows = matrix_VH[first:last].float()
        for out_SV, state_SH in zip(logits, hidden, strict=True):
            out_SV[:, first:last] = state_SH @ rows.T
    return logits

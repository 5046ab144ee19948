"""Initial weights that are a function of the seed and the parameter's name, not of the layout.

Every rank draws the rows of the full matrix that it needs and keeps its shard, so a run at TP2 x PP2 starts from the
same numbers as one on a single process, whatever the vocabulary is padded to.
"""

# R rows, C columns of a weight matrix, as in torch: [outputs, inputs]

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from megatron_xalign.config import ModelConfig
from megatron_xalign.topology import Ranks

ROWS_PER_DRAW = 64
"""Rows drawn with one generator; a part of the definition of the initial weights, not to be tuned."""


def normal_rows(seed: int, name: str, first_row: int, num_rows: int, num_columns: int) -> torch.Tensor:
    """Rows of an endless standard normal matrix that ``seed`` and ``name`` define.

    Args:
        seed: seed of the run.
        name: the parameter's global name.
        first_row: first row wanted.
        num_rows: how many.
        num_columns: C; another C is another matrix.

    Returns:
        float32 [num_rows, C]; row r is the same whatever rows are asked for with it.
    """
    blocks = []
    first_block, last_block = first_row // ROWS_PER_DRAW, -(-(first_row + num_rows) // ROWS_PER_DRAW)
    for block in range(first_block, last_block):
        digest = hashlib.sha256(f"{seed}/{name}/{num_columns}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        blocks.append(torch.randn(ROWS_PER_DRAW, num_columns, generator=generator))
    skip = first_row - first_block * ROWS_PER_DRAW
    return torch.cat(blocks)[skip : skip + num_rows]


def truncated(normal: torch.Tensor, bound: float) -> torch.Tensor:
    """Standard normal numbers as those of a normal distribution cut off at ``-bound`` and ``bound``, in their order.

    The cut distribution is not scaled back: its deviation is below 1 (0.9866 for a bound of 3).
    """
    share = torch.special.ndtr(normal.double())
    lowest = torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64))
    return torch.special.ndtri(lowest + share * (1 - 2 * lowest)).to(normal.dtype)


@torch.no_grad()
def initialize(model: torch.nn.Module, config: ModelConfig, seed: int, ranks: Ranks) -> None:
    """Fill this rank's shard of a ``GPTModel`` and mark its weights as Megatron's own initialisation would.

    ``init_method: scaled``: matrices are normal with deviation ``init_method_std``, those that write into the residual
    stream (``linear_proj``, ``linear_fc2``) with that over ``sqrt(2 * num_layers)``. ``mitchell``: every matrix is
    normal, cut off at three deviations, of deviation 1 over the square root of its inputs (the embedding's: of its
    width); those that write into the residual stream have that over ``sqrt(2 * n)``, n being their layer, counted from
    1. Norms are one and biases zero either way.

    Args:
        model: an unwrapped ``GPTModel`` on the CPU.
        config: what it was built from.
        seed: seed of the run.
        ranks: which shard this is.

    Raises:
        ValueError: the model has a parameter that is none of those above.

    Source: scaled initialisation of Radford et al. 2019, as in Megatron's ``scaled_init_method_normal``; OLMo's
    ``mitchell`` (Groeneveld et al. 2024, arXiv:2402.00838).
    """
    tied = not config.untie_embeddings_and_output_weights
    mitchell = config.init_method == "mitchell"

    def draw(name: str, first_row: int, rows: int, columns: int) -> torch.Tensor:
        """Rows of the whole matrix, [rows, columns]; in a residual matrix ``columns`` are those of all ranks."""
        drawn = normal_rows(seed, name, first_row, rows, columns)
        writes = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        if not mitchell:
            return drawn * (config.init_method_std / math.sqrt(2.0 * config.num_layers if writes else 1.0))
        # decoder.layers.7.mlp.linear_fc2.weight
        layers = 2.0 * (int(name.split(".")[2]) + 1) if writes else 1.0
        return truncated(drawn, 3.0) / math.sqrt(columns * layers)

    for name, weight in global_parameters(model):
        # The second is the norm in front of a matrix that Transformer Engine keeps with it.
        if name.endswith(("layernorm.weight", "layer_norm_weight")):
            weight.fill_(1.0)
            continue
        if name.endswith("linear_qkv.bias"):
            weight.zero_()
            _mark(weight, 0)
            continue
        rows, columns = weight.shape
        name_drawn = "embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name
        if name in ("embedding.word_embeddings.weight", "output_layer.weight") or name.endswith("linear_qkv.weight"):
            drawn = draw(name_drawn, ranks.tensor_rank * rows, rows, columns)
            dimension = 0
        elif name.endswith("linear_fc1.weight"):
            # Each rank holds [its part of the gate; its part of the rest] of the full [gate; rest].
            half = rows // 2
            parts = [
                draw(name, start + ranks.tensor_rank * half, half, columns)
                for start in (0, half * ranks.tensor_size)
            ]
            drawn = torch.cat(parts)
            dimension = 0
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            full = draw(name, 0, rows, columns * ranks.tensor_size)
            drawn = full[:, ranks.tensor_rank * columns :][:, :columns]
            dimension = 1
        else:
            raise ValueError(f"no initial value is defined for the parameter {name}.")
        weight.copy_(drawn)
        _mark(weight, dimension)


def _mark(weight: torch.nn.Parameter, dimension: int) -> None:
    # Gradient norms count a weight without these marks once per tensor-parallel group. Megatron sets them when it
    # initialises (0.16) or always (0.19).
    for mark, value in (("tensor_model_parallel", True), ("partition_dim", dimension), ("partition_stride", 1)):
        setattr(weight, mark, value)


def global_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters of one rank's unwrapped ``GPTModel`` with the names they have in the whole model.

    ``decoder.layers.0`` of the second pipeline stage becomes ``decoder.layers.L``, L being its 0-based number in the
    whole model.
    """
    layers: Any = model.get_submodule("decoder.layers")
    named = []
    for name, parameter in model.named_parameters():
        head, separator, rest = name.partition("decoder.layers.")
        if separator:
            local, _, tail = rest.partition(".")
            name = f"{head}{separator}{layers[int(local)].layer_number - 1}.{tail}"
        named.append((name, parameter))
    return named

"""A transformer-shaped model of plain torch modules with Megatron's names and [S, B, H] layout; no attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.topology import Ranks

# S sequence, B micro-batch, F ffn width, H hidden width

LAYERS, HIDDEN, FFN, VOCAB, LENGTH = 3, 8, 12, 32, 10
ONE_PROCESS = Ranks(
    rank=0, world_size=1, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, data_rank=0, data_size=1,
    device=torch.device("cpu"),
)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.t(), None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = Linear(HIDDEN, 2 * FFN)
        self.linear_fc2 = Linear(FFN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear_fc1(x)[0].chunk(2, dim=-1)
        return self.linear_fc2(functional.silu(gate) * up)[0]


class Layer(nn.Module):
    def __init__(self, layer_number: int, config: Any) -> None:
        super().__init__()
        self.layer_number, self.config, self.mlp = layer_number, config, Mlp()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.mlp(x), None


class Model(nn.Module):
    """``recompute``: every layer's forward runs again in the backward pass."""

    def __init__(self, seed: int = 3, recompute: bool = False, reentrant: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        values = {
            "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "sequence_parallel": False,
            "gated_linear_unit": True, "cuda_graph_impl": "none", **settings,
        }
        self.recompute, self.reentrant, self.pre_process = recompute, reentrant, True
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.decoder = nn.ModuleList(Layer(number, SimpleNamespace(**values)) for number in range(1, LAYERS + 1))
        self.skip: int | None = None

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        x_SBH = self.embedding(tokens_BS.t())
        for index, layer in enumerate(self.decoder):
            if index == self.skip:
                continue
            x_SBH = checkpoint(layer, x_SBH, use_reentrant=self.reentrant)[0] if self.recompute else layer(x_SBH)[0]
        return x_SBH


def make_batches(seed: int, sizes: list[int]) -> list[Batch]:
    """Micro-batches with two languages, a third never used, and tokens without one in between."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        tokens = torch.randint(0, VOCAB, (size, LENGTH), generator=generator)
        language_ids = torch.randint(-1, 2, (size, LENGTH), generator=generator).to(torch.int8)
        batches.append(
            Batch(
                tokens=tokens, labels=tokens, loss_mask=torch.ones(size, LENGTH),
                position_ids=torch.arange(LENGTH).expand(size, LENGTH), language_ids=language_ids,
                label_language_ids=language_ids, source_ids=torch.zeros(size, LENGTH, dtype=torch.int16),
                document_ids=torch.zeros(size, LENGTH, dtype=torch.int32),
            )
        )
    return batches


def train_on(model: Model, batches: list[Batch], current_batch: CurrentBatch) -> list[torch.Tensor]:
    """One forward and backward pass per micro-batch; returns the gradients."""
    model.zero_grad()
    for batch in batches:
        current_batch.batch = batch
        model(batch.tokens).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

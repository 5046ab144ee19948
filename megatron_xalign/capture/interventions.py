"""Change neurons or the residual stream while a model runs, and leave it as it was afterwards.

    with zero_neurons(points, {3: [17, 40]}):          # neurons of layer 3, by their global indices
        ...
    with add_to_residual(points, {12: vector_H}, strength=0.5):
        ...

``points`` are the hook points of a model, Megatron's (``megatron_points``, under any tensor- and pipeline-parallel
layout; every process enters the block) or one of transformers (``hugging_face_points``). Blocks nest; each changes what
the one outside it left. Weights are not touched: hooks change activations, and are gone after the block, also after an
exception. Gradients flow through the change. A recorder that listened before a block began sees neurons as the model
computed them; one that started inside it sees them changed.
"""

# S sequence, B batch, F ffn width of this rank, H hidden width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_xalign.capture.hook_points import ModelPoints
from megatron_xalign.residual import change_output, pushed

Neurons = Mapping[int, Sequence[int] | np.ndarray]
"""Layer, 0-based, to indices of neurons, global over tensor-parallel ranks."""


@contextmanager
def zero_neurons(points: ModelPoints, neurons: Neurons) -> Iterator[None]:
    """Set neurons to zero."""
    with scale_neurons(points, neurons, 0.0):
        yield


@contextmanager
def scale_neurons(points: ModelPoints, neurons: Neurons, factor: float) -> Iterator[None]:
    """Multiply neurons by a factor.

    Raises:
        ValueError: a layer or neuron is not one of the model's.
    """

    def change(values: torch.Tensor) -> torch.Tensor:
        # Not a product: zero times infinity is no number.
        return torch.zeros_like(values) if factor == 0.0 else values * factor

    with _changed_neurons(points, neurons, change):
        yield


@contextmanager
def clamp_neurons(
    points: ModelPoints, neurons: Neurons, low: float | None = None, high: float | None = None
) -> Iterator[None]:
    """Keep neurons between two bounds; equal bounds set them to a value.

    Raises:
        ValueError: a layer or neuron is not one of the model's, or there is no bound, or they are the wrong way round.
    """
    if low is None and high is None:
        raise ValueError("clamp_neurons needs a lower bound, an upper bound, or both.")
    if low is not None and high is not None and low > high:
        raise ValueError(f"the lower bound {low} is above the upper bound {high}.")
    with _changed_neurons(points, neurons, lambda values: values.clamp(low, high)):
        yield


@contextmanager
def add_to_residual(
    points: ModelPoints, vectors: Mapping[int, torch.Tensor | np.ndarray], strength: float = 1.0,
    keep_norm: bool = False,
) -> Iterator[None]:
    """Add a vector to the residual stream after layers, at every token.

    Args:
        points: of the model.
        vectors: layer to vector [H]; -1 is the input of the first layer.
        strength: the vectors are multiplied by it.
        keep_norm: whether the sum is scaled to the length the residual stream had, token by token.

    Raises:
        ValueError: a layer is not one of the model's, or a vector has another width.
    """
    for layer, vector in vectors.items():
        if not -1 <= layer < points.num_layers:
            raise ValueError(f"the model has layers 0 to {points.num_layers - 1} (and -1, the input), not {layer}.")
        if tuple(vector.shape) != (points.hidden_size,):
            raise ValueError(
                f"a vector of shape {tuple(vector.shape)}; the residual stream is {points.hidden_size} wide."
            )

    def change_at(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        push_H = torch.as_tensor(vectors[layer]) * strength

        def change(hidden_SBH: torch.Tensor) -> torch.Tensor:
            nonlocal push_H
            push_H = push_H.to(hidden_SBH.device)
            return pushed(hidden_SBH, push_H, keep_norm)

        return change

    with ExitStack() as hooks:
        if -1 in vectors and points.embedding is not None:
            module, side = points.embedding
            hooks.callback((change_output if side == "output" else _on_input)(module, change_at(-1)).remove)
        for point in points.layers:
            if point.layer in vectors:
                hooks.callback(change_output(point.output, change_at(point.layer)).remove)
        yield


@contextmanager
def _changed_neurons(
    points: ModelPoints, neurons: Neurons, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    chosen: dict[int, torch.Tensor] = {}
    for layer, indices in neurons.items():
        found = torch.as_tensor(np.unique(np.asarray(indices, dtype=np.int64)))
        if not 0 <= layer < points.num_layers:
            raise ValueError(f"the model has layers 0 to {points.num_layers - 1}, not {layer}.")
        if len(found) and not 0 <= int(found[0]) <= int(found[-1]) < points.ffn_hidden_size:
            raise ValueError(
                f"neurons {int(found[0])} to {int(found[-1])} of layer {layer}, which has 0 to "
                f"{points.ffn_hidden_size - 1}."
            )
        first, stop = points.neurons
        chosen[layer] = found[(found >= first) & (found < stop)] - first

    def on_columns(columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def changed(act_SBF: torch.Tensor) -> torch.Tensor:
            own = columns.to(act_SBF.device)
            return act_SBF.index_copy(-1, own, change(act_SBF.index_select(-1, own)))

        return changed

    with ExitStack() as hooks:
        for point in points.layers:
            if point.layer in chosen and len(chosen[point.layer]):
                hooks.callback(_on_input(point.neurons, on_columns(chosen[point.layer])).remove)
        yield


def _on_input(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)

"""Hooks that hand each layer's neurons, gates and residual stream to a listener, once per micro-batch.

What is handed over is defined in ``hook_points``. Each tensor-parallel rank sees its own columns of neurons and gates,
of all tokens also under sequence parallelism. Of the residual stream and the attention output each rank sees all
coordinates; under sequence parallelism those of its part of the tokens. Under context parallelism a process sees of
everything the tokens it holds, ``CurrentBatch.batch``.

Hooks read detached tensors and change nothing, so training with and without them is the same to the last bit.
"""

# S sequence, B micro-batch, F ffn width of this rank, H hidden width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron_xalign import names
from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.capture.hook_points import ModelPoints, megatron_points
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.topology import Ranks


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch a tensor belongs to."""

    batch: Batch
    """What went into the model: under context parallelism this process's part of every sequence."""
    whole: Batch
    """Whole sequences."""
    number: int
    """How many micro-batches this layer has seen before it since listening began."""
    positions: slice
    """Which positions of ``batch`` the tensor covers: all, or this rank's part under sequence parallelism."""


class Listener(Protocol):
    """What a recorder hands tensors to. ``row`` counts the layers (or residual rows) this process holds, from 0.

    One that has ``wants_attention = True`` and a method ``take_attention(row, output_SBH, micro_batch)`` is handed the
    attention output of layer ``Recorder.layers[row]`` too.
    """

    wants_residual: bool
    """Whether ``take_residual`` is to be called."""

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Post-activations of layer ``Recorder.layers[row]``, columns ``Recorder.neurons``."""

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Gates before SiLU of the same layer and columns."""

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Residual row ``Recorder.residual_rows[row]`` at ``micro_batch.positions``."""


class Together:
    """Several listeners as one."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.wants_residual = any(listener.wants_residual for listener in listeners)
        self.wants_attention = any(getattr(listener, "wants_attention", False) for listener in listeners)
        self._listeners = listeners

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Hand over to each."""
        for listener in self._listeners:
            listener.take_neurons(row, act_SBF, micro_batch)

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Hand over to each."""
        for listener in self._listeners:
            listener.take_gates(row, gate_SBF, micro_batch)

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Hand over to those that want it."""
        for listener in self._listeners:
            if listener.wants_residual:
                listener.take_residual(row, hidden_SBH, micro_batch)

    def take_attention(self, row: int, output_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Hand over to those that want it."""
        for listener in self._listeners:
            if getattr(listener, "wants_attention", False):
                listener.take_attention(row, output_SBH, micro_batch)


Take = Callable[[int, Any, "MicroBatch"], None]


class Recorder:
    """Finds the hook points of a model and listens to them while asked to.

    Args:
        model: this process's part of Megatron's model, bare or wrapped (data parallelism, bf16), several chunks under
            interleaved pipelining; or the hook points of any model.
        ranks: this process's place among the others.
        current_batch: tells which micro-batch the forward pass now running belongs to.
        layers: global, 0-based layers to listen to; all if left out.
        defer_errors: an error in a hook ends listening and is raised by ``stop``, so that the forward and backward
            passes go on. Otherwise it is raised where it happens.
        quantized: hand out neurons as the FP8 product after them reads them, not as they are before quantisation;
            layers that compute in more bits are handed out as they are.

    Raises:
        ConfigError: the model has a setting under which the numbers could not be exact, or lacks one of the layers;
            the message names it.
    """

    def __init__(
        self,
        model: Sequence[nn.Module] | ModelPoints,
        ranks: Ranks,
        current_batch: CurrentBatch,
        layers: Sequence[int] | None = None,
        defer_errors: bool = False,
        quantized: bool = False,
    ) -> None:
        self._quantized = quantized
        points = model if isinstance(model, ModelPoints) else megatron_points(model, ranks)
        missing = sorted(set(layers or ()) - set(range(points.num_layers)))
        if missing:
            raise ConfigError(
                f"layer {missing[0]} is to be captured; the model has layers 0 to {points.num_layers - 1}."
            )
        self._current_batch = current_batch
        self._ranks = ranks
        self._defer_errors = defer_errors
        self._points = points
        self._layers = [point for point in points.layers if layers is None or point.layer in layers]
        self.layers = tuple(point.layer for point in self._layers)
        """Global layers this process listens to, in order; 0-based."""
        self.num_layers = points.num_layers
        """Layers of the whole model."""
        self.ffn_hidden_size = points.ffn_hidden_size
        """Neurons of a layer, over all tensor-parallel ranks."""
        self.hidden_size = points.hidden_size
        """Width of the residual stream."""
        self.neurons = points.neurons
        """First and one past the last neuron of a layer this process sees."""
        rows = [layer + 1 for layer in self.layers]
        self.residual_rows = tuple(rows if points.embedding is None else [0, *rows])
        """Residual rows this process listens to: 0 is the input of the first layer, l + 1 the output of layer l."""
        self.sequence_parallel = points.sequence_parallel
        """Whether this process sees only its part of the tokens of the residual stream."""
        self._handles: list[Any] = []
        self._seen: dict[tuple[str, int], int] = {}
        self._last: dict[tuple[str, int], Batch] = {}
        self._listener: Any = None
        self._error: Exception | None = None

    @property
    def listening(self) -> bool:
        """Whether ``start`` was called and ``stop`` or ``close`` was not."""
        return self._listener is not None

    def start(self, listener: Listener) -> None:
        """Put the hooks in place and hand ``listener`` every micro-batch from now on.

        Raises:
            ValueError: another listener has not been stopped.
        """
        if self.listening:
            raise ValueError("the recorder is already listening; stop it first.")
        self._listener = listener
        self._seen, self._last, self._error = {}, {}, None
        for row, layer in enumerate(self._layers):
            self._on_output(layer.gate, "gates", row, listener.take_gates, layer.gate_is_half)
            self._on_input(layer.neurons, "neurons", row, listener.take_neurons)
        if listener.wants_residual:
            before = 0
            if self._points.embedding is not None:
                module, side = self._points.embedding
                put = self._on_output if side == "output" else self._on_input
                put(module, "residual", 0, listener.take_residual)
                before = 1
            for row, layer in enumerate(self._layers, start=before):
                self._on_output(layer.output, "residual", row, listener.take_residual)
        if getattr(listener, "wants_attention", False):
            for row, layer in enumerate(self._layers):
                if layer.attention is None:
                    self.close()
                    raise ConfigError(f"layer {layer.layer} has no self_attention to listen to.")
                self._on_output(layer.attention, "attention", row, listener.take_attention)  # type: ignore[attr-defined]

    def stop(self, micro_batches: int) -> None:
        """Take the hooks away and check that every layer was seen exactly once per micro-batch.

        Raises:
            XAlignError: a layer was missed or counted twice.
            Exception: an error in a hook, where those were put off.
        """
        seen, error = self._seen, self._error
        self.close()
        if error is not None:
            raise error
        for (what, row), count in seen.items():
            if count != micro_batches:
                raise XAlignError(
                    f"capture saw the {what} of {self._name(what, row)} {count} times in {micro_batches} "
                    "micro-batches; something runs that layer outside of hooks, or more than once. Leave out capture "
                    "or the setting that does it."
                )

    def close(self) -> None:
        """Take the hooks away; may be called at any time, also after an exception and twice."""
        self._unhook()
        self._listener = None
        self._seen, self._last, self._error = {}, {}, None

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _name(self, what: str, row: int) -> str:
        if what != "residual":
            return f"layer {self.layers[row]}"
        number = self.residual_rows[row]
        return "the embedding output" if number == 0 else f"layer {number - 1}"

    def _on_input(self, module: nn.Module, what: str, row: int, take: Take) -> None:
        self._seen[what, row] = 0

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            def find() -> torch.Tensor | None:
                tensor = args[0] if args else kwargs.get("hidden_states")
                if what == "neurons" and self._quantized and tensor is not None:
                    through_fp8: Any = module.quantised_copy
                    return through_fp8(tensor)
                return tensor

            self._hand_over(what, row, take, find)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_output(self, module: nn.Module, what: str, row: int, take: Take, first_half: bool = False) -> None:
        self._seen[what, row] = 0

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._hand_over(what, row, take, lambda: _tensor_of(output, what, first_half))

        self._handles.append(module.register_forward_hook(hook))

    def _hand_over(self, what: str, row: int, take: Take, find: Callable[[], torch.Tensor | None]) -> None:
        if _replayed() or self._error is not None:
            return
        try:
            with torch.no_grad():
                tensor = find()
                if tensor is not None:
                    tensor = tensor.detach()
                    tensor = tensor.transpose(0, 1) if self._points.batch_first else tensor
                micro_batch = self._enter(what, row, tensor)
                take(row, tensor, micro_batch)
        except Exception as error:
            if not self._defer_errors:
                raise
            self._error = error

    def _enter(self, what: str, row: int, tensor: torch.Tensor | None) -> MicroBatch:
        """Which micro-batch this pass is, after checking that it is a new one and that shapes agree."""
        batch = self._current_batch.batch
        where = f"the {what} of {self._name(what, row)}"
        if batch is None:
            raise XAlignError(f"capture saw {where} in a forward pass that no micro-batch was announced for.")
        if self._last.get((what, row)) is batch:
            raise XAlignError(f"capture saw {where} twice in one micro-batch; it would be counted twice.")
        if tensor is None:
            raise XAlignError(f"capture was shown no tensor for {where}: a fused kernel hides it.")
        batch_size, length = batch.language_ids.shape
        positions = slice(0, length)
        if what in ("residual", "attention") and self.sequence_parallel:
            part = length // self._ranks.tensor_size
            positions = slice(self._ranks.tensor_rank * part, (self._ranks.tensor_rank + 1) * part)
        expected = (positions.stop - positions.start, batch_size)
        if tuple(tensor.shape[:2]) != expected:
            raise XAlignError(
                f"capture saw {where} as {tuple(tensor.shape)}; the micro-batch of {batch_size} samples of {length} "
                f"tokens should give {expected} and a width."
            )
        number = self._seen[what, row]
        self._seen[what, row] = number + 1
        self._last[what, row] = batch
        return MicroBatch(batch, self._current_batch.whole or batch, number, positions)


def _tensor_of(output: Any, what: str, first_half: bool) -> torch.Tensor:
    """The tensor in what a module returned; Megatron's linear modules and attention return it with a bias or None."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    bias = output[1] if isinstance(output, tuple) and len(output) > 1 and what != "residual" else None
    width = tensor.shape[-1]
    if first_half:
        # Each rank holds [gate | up] of its own columns: halve before anything is gathered.
        tensor = tensor[..., names.gate_half(width)]
    if isinstance(bias, torch.Tensor) and bias.shape == (width,):
        tensor = tensor + bias[: tensor.shape[-1]]
    return tensor


def _replayed() -> bool:
    """Whether this forward pass runs inside a backward pass: activation recomputation, which is not to be counted.

    Any kind of recomputation happens there (Megatron's, Transformer Engine's, torch's own, reentrant or not), while the
    first pass of none does. Torch's checkpointing asks autograd the same question.
    """
    return torch._C._current_graph_task_id() != -1

"""Hooks that hand each layer's neurons, gates and residual stream to a listener, once per micro-batch.

A neuron is one coordinate of the input of ``mlp.linear_fc2``, after SiLU(gate) * up; its gate is the same coordinate of
the first half of the output of ``mlp.linear_fc1``. Each tensor-parallel rank sees its own columns of both, of all
tokens also under sequence parallelism. The residual stream is the output of the embedding and of every layer, before
the final norm; under sequence parallelism each rank sees all coordinates of its part of the tokens.

Hooks read detached tensors and change nothing, so training with and without them is the same to the last bit.
"""

# S sequence, B micro-batch, F ffn width of this rank, H hidden width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.topology import Ranks


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch a tensor belongs to."""

    batch: Batch
    """What went into the model."""
    number: int
    """How many micro-batches this layer has seen before it since listening began."""
    positions: slice
    """Which positions of the sequence the tensor covers: all, or this rank's part under sequence parallelism."""


class Listener(Protocol):
    """What a recorder hands tensors to. ``row`` counts the layers (or residual rows) this process holds, from 0."""

    wants_residual: bool
    """Whether ``take_residual`` is to be called."""

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Post-activations of layer ``Recorder.layers[row]``, columns ``Recorder.neurons``."""

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Gates before SiLU of the same layer and columns."""

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Residual row ``Recorder.residual_rows[row]`` at ``micro_batch.positions``."""


# What these settings do to the forward pass, by the attribute of Megatron's TransformerConfig and its harmless values.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_transformer_engine_op_fuser", (None, False), "the fused MLP never shows its post-activation"),
    ("use_te_op_fuser", (None, False), "the fused MLP never shows its post-activation"),
    ("use_grouped_gemm_for_dense_mlp", (None, False), "the grouped MLP never shows its post-activation"),
    ("cuda_graph_impl", (None, "none"), "a replayed CUDA graph runs no hooks"),
    ("enable_cuda_graph", (None, False), "a replayed CUDA graph runs no hooks"),
    ("external_cuda_graph", (None, False), "a replayed CUDA graph runs no hooks"),
    ("mlp_chunks_for_training", (None, 1), "the MLP then runs several times per micro-batch"),
    ("num_moe_experts", (None,), "experts see their tokens in another order"),
    ("context_parallel_size", (None, 1), "a process then sees only part of every sequence"),
)


class Recorder:
    """Finds the hook points of a model and listens to them while asked to.

    Args:
        model_chunks: this process's part of the model, bare or wrapped (data parallelism, bf16); several under
            interleaved pipelining.
        ranks: this process's place among the others.
        current_batch: tells which micro-batch the forward pass now running belongs to.

        quantized: hand out neurons as the FP8 product after them reads them, not as they are before quantisation;
            layers that compute in more bits are handed out as they are.

    Raises:
        ConfigError: the model has a setting under which the numbers could not be exact; the message names it.
    """

    def __init__(
        self, model_chunks: Sequence[nn.Module], ranks: Ranks, current_batch: CurrentBatch, quantized: bool = False
    ) -> None:
        self._quantized = quantized
        self._current_batch = current_batch
        self._ranks = ranks
        found = _find_layers(model_chunks)
        if not found:
            raise ConfigError("capture finds no transformer layer with an MLP in this process's part of the model.")
        self._layers = [module for _, module in sorted(found.items())]
        self.layers = tuple(sorted(found))
        """Global layers this process holds, in order; 0-based."""
        config = self._layers[0].config
        _refuse_inexact(config, self._layers)
        self.num_layers = int(config.num_layers)
        """Layers of the whole model."""
        self.ffn_hidden_size = int(config.ffn_hidden_size)
        """Neurons of a layer, over all tensor-parallel ranks."""
        self.hidden_size = int(config.hidden_size)
        """Width of the residual stream."""
        width = self.ffn_hidden_size // ranks.tensor_size
        self.neurons = (ranks.tensor_rank * width, (ranks.tensor_rank + 1) * width)
        """First and one past the last neuron of a layer this process sees."""
        self._embedding = _find_embedding(model_chunks)
        rows = [layer + 1 for layer in self.layers]
        self.residual_rows = tuple(rows if self._embedding is None else [0, *rows])
        """Residual rows this process holds: 0 is the embedding output, l + 1 the output of layer l."""
        self.sequence_parallel = bool(config.sequence_parallel) and ranks.tensor_size > 1
        """Whether this process sees only its part of the tokens of the residual stream."""
        self._handles: list[Any] = []
        self._seen: dict[tuple[str, int], int] = {}
        self._last: dict[tuple[str, int], Batch] = {}
        self._listener: Listener | None = None

    @property
    def listening(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles)

    def start(self, listener: Listener) -> None:
        """Put the hooks in place and hand ``listener`` every micro-batch from now on.

        Raises:
            ValueError: another listener has not been stopped.
        """
        if self._handles:
            raise ValueError("the recorder is already listening; stop it first.")
        self._listener = listener
        self._seen, self._last = {}, {}
        for row, layer in enumerate(self._layers):
            self._seen["gates", row] = self._seen["neurons", row] = 0
            self._handles.append(layer.mlp.linear_fc1.register_forward_hook(self._gate_hook(row)))
            self._handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(self._neuron_hook(row)))
        if listener.wants_residual:
            outputs = self._layers if self._embedding is None else [self._embedding, *self._layers]
            for row, module in enumerate(outputs):
                self._seen["residual", row] = 0
                self._handles.append(module.register_forward_hook(self._residual_hook(row)))

    def stop(self, micro_batches: int) -> None:
        """Take the hooks away and check that every layer was seen exactly once per micro-batch.

        Raises:
            XAlignError: a layer was missed or counted twice.
        """
        seen = self._seen
        self.close()
        for (what, row), count in seen.items():
            if count != micro_batches:
                raise XAlignError(
                    f"capture saw the {what} of {self._name(what, row)} {count} times in {micro_batches} "
                    "micro-batches; something runs that layer outside of hooks, or more than once. Leave out capture "
                    "or the setting that does it."
                )

    def close(self) -> None:
        """Take the hooks away; may be called at any time, also after an exception and twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._listener = None
        self._seen, self._last = {}, {}

    def _name(self, what: str, row: int) -> str:
        if what != "residual":
            return f"layer {self.layers[row]}"
        number = self.residual_rows[row]
        return "the embedding output" if number == 0 else f"layer {number - 1}"

    def _neuron_hook(self, row: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if _replayed():
                return
            act_SBF = args[0] if args else None
            listener, micro_batch = self._enter("neurons", row, act_SBF)
            with torch.no_grad():
                shown = args[0].detach()
                if self._quantized:
                    through_fp8: Any = module.quantised_copy
                    shown = through_fp8(shown)
                listener.take_neurons(row, shown, micro_batch)

        return hook

    def _gate_hook(self, row: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _replayed():
                return
            fc1_SBG, bias_G = output
            listener, micro_batch = self._enter("gates", row, fc1_SBG)
            with torch.no_grad():
                # Each rank holds [gate | up] of its own columns: halve before anything is gathered.
                gate_SBF = fc1_SBG.detach()[..., : fc1_SBG.shape[-1] // 2]
                if bias_G is not None:
                    gate_SBF = gate_SBF + bias_G[: bias_G.shape[-1] // 2]
                listener.take_gates(row, gate_SBF, micro_batch)

        return hook

    def _residual_hook(self, row: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _replayed():
                return
            hidden_SBH = output[0] if isinstance(output, tuple) else output
            listener, micro_batch = self._enter("residual", row, hidden_SBH)
            with torch.no_grad():
                listener.take_residual(row, hidden_SBH.detach(), micro_batch)

        return hook

    def _enter(self, what: str, row: int, tensor: torch.Tensor | None) -> tuple[Listener, MicroBatch]:
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
        if what == "residual" and self.sequence_parallel:
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
        assert self._listener is not None
        return self._listener, MicroBatch(batch, number, positions)


def _replayed() -> bool:
    """Whether this forward pass runs inside a backward pass: activation recomputation, which is not to be counted.

    Any kind of recomputation happens there (Megatron's, Transformer Engine's, torch's own, reentrant or not), while the
    first pass of none does. Torch's checkpointing asks autograd the same question.
    """
    return torch._C._current_graph_task_id() != -1


def _find_layers(model_chunks: Sequence[nn.Module]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for chunk in model_chunks:
        for module in chunk.modules():
            if hasattr(module, "layer_number") and hasattr(module, "mlp"):
                layer = int(module.layer_number) - 1  # type: ignore[arg-type]
                if not (hasattr(module.mlp, "linear_fc1") and hasattr(module.mlp, "linear_fc2")):
                    raise ConfigError(
                        f"layer {layer} has a {type(module.mlp).__name__} without linear_fc1 and linear_fc2; capture "
                        "reads the neurons of dense MLPs only."
                    )
                found[layer] = module
    return found


def _find_embedding(model_chunks: Sequence[nn.Module]) -> nn.Module | None:
    for chunk in model_chunks:
        for module in chunk.modules():
            embedding = getattr(module, "embedding", None)
            if hasattr(module, "decoder") and isinstance(embedding, nn.Module) and getattr(module, "pre_process", True):
                return embedding
    return None


def _refuse_inexact(config: Any, layers: Sequence[Any]) -> None:
    for name, harmless, why in _REFUSED:
        value = getattr(config, name, None)
        if value not in harmless:
            raise ConfigError(f"{name}={value} does not go with capture: {why}. Use {name}={harmless[-1]}.")
    if not config.gated_linear_unit:
        raise ConfigError("gated_linear_unit=False does not go with capture: the MLP has no gate to count.")
    for layer in layers:
        if "Fused" in type(layer.mlp).__name__:
            raise ConfigError(
                f"{type(layer.mlp).__name__} does not go with capture: the fused MLP never shows its post-activation. "
                "Build the model from an unfused layer spec."
            )

"""Megatron's parallel linear layers with matrix products in FP8, over ``torch._scaled_mm``, which runs on CPU and GPU.

This is FP8 that can be tested anywhere: scaling, histories, what is stored, what capture sees, tensor parallelism. It
tests the logic of this project and says nothing about Transformer Engine's kernels.

Inputs, weights and gradients of the outputs are quantised, each with one scale: E4M3, gradients E5M2 with
``format: hybrid``. Products are given out in the type of the inputs; main weights, norms, attention, embedding and
output layer are as in bf16. Two recipes:

    tensorwise   the scale is the largest value of the tensor, over all tensor-parallel ranks
    delayed      it is the largest value of past optimizer steps, over tensor- and data-parallel ranks; within a step
                 all micro-batches share it, so it depends neither on how a batch is cut nor on recomputation. Before
                 the first step there is no history, and it is found as in tensorwise.
"""

# M tokens, K inputs, N outputs of a matrix on this rank, H steps of history

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_xalign.config import FP8_MULTIPLE_OF, Fp8Config
from megatron_xalign.names import FP8_STATE
from megatron_xalign.training.precision import is_bf16_layer

INPUT, WEIGHT, GRADIENT = 0, 1, 2
scaled_product_on_cpu = False
"""Whether ``torch._scaled_mm`` multiplies on the CPU too. There it is a plain loop, several hundred times slower than a
float32 product of the same FP8 numbers, which differs from it in the order of its sums; a test holds them together."""

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Product:
    """What the column- and row-parallel layer share: scales, histories and the product itself.

    A layer computes as Megatron's until ``enable_fp8`` is called on it.
    """

    fp8: Fp8Config | None = None
    """The recipe; None while the layer computes in the type of its weights."""
    fp8_scale: torch.Tensor
    """float32 [3], of inputs, weights and gradients in the step under way; 0 where there is no history yet."""
    fp8_amax_history: torch.Tensor
    """float32 [3, H], the largest absolute values of past steps, newest first."""

    def enable_fp8(self, fp8: Fp8Config, in_bf16: bool) -> None:
        """Compute in FP8 from now on, or in bf16 for one of the first and last layers, whose state stays empty."""
        module: Any = self
        # Kept by every layer, so that layers stack to one tensor in a checkpoint.
        module.register_buffer("fp8_scale", torch.zeros(3, dtype=torch.float32, device=module.weight.device))
        steps = fp8.amax_history_len if fp8.recipe == "delayed" else 1
        module.register_buffer(
            "fp8_amax_history", torch.zeros(3, steps, dtype=torch.float32, device=module.weight.device)
        )
        module.register_load_state_dict_post_hook(lambda loaded, keys: loaded.forget())
        self.fp8 = None if in_bf16 else fp8
        self.forget()

    def forget(self) -> None:
        """Drop what was seen since the last step; scales and histories stay."""
        self._seen: torch.Tensor | None = None
        self._known: list[bool] | None = None

    def _apply(self, function: Callable[..., Any], recurse: bool = True) -> Any:
        # Float16Module turns every floating-point buffer to bf16, in which no scale is right.
        buffers = self._buffers  # type: ignore[attr-defined]
        kept = {name: buffers[name] for name in FP8_STATE if name in buffers}
        super()._apply(function, recurse)  # type: ignore[misc]
        for name, value in kept.items():
            buffers[name] = value.to(buffers[name].device)
        self._seen = None
        return self

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.fp8 is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        group = kwargs.get("tp_group")
        if kwargs.get("sequence_parallel"):
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        elif kwargs.get("allreduce_dgrad"):
            input = copy_to_tensor_model_parallel_region(input, group=group)
        output: torch.Tensor = _Product.apply(input, weight, self)
        bias = kwargs.get("bias")
        return output if bias is None else output + bias

    def quantise(self, role: int, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor in FP8 and the float32 factor that takes it back."""
        assert self.fp8 is not None
        dtype = _type_of(role, self.fp8)
        most = torch.finfo(dtype).max
        if self.fp8.recipe == "delayed":
            self._notice(role, tensor)
        if self.fp8.recipe == "delayed" and self._has_history(role):
            scale = self.fp8_scale[role]
        else:
            amax = tensor.detach().abs().amax().float()
            group = self.tp_group  # type: ignore[attr-defined]
            if group is not None and group.size() > 1:
                dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
            scale = scale_of(amax, dtype, 0)
        return (tensor.float() * scale).clamp(-most, most).to(dtype), scale.reciprocal()

    def quantised_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input as this layer's product sees it: through FP8 and back. Nothing is noticed of it."""
        if self.fp8 is None:
            return tensor
        noticed, self._seen = self._seen, None
        quantised, factor = self.quantise(INPUT, tensor)
        self._seen = noticed
        return (quantised.float() * factor).to(tensor.dtype)

    def _notice(self, role: int, tensor: torch.Tensor) -> None:
        # Validation and probes run in evaluation mode and leave no trace. Running twice, as recomputation does, changes
        # no maximum.
        if not self.training:  # type: ignore[attr-defined]
            return
        if self._seen is None:
            self._seen = torch.zeros_like(self.fp8_scale)
        self._seen[role] = torch.maximum(self._seen[role], tensor.detach().abs().amax().float())

    def _has_history(self, role: int) -> bool:
        if self._known is None:
            self._known = (self.fp8_scale > 0).tolist()
        return self._known[role]

    def seen_in_step(self) -> torch.Tensor:
        """float32 [3]: the largest absolute values since the last step, on this rank."""
        return torch.zeros_like(self.fp8_scale) if self._seen is None else self._seen

    def end_step(self, amax: torch.Tensor) -> None:
        """Push a step's largest values, over all ranks, into the history and find the scales of the next step."""
        assert self.fp8 is not None
        finite = torch.isfinite(amax)
        # After an overflow the history stays as it is, as the weights do.
        pushed = torch.cat([amax[:, None], self.fp8_amax_history[:, :-1]], dim=1)
        self.fp8_amax_history.copy_(torch.where(finite[:, None], pushed, self.fp8_amax_history))
        history = self.fp8_amax_history
        chosen = history.amax(dim=1) if self.fp8.amax_compute_algo == "max" else history[:, 0]
        scales = torch.stack([
            scale_of(chosen[role], _type_of(role, self.fp8), self.fp8.margin) for role in (INPUT, WEIGHT, GRADIENT)
        ])
        self.fp8_scale.copy_(torch.where(chosen > 0, scales, self.fp8_scale))
        self.forget()


def _type_of(role: int, fp8: Fp8Config) -> torch.dtype:
    return _E5M2 if role == GRADIENT and fp8.format == "hybrid" else _E4M3


def scale_of(amax: torch.Tensor, dtype: torch.dtype, margin: int) -> torch.Tensor:
    """The factor that takes ``amax`` to the largest number of an FP8 type, halved ``margin`` times.

    It is 1 where there is no such factor: for zeros and overflows.
    """
    scale = torch.finfo(dtype).max / amax / 2**margin
    return torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))


class _Product(torch.autograd.Function):
    """x [..., K] times the transpose of w [N, K], both products of its gradient in FP8 too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: Fp8Product) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        x_MK, x_factor = layer.quantise(INPUT, _whole_blocks(rows))
        w_NK, w_factor = layer.quantise(WEIGHT, weight)
        ctx.save_for_backward(x_MK, x_factor, w_NK, w_factor)
        ctx.layer, ctx.shape = layer, x.shape
        out_MN = _multiply(x_MK, w_NK, x_factor, w_factor, x.dtype)[: rows.shape[0]]
        return out_MN.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        x_MK, x_factor, w_NK, w_factor = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        g_MN, g_factor = ctx.layer.quantise(GRADIENT, _whole_blocks(rows))
        to_x = _multiply(g_MN, w_NK.t(), g_factor, w_factor, gradient.dtype)[: rows.shape[0]]
        to_weight = _multiply(g_MN.t(), x_MK.t(), g_factor, x_factor, gradient.dtype)
        return to_x.view(ctx.shape), to_weight, None


def _whole_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Rows of zeros behind, up to what the GPU's product takes; they change no sum."""
    missing = -rows.shape[0] % FP8_MULTIPLE_OF["tensorwise"]
    return rows if not missing else torch.nn.functional.pad(rows, (0, 0, 0, missing))


def _multiply(
    left: torch.Tensor, right: torch.Tensor, left_factor: torch.Tensor, right_factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """left [A, C] times the transpose of right [B, C]."""
    if left.device.type == "cpu" and not scaled_product_on_cpu:
        return ((left.float() @ right.float().t()) * (left_factor * right_factor)).to(dtype)
    # It wants the first by rows, the second by columns.
    return torch._scaled_mm(
        left.contiguous(), right.contiguous().t(), scale_a=left_factor, scale_b=right_factor, out_dtype=dtype
    )


@functools.cache
def fp8_linear_classes() -> tuple[type, type]:
    """Megatron's ``ColumnParallelLinear`` and ``RowParallelLinear`` with products in FP8."""
    # Imported late: the CPU backend must be in place first.
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    class Fp8ColumnParallelLinear(Fp8Product, ColumnParallelLinear):
        """Weight rows divided over tensor-parallel ranks."""

    class Fp8RowParallelLinear(Fp8Product, RowParallelLinear):
        """Weight columns divided over tensor-parallel ranks."""

    return Fp8ColumnParallelLinear, Fp8RowParallelLinear


def enable_fp8(model: torch.nn.Module, fp8: Fp8Config, num_layers: int) -> None:
    """Switch a ``GPTModel``'s layers to FP8, except those that are to stay in bf16."""
    layers: Any = model.get_submodule("decoder.layers")
    for layer in layers:
        in_bf16 = is_bf16_layer(fp8, layer.layer_number - 1, num_layers)
        for product in products([layer]):
            product.enable_fp8(fp8, in_bf16)


def products(modules: Sequence[torch.nn.Module]) -> Iterator[Fp8Product]:
    """Every layer of ours inside these modules, in an order that is the same on all data-parallel ranks."""
    for module in modules:
        for inner in module.modules():
            if isinstance(inner, Fp8Product):
                yield inner


def end_step(model_chunks: Sequence[torch.nn.Module]) -> None:
    """After the last backward pass of an optimizer step: the scales of the next one. Every process calls it.

    Largest values are reduced over tensor-, context- and data-parallel ranks at once, as Transformer Engine does it.
    """
    delayed = [item for item in products(model_chunks) if item.fp8 is not None and item.fp8.recipe == "delayed"]
    if not delayed:
        return
    from megatron.core import parallel_state

    amax = torch.stack([item.seen_in_step() for item in delayed])
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    if group.size() > 1:
        # A rank that saw infinity must make every rank keep its history.
        dist.all_reduce(torch.nan_to_num_(amax, nan=math.inf, posinf=math.inf), op=dist.ReduceOp.MAX, group=group)
    for item, step_amax in zip(delayed, amax, strict=True):
        item.end_step(step_amax)

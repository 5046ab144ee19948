"""A stand-in for Transformer Engine on the CPU: its module names, parameters, arguments and state, in plain torch.

Megatron's own wrappers of Transformer Engine (`megatron.core.extensions.transformer_engine`) are built on it unchanged.
So what this project does with their names, weights and checkpoints runs without a GPU. No kernel of Transformer Engine
and nothing of FP8 is in it: it proves nothing about them.
"""

from __future__ import annotations

import contextlib
import enum
import pickle
import sys
import types
from typing import Any

import torch
from torch.nn import functional


class _Base(torch.nn.Module):
    """What Transformer Engine's modules with FP8 state have in common."""

    def get_extra_state(self) -> torch.Tensor:
        state = pickle.dumps({"extra_fp8_variables": {}, "amax_history_fwd": torch.zeros(1, 3)})
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.restored = None if state is None else pickle.loads(state.numpy().tobytes())


class Linear(_Base):
    """``transformer_engine.pytorch.Linear``: column-, row-parallel or whole."""

    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False, tp_group: Any = None,
        tp_size: int = 1, bias: bool = True, return_bias: bool = False, parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None, device: Any = "cpu", **kwargs: Any,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.sequence_parallel, self.tp_group = parallel_mode, sequence_parallel, tp_group
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = torch.nn.Parameter(torch.full((rows, columns), float("nan"), dtype=params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(rows, dtype=params_dtype, device=device)) if bias else torch.Tensor()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column":
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        out = functional.linear(x, self.weight, self.bias if self.use_bias else None)
        if self.parallel_mode == "row":
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return self.product(x)


class LayerNormLinear(Linear):
    """``transformer_engine.pytorch.LayerNormLinear``: the norm's weight lies beside the matrix."""

    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, normalization: str = "LayerNorm",
        sequence_parallel: bool = False, params_dtype: torch.dtype | None = None, device: Any = "cpu", **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel=sequence_parallel, params_dtype=params_dtype, device=device,
            **kwargs,
        )
        assert normalization == "RMSNorm", "the fused LayerNorm has a weight and a bias that OLMo lacks"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.full((in_features,), 7.0, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        normed = functional.rms_norm(x.float(), (x.shape[-1],), None, self.eps).type_as(x) * self.layer_norm_weight
        return self.product(normed)


class RMSNorm(torch.nn.Module):
    """``transformer_engine.pytorch.RMSNorm``."""

    def __init__(
        self, normalized_shape: int | None = None, eps: float = 1e-5, sequence_parallel: bool = False,
        params_dtype: Any = None, hidden_size: int | None = None, device: Any = "cpu", **kwargs: Any,
    ) -> None:
        super().__init__()
        # Core 0.16 gives it by the older name.
        hidden_size = hidden_size if normalized_shape is None else normalized_shape
        assert hidden_size is not None
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 7.0, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], None, self.eps).type_as(x) * self.weight


class DotProductAttention(_Base):
    """``transformer_engine.pytorch.DotProductAttention``, causal."""

    def __init__(self, *args: Any, softmax_scale: float | None = None, attn_mask_type: str = "", **kwargs: Any) -> None:
        super().__init__()
        assert attn_mask_type == "causal"
        self.softmax_scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, mask: Any, attn_mask_type: str, **kwargs: Any) -> torch.Tensor:
        assert mask is None and attn_mask_type == "causal"
        key, value = (t.repeat_interleave(query.shape[2] // t.shape[2], dim=2) for t in (key, value))
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class FusedAdam(torch.optim.AdamW):
    """Counts steps as torch does; only its name is Transformer Engine's."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)


class _Unused(torch.nn.Module):
    """Something Megatron names when it is imported and a dense GPT does not use."""


def install() -> None:
    """Put the stand-in where ``import transformer_engine`` finds it. Before Megatron is imported."""
    def module(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        made.__path__ = []
        sys.modules[name] = made
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, made)
        return made

    @contextlib.contextmanager
    def fp8_autocast(enabled: bool = True, **kwargs: Any) -> Any:
        yield

    manager = type("FP8GlobalStateManager", (), {"is_fp8_enabled": staticmethod(lambda: False)})
    tracker = type("CudaRNGStatesTracker", (), {"__init__": lambda self: None})
    top = module("transformer_engine", __version__="2.6.0")
    top.__spec__ = None
    formats = enum.Enum("Format", ["E4M3", "HYBRID"])
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", Format=formats, DelayedScaling=type("DelayedScaling", (), {}))
    names = {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm, "LayerNorm": _Unused,
        "DotProductAttention": DotProductAttention, "GroupedLinear": _Unused, "fp8_autocast": fp8_autocast,
        "LayerNormMLP": _Unused, "TransformerLayer": _Unused, "Fp8Padding": _Unused, "Fp8Unpadding": _Unused,
    }
    module("transformer_engine.pytorch", **names)
    module(
        "transformer_engine.pytorch.fp8", FP8GlobalStateManager=manager, fp8_autocast=fp8_autocast,
        fp8_model_init=fp8_autocast,
    )
    module(
        "transformer_engine.pytorch.distributed", CudaRNGStatesTracker=tracker,
        activation_recompute_forward=contextlib.nullcontext,
    )
    module("transformer_engine.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (), {}))
    module("transformer_engine.pytorch.tensor.float8_tensor", Float8Tensor=type("Float8Tensor", (), {}))
    module("transformer_engine.pytorch.float8_tensor", Float8Tensor=type("Float8Tensor", (), {}))
    module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
    ops = module("transformer_engine.pytorch.ops")

    def anything(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused

    ops.__getattr__ = anything  # type: ignore[method-assign]

"""What Transformer Engine remembers: passes that only look do not touch it, and no program comes in with it."""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_xalign.errors import CheckpointError

_RECIPES = {
    "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling", "Format",
    "_FormatHelper", "MMParams", "QParams",
}
"""Settings that Transformer Engine keeps beside its tensors: classes of ``transformer_engine.common.recipe``."""


@contextmanager
def undisturbed(model_chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put back scales and largest values of delayed FP8 scaling after the block.

    Its kernels note the largest value of everything they quantise, in evaluation mode too, and the next training step
    would scale by what a probe had shown. Weights kept for later micro-batches are forgotten as well: Megatron asks for
    them anew at the first micro-batch of every step.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    firsts: list[tuple[Any, Any]] = []
    for chunk in model_chunks:
        for module in chunk.modules():
            if hasattr(module, "is_first_microbatch"):
                firsts.append((module, module.is_first_microbatch))
            meta = getattr(module, "fp8_meta", None)
            for scaling in (meta or {}).values() if isinstance(meta, dict) else ():
                for name in ("amax_history", "scale", "scale_inv"):
                    value = getattr(scaling, name, None)
                    if isinstance(value, torch.Tensor):
                        kept.append((value, value.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for value, before in kept:
                value.copy_(before)
        for module, first in firsts:
            module.is_first_microbatch = first


def check_extra_state(state: Mapping[str, Any], what: str) -> None:
    """Make sure that Transformer Engine's part of a checkpoint is what it claims to be.

    Its layers keep their FP8 scales as a pickle inside a tensor of bytes (``_extra_state``) and unpickle it themselves
    when they are loaded, whatever it asks for. So it is read here first by a reader that builds tensors, plain values
    and names of settings, and nothing else.

    Args:
        state: values of a model's checkpoint by name, as they are handed to ``load_state_dict``.
        what: the checkpoint, for the message.

    Raises:
        CheckpointError: a pickle asks for something else, or is damaged.
    """
    for name, value in state.items():
        if not name.endswith("_extra_state") or value is None:
            continue
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, io.BytesIO):
            content = value.getvalue()
        else:
            raise CheckpointError(
                f"{what}: {name} is a {type(value).__name__} and not Transformer Engine's tensor of bytes; this "
                "checkpoint is damaged or was not written by a run."
            )
        if not content:
            continue
        try:
            # Old versions of Transformer Engine keep a file of torch.save in place of a pickle.
            if isinstance(value, io.BytesIO):
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            else:
                _Scales(io.BytesIO(content)).load()
        # What unpickling damaged bytes was seen to raise, MemoryError for lengths that were made up.
        except (
            pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
            RuntimeError, MemoryError, OverflowError,
        ) as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{what}: {name} is not Transformer Engine's FP8 state ({why}); it would be unpickled, which can run "
                "any program, so nothing of this checkpoint was loaded. Use an older one, or only its weights (xalign "
                "convert reads no FP8 state)."
            ) from error


class _Scales(pickle.Unpickler):
    """Builds tensors and plain values; in place of settings it builds nothing."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "transformer_engine.common.recipe" and global_name in _RECIPES:
            return _Setting
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _Setting,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            # Bytes of torch.save, which torch would unpickle without asking.
            ("torch.storage", "_load_from_bytes"): _storage_of,
            # What Megatron-Core 0.19 puts in its place, so that pickles made beside it name this one.
            ("megatron.core.safe_globals", "safe_load_from_bytes"): _storage_of,
            ("torch", "Size"): torch.Size,
        }
        if (module_name, global_name) in known:
            return known[module_name, global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it asks for {pid!r}")


class _Setting:
    """Stands for a setting: takes what a pickle gives it and keeps none of it."""

    def __new__(cls, *_: Any, **__: Any) -> _Setting:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _storage_of(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

"""The CPU backend: what Megatron-Core asks of CUDA, answered by the CPU (docs/cpu-backend.md).

Megatron-Core names the CUDA device literally in many places of the dense-GPT path, so its tensor-, pipeline- and
data-parallel code cannot run without a GPU as shipped. ``install`` lets it run over gloo. It is called explicitly,
before ``megatron`` is imported, only where CUDA is absent; on a machine with CUDA nothing is ever patched.

Every patch is one entry of ``PATCHES``: small, named, with the call sites that need it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
WEIGHT_GRADIENT_KERNELS = "fused_weight_gradient_mlp_cuda"
"""The extension of apex that adds a matrix' gradient to the gradient buffer in the product itself."""


@dataclass(frozen=True)
class Patch:
    """One thing Megatron-Core expects of CUDA and the CPU's answer to it."""

    name: str
    """How tests and documentation call it."""
    reason: str
    """Which modules of ``megatron.core`` need it."""
    versions: tuple[str, ...]
    """Minor versions of Megatron-Core that do not train without it; a test holds this to be so."""
    apply: Callable[[], None]
    """Puts it in place for the rest of the process."""


class _NoStream:
    """A CUDA stream on a machine that has none: everything is already done and in order."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> object:
        """No event is needed: the work is already done."""
        return event


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


_NAMES_A_DEVICE = frozenset({torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type})
"""Functions that may name a device other than by ``device=``."""


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA device arguments of torch functions to the CPU while it is active."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Every torch function of a step comes through here, most of them with nothing to rewrite.
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func in _NAMES_A_DEVICE:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
            elif len(args) == 1 and not kwargs:
                # Gradient clipping and the distributed optimizer compare the type's name with torch.cuda.FloatTensor.
                return func(args[0]).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs) if kwargs else func(*args)


def _set(module: object, name: str, value: object) -> None:
    setattr(module, name, value)


def _patch_current_device() -> None:
    _set(torch.cuda, "current_device", lambda: CPU)


# Each replacement is a function object of its own: torch's compiler files torch functions by identity and refuses the
# same one under two names.


def _patch_synchronize() -> None:
    _set(torch.cuda, "synchronize", lambda device=None: None)


def _patch_streams() -> None:
    stream = _NoStream()
    _set(torch.cuda, "current_stream", lambda device=None: stream)
    _set(torch.cuda, "default_stream", lambda device=None: stream)


def _patch_device_arguments() -> None:
    mode = _CudaMeansCpu()
    # Entered for good, as torch.set_default_device does it.
    mode.__enter__()
    run: Callable[..., Any] = vars(torch.autograd)["_engine_run_backward"]

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        # Torch leaves the mode while it runs an overridable function. Tensor.backward is one, and Megatron's own
        # backward functions and recomputed forward passes run inside it.
        with mode:
            return run(*args, **kwargs)

    _set(torch.autograd, "_engine_run_backward", run_backward)


def _patch_rng_state() -> None:
    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    _set(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    _set(torch.cuda, "set_rng_state", lambda new_state, device=None: torch.set_rng_state(new_state))
    _set(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed))
    # Imported here, not above: the patches before this one must be in place first.
    from megatron.core.tensor_parallel import random

    _set(random, "_get_cuda_rng_state", get_state)
    _set(random, "_set_cuda_rng_state", set_state)


def add_weight_gradient(input_MI: torch.Tensor, gradient_MO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """Add the gradient of a matrix to Megatron's gradient buffer in the product itself."""
    if gradient_MO.dtype == main_grad_OI.dtype:
        main_grad_OI.addmm_(gradient_MO.t(), input_MI)
    else:
        main_grad_OI.add_(gradient_MO.t() @ input_MI)


def _patch_weight_gradient() -> None:
    """Let Megatron add weight gradients in the product, for which it asks apex."""
    kernels = types.ModuleType(WEIGHT_GRADIENT_KERNELS, "Stand-in: the kernels of this name are for CUDA.")
    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
        _set(kernels, name, add_weight_gradient)
    sys.modules[WEIGHT_GRADIENT_KERNELS] = kernels


def _patch_gloo_device() -> None:
    """Let all process groups of this process share gloo's device, as gloo has it, where torch gives each its own."""
    from torch.distributed import distributed_c10d as c10d

    gloo: Any = getattr(c10d, "ProcessGroupGloo", None)
    options_of: Any = getattr(gloo, "_Options", None)
    if not hasattr(options_of, "_devices") or not hasattr(options_of, "_threads"):
        return
    devices: list[Any] = []

    class OneDevice(gloo):
        """gloo with the devices of the first group, which torch chose (one, or those of GLOO_SOCKET_IFNAME)."""

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            if not devices:
                super().__init__(store, rank, size, timeout=timeout)
                # Groups that connect when they first speak would wait for one another for ever on one device.
                if os.environ.get("TORCH_GLOO_LAZY_INIT", "0") in ("", "0"):
                    devices.extend(self.options._devices)
                return
            options = options_of()
            options._devices, options._timeout, options._threads = list(devices), timeout, 2 * len(devices)
            super().__init__(store, rank, size, options)

    _set(c10d, "ProcessGroupGloo", OneDevice)


def _patch_paged_stash() -> None:
    """Stand in for a module of mixture-of-experts kernels that imports triton when ``megatron.core`` is imported.

    A fake ``triton`` would be simpler, but torch's own compiler looks for it and breaks on it.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    package = importlib.util.find_spec("megatron")
    places = package.submodule_search_locations or [] if package is not None else []
    if not any((Path(place) / "core/transformer/moe/ops/paged_stash.py").exists() for place in places):
        return
    name = "megatron.core.transformer.moe.ops.paged_stash"
    stub = types.ModuleType(name, "Stand-in: these kernels need triton, which is not installed.")
    for kernel in ("paged_stash_copy_kernel", "paged_stash_pop_kernel"):
        _set(stub, kernel, None)
    _set(stub, "GLOBAL_BLOCK_SIZE", 1024)
    sys.modules[name] = stub


PATCHES: tuple[Patch, ...] = (
    Patch(
        "weight_gradient",
        "tensor_parallel.layers: gradient_accumulation_fusion, which saves a copy and an addition of every matrix' "
        "gradient in every micro-batch. Without it training is slower.",
        (),
        _patch_weight_gradient,
    ),
    Patch(
        "gloo_device",
        "parallel_state makes some twenty process groups, and the thread of a gloo device looks for news every few "
        "milliseconds. Without it they take some 15 ms of CPU a second of every process.",
        (),
        _patch_gloo_device,
    ),
    Patch(
        "paged_stash",
        "0.19: pipeline_parallel.schedules imports transformer.moe.ops.paged_stash, which imports triton; torch's CPU "
        "wheel has none.",
        ("0.19",),
        _patch_paged_stash,
    ),
    Patch(
        "current_device",
        "device= of new tensors in tensor_parallel.mappings and layers, p2p_communication, param_and_grad_buffer, "
        "optimizer and distrib_optimizer.",
        ("0.16", "0.19"),
        _patch_current_device,
    ),
    Patch(
        "synchronize",
        "dist_checkpointing: fully_parallel, filesystem_async and async_utils wait for the device before they write.",
        ("0.16", "0.19"),
        _patch_synchronize,
    ),
    Patch(
        "streams",
        "0.19: param_and_grad_buffer.start_grad_sync asks for the current stream even without overlap; so does DDP "
        "with several optimizer instances.",
        ("0.19",),
        _patch_streams,
    ),
    Patch(
        "device_arguments",
        'literal device="cuda", .cuda(), .to("cuda") and Tensor.type() == "torch.cuda.FloatTensor" in schedules, '
        "clip_grads, optimizer, distrib_optimizer, rotary_pos_embedding, language_module, state_dict_saver.",
        ("0.16", "0.19"),
        _patch_device_arguments,
    ),
    Patch(
        "rng_state",
        "tensor_parallel.random keeps one CUDA generator state per region; here they are states of the CPU generator. "
        "Unpatched, setting one silently does nothing.",
        ("0.16", "0.19"),
        _patch_rng_state,
    ),
)

_installed = False

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt``."""


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next request, where it is glibc.

    By itself it hands every large tensor back to the system and asks for new pages, which the system clears, a few
    hundred times a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # The largest values it takes: blocks up to 32 MiB from the heap, which shrinks only beyond 2 GiB.
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def is_cpu() -> bool:
    """Whether this process trains on the CPU, which is so exactly where CUDA is absent."""
    return not torch.cuda.is_available()


def installed() -> bool:
    """Whether ``install`` has been called in this process."""
    return _installed


def install(without: Collection[str] = ()) -> None:
    """Make Megatron-Core run on the CPU, for the rest of this process; a second call does nothing.

    Call it before anything imports ``megatron.core``, whose newer versions cannot be imported without triton.

    Args:
        without: names of patches to leave out. Only for the tests that show each one to be needed.

    Raises:
        RuntimeError: this machine has CUDA, where nothing must be patched.
        ValueError: ``without`` names no patch.
    """
    global _installed
    unknown = set(without) - {patch.name for patch in PATCHES}
    if unknown:
        raise ValueError(f"no patch is called {', '.join(sorted(unknown))}.")
    if _installed:
        return
    if not is_cpu():
        raise RuntimeError(
            "the CPU backend is not installed where CUDA is there; set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    # True, expected here, and nothing the person running the job can change; each would greet them once per process.
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed. Falling back to Torch Norm",
        "absl.logging is not installed",
        "full scope is deprecated",
        "When using (sequence parallelism|async grad allreduce) it is recommended to set the environment variable",
        "`torch.distributed.[a-z_]*` is deprecated",
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    ):
        warnings.filterwarnings("ignore", message=message)
    _keep_freed_memory()
    for patch in PATCHES:
        if patch.name not in without:
            patch.apply()
    _installed = True

"""How fast a run is, in tokens and in floating-point operations, and how much memory it takes."""

from __future__ import annotations

import resource
from typing import Any

import torch

PEAK_BF16_TFLOPS = {
    "B200": 2250.0, "GB200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "GH200": 989.0, "A100": 312.0,
    # One of the two dies, which is what torch calls a device.
    "MI250X": 191.5, "MI300X": 1307.0,
}
"""Dense bf16 TFLOP/s of a device without sparsity, by a part of its name, from the vendors' data sheets."""


def speed_of(
    tokens_per_second: float, flops_per_token: float | None, num_devices: int, device: torch.device
) -> dict[str, Any]:
    """What a line of metrics says about speed and memory.

    Args:
        tokens_per_second: of the whole job.
        flops_per_token: model FLOPs of a token's forward and backward pass; None if not known.
        num_devices: devices of the job.
        device: this process's.

    Returns:
        ``tokens_per_second``; ``tflops_per_device`` if FLOPs are known; ``mfu``, the share of the device's dense bf16
        peak, if that is known too; ``memory_gib``, the most that this process has held so far (of the device, or of
        main memory where there is none).
    """
    found: dict[str, Any] = {"tokens_per_second": tokens_per_second}
    if flops_per_token is not None:
        found["tflops_per_device"] = tokens_per_second * flops_per_token / num_devices / 1e12
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        peak = peak_tflops(torch.cuda.get_device_name(device))
        if peak is not None and flops_per_token is not None:
            found["mfu"] = found["tflops_per_device"] / peak
    else:
        found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    return found


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name; None if it is not in the table. The longest name that fits wins."""
    fitting = [name for name in PEAK_BF16_TFLOPS if all(word in device_name for word in name.split())]
    return PEAK_BF16_TFLOPS[max(fitting, key=len)] if fitting else None

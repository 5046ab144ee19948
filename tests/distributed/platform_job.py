"""Leaves out one patch of the CPU backend at a time, in forked children, and sees whether Megatron still trains."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def examine() -> dict[str, Any]:
    """Try the CPU backend in forked children, each with a fresh start.

    Returns:
        ``without``: for every patch, and for none (""), the error that training without it ended in, "" if it trained;
        ``arguments``: what CUDA arguments give; ``installing``: what a second and a refused installation do;
        ``faults``: new pages that tensors take; ``loops``: threads of gloo devices of a process that trains.
    """
    warnings.simplefilter("ignore")
    sys.modules["triton"] = None  # type: ignore[assignment]  # as with torch's CPU wheel, which brings none
    from megatron_xalign import platform

    if importlib.metadata.version("megatron-core") < "0.17":
        import megatron.core  # noqa: F401  # once for all children; later versions need the backend for it
    names = ["", *(patch.name for patch in platform.PATCHES)]
    return {
        "without": {name: _in_child(partial(_train_without, name)) for name in names},
        "arguments": json.loads(_in_child(_use_cuda_arguments)),
        "installing": json.loads(_in_child(_install_twice_and_with_cuda)),
        "faults": json.loads(_in_child(_page_faults)),
        "loops": int(_in_child(_loops_of_gloo)),
    }


def _in_child(function: Callable[[], str]) -> str:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a patch left out must not hang the test
        try:
            answer = function()
        except BaseException:
            answer = traceback.format_exc()
        os.write(write_end, answer.encode()[-4000:])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else f"ended with status {status}"


def _train_without(name: str) -> str:
    from megatron_xalign import platform

    platform.install(without=[name] if name else [])
    _train_and_save()
    return ""


def _train_and_save() -> None:
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_xalign import topology
    from megatron_xalign.batch import collate
    from megatron_xalign.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
    from megatron_xalign.training.checkpoint import save_checkpoint
    from megatron_xalign.training.loop import fit
    from megatron_xalign.training.model import build_model
    from megatron_xalign.training.optimizer import build_optimizer

    parallel = ParallelConfig(use_distributed_optimizer=True)
    with topology.start(parallel, seed=1) as ranks, tempfile.TemporaryDirectory() as folder:
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(4)
        with get_cuda_rng_tracker().fork():
            assert not torch.equal(torch.rand(4), inside), "the tracker did not keep its random state"
        model = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2)
        chunks = build_model(
            model, padded_vocab_size=128, seq_length=8, parallel=parallel, params_dtype="bf16", recompute="full",
            ranks=ranks, seed=1,
        )
        optimizer = build_optimizer(
            chunks, OptimizerConfig(lr_warmup_steps=0), parallel=parallel, params_dtype="bf16", train_steps=1
        )
        fit(
            chunks, optimizer, lambda numbers: collate([_sample() for _ in numbers]),
            TrainingConfig(train_steps=1, global_batch_size=2, micro_batch_size=1), ranks,
            metrics_path=Path(folder) / "metrics.jsonl", save=lambda *state: Path(folder), languages=[],
            source_names=[],
        )
        save_checkpoint(
            Path(folder) / "checkpoints", 1, chunks, optimizer.megatron, optimizer.scheduler, ranks,
            {"config": {}, "consumed_samples": 2, "tokenizer_sha256": "", "vocab_size": 100},
        )


def _sample() -> dict[str, Any]:
    tokens = np.arange(8)
    no_language = np.full(8, -1, np.int8)
    return {
        "tokens": tokens, "labels": tokens, "loss_mask": np.ones(8, np.float32), "position_ids": tokens,
        "language_ids": no_language, "label_language_ids": no_language, "source_ids": np.full(8, -1, np.int16),
        "document_ids": np.full(8, -1, np.int32),
    }



def _use_cuda_arguments() -> str:
    """What a program written for CUDA gets once the backend is installed."""
    import torch

    from megatron_xalign import platform

    platform.install()
    seen: dict[str, Any] = {
        "factory": str(torch.zeros(2, device="cuda:0").device),
        "to": str(torch.ones(2).to(torch.device("cuda", 0)).device),
        "cuda": torch.ones(2).cuda().device.type == "cpu",
        "type": torch.ones(2).type(),
        "half": torch.ones(2).half().type(),
        "module": str(next(torch.nn.Linear(2, 2).cuda().parameters()).device),
    }

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            two = torch.full((), 2.0, device="cuda")
            seen["backward"] = str(two.device)
            return two * gradient

    value = torch.ones(3, requires_grad=True)
    Double.apply(value).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [2.0, 2.0, 2.0]
    return json.dumps(seen)


def _loops_of_gloo() -> str:
    """How many threads wait for news of gloo's when all process groups are there, one of them used."""
    import torch

    from megatron_xalign import platform, topology
    from megatron_xalign.config import ParallelConfig

    platform.install()
    with topology.start(ParallelConfig(), seed=1) as ranks:
        assert ranks.sum_over(torch.ones(2), "data").tolist() == [1.0, 1.0]
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return str(names.count("gloo_tcp_loop"))


def _page_faults() -> str:
    """How many new pages 20 tensors of 8 MiB take, one after another, before and after the backend is installed."""
    import resource

    import torch

    from megatron_xalign import platform

    def taken() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.empty(1 << 21).fill_(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The least of three: a system that is short of memory takes pages away, and a heap moves once or twice.
    before = min(taken() for _ in range(3))
    platform.install()
    after = min(taken() for _ in range(3))
    return json.dumps({"before": before, "after": after, "pages": (1 << 23) // resource.getpagesize()})


def _install_twice_and_with_cuda() -> str:
    import torch

    from megatron_xalign import platform

    before, available = torch.cuda.current_device, torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    refusal = ""
    try:
        platform.install()
    except RuntimeError as error:
        refusal = str(error)
    torch.cuda.is_available = available
    untouched = torch.cuda.current_device is before and not platform.installed()
    platform.install()
    patched = torch.cuda.current_device
    platform.install()
    return json.dumps(
        {
            "refusal": refusal, "untouched_after_refusal": untouched,
            "same_after_second_install": patched is not before and torch.cuda.current_device is patched,
        }
    )

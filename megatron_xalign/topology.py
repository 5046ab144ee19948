"""Which tensor-, pipeline-, context- and data-parallel rank this process is; sums and gathers over a named axis."""

from __future__ import annotations

import logging
import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_xalign import platform
from megatron_xalign.config import ParallelConfig
from megatron_xalign.errors import ConfigError, WorkerError

Axis = Literal["tensor", "pipeline", "data", "context", "data_context", "world"]
"""``data_context``: the processes that hold the same weights as this one, each with other tokens of the global batch.
Sums over tokens go over it; without context parallelism it is the same as ``data``."""
Thing = TypeVar("Thing")

log = logging.getLogger(__name__)

_meeting_place: torch._C._distributed_c10d.Store | None = None
"""Where the processes of this job find one another; it lives as long as the process."""
_times_met = 0


@dataclass(frozen=True, kw_only=True)
class LocalPart:
    """This process's part of an array that tensor and pipeline ranks hold in equal, consecutive parts."""

    tensor: torch.Tensor
    """The part."""
    tensor_axis: int | None = None
    """Axis that is divided over tensor-parallel ranks; None if each holds all of it."""
    pipeline_axis: int | None = None
    """Axis that is divided over pipeline stages; None if each holds all of it."""
    of_stage: bool = False
    """Whether this pipeline stage alone has an array of this name, such as the sums of one of its layers."""


ObserverState = tuple[dict[str, Any], dict[str, LocalPart]]
"""What an observer needs to go on from a checkpoint: JSON-able values, the same on every process, and arrays."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others. Collectives must be called by every process of the axis, in the same order."""

    rank: int
    """Number of this process in the whole job."""
    world_size: int
    """Processes of the job: tensor x pipeline x context x data size."""
    tensor_rank: int
    """Which shard of every matrix this process holds."""
    tensor_size: int
    """Processes that share every matrix."""
    pipeline_rank: int
    """Which stage of the pipeline this process is: it holds a block of consecutive layers, or ``virtual_size``."""
    pipeline_size: int
    """Stages of the pipeline."""
    data_rank: int
    """Which share of every global batch this process reads."""
    data_size: int
    """Copies of the model."""
    device: torch.device
    """Where this process computes."""
    context_rank: int = 0
    """Which part of every sequence this process holds; see ``batch.context_chunks``."""
    context_size: int = 1
    """Processes that share every sequence."""
    virtual_size: int = 1
    """Blocks of layers this process holds: block v of stage p is number ``v * pipeline_size + p`` of the model."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding and the first layers."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the last layers and computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    def holds_embedding(self, virtual: int) -> bool:
        """Whether this process's block number ``virtual`` is the model's first."""
        return self.is_first_stage and virtual == 0

    def holds_output(self, virtual: int) -> bool:
        """Whether this process's block number ``virtual`` is the model's last."""
        return self.is_last_stage and virtual == self.virtual_size - 1

    @property
    def data_context_rank(self) -> int:
        """Number of this process among those that hold the same weights; 0 is where sums over all of them are kept."""
        return self.data_rank * self.context_size + self.context_rank

    def size_of(self, axis: Axis) -> int:
        """Processes along an axis."""
        return {
            "tensor": self.tensor_size, "pipeline": self.pipeline_size, "data": self.data_size,
            "context": self.context_size, "data_context": self.data_size * self.context_size, "world": self.world_size,
        }[axis]

    def group_of(self, axis: Axis) -> dist.ProcessGroup | None:
        """The process group of an axis through this process; None means all processes, as in torch."""
        from megatron.core import parallel_state

        if axis == "tensor":
            return parallel_state.get_tensor_model_parallel_group()
        if axis == "pipeline":
            return parallel_state.get_pipeline_model_parallel_group()
        if axis == "data":
            return parallel_state.get_data_parallel_group()
        if axis == "context":
            return parallel_state.get_context_parallel_group()
        if axis == "data_context":
            return parallel_state.get_data_parallel_group(with_context_parallel=True)
        if axis == "world":
            return None
        raise ValueError(f"axis {axis!r} is not one of {', '.join(get_args(Axis))}.")

    def sum_over(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        """The sum of a tensor over all processes of an axis, on each of them; the argument is left as it is."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self.size_of(axis) > 1:
            dist.all_reduce(total, group=self.group_of(axis))
        return total

    def gather_over(self, tensor: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
        """The tensors of all processes of an axis, in rank order, on each of them; shape and dtype must agree."""
        own = tensor.detach().contiguous()
        if self.size_of(axis) == 1:
            return [own.clone()]
        gathered = [torch.empty_like(own) for _ in range(self.size_of(axis))]
        dist.all_gather(gathered, own, group=self.group_of(axis))
        return gathered

    def broadcast_over(self, tensor: torch.Tensor, axis: Axis, source: int) -> torch.Tensor:
        """The tensor of the axis's ``source``-th process, on each of them; shape and dtype must agree."""
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        group = self.group_of(axis)
        if self.size_of(axis) > 1:
            dist.broadcast(copy, src=source if group is None else dist.get_global_rank(group, source), group=group)
        return copy

    def broadcast_object(self, thing: Thing | None, source: int = 0) -> Thing:
        """A small Python object of the process ``source``, on every process of the job.

        It travels pickled, between processes of one job only.
        """
        things: list[Any] = [thing]
        if self.world_size > 1:
            dist.broadcast_object_list(things, src=source)
        return things[0]

    def barrier(self) -> None:
        """Wait until every process of the job is here."""
        if self.world_size > 1:
            dist.barrier()


def alone(device: torch.device) -> Ranks:
    """The only process of its job, for models that do not need Megatron; nothing is started."""
    return Ranks(
        rank=0, world_size=1, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, data_rank=0, data_size=1,
        device=device,
    )


@contextmanager
def start(parallel: ParallelConfig, seed: int) -> Iterator[Ranks]:
    """Join this process to its job, lay the job out and seed it; leave it again at the end of the block.

    Works under ``torchrun`` and, for a job of one process, without. Where CUDA is absent the CPU backend is installed
    and processes talk over gloo; else over NCCL. Call it before anything imports ``megatron.core``.

    Args:
        parallel: tensor, pipeline and context size; what is left of the processes is data-parallel.
        seed: seed of the random states of torch, Megatron, NumPy and Python, not negative.

    Yields:
        This process's place in the job.

    Raises:
        ConfigError: the processes cannot be divided by tensor size x pipeline size x context size.
        WorkerError: the job's port is in use, or another process of the job ended or did not answer in time.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"{world_size} process(es) cannot be divided by parallel.tensor_model_parallel_size={tensor} times "
            f"parallel.pipeline_model_parallel_size={pipeline}"
            + (f" times parallel.context_parallel_size={context}" if context > 1 else "")
            + f"; start a multiple of {parallel.model_parallel_size}, "
            f"for example: torchrun --nproc-per-node {parallel.model_parallel_size} ..."
        )
    if platform.is_cpu():
        platform.install()
    device = platform.CPU if platform.is_cpu() else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join(rank, world_size, device, parallel.distributed_timeout_seconds)

    # Imported late: the CPU backend must be in place first.
    from megatron.core import parallel_state, tensor_parallel

    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=context,
            # Megatron makes a timedelta of it, which takes fractions.
            distributed_timeout_minutes=parallel.distributed_timeout_seconds / 60,
        )
        torch.manual_seed(seed)
        # Nothing here draws from these two; what a user's observer draws should be the same in every run.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        ranks = Ranks(
            rank=rank, world_size=world_size, device=device,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(), tensor_size=tensor,
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(), pipeline_size=pipeline,
            data_rank=parallel_state.get_data_parallel_rank(), data_size=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(), context_size=context,
            virtual_size=parallel.virtual_size,
        )
        log.debug("process %d of %d: %s", rank, world_size, ranks)
        yield ranks
    except (dist.DistError, RuntimeError) as error:
        if world_size > 1 and _lost_a_peer(error):
            raise WorkerError(
                f"process {rank} of {world_size} lost another process of this job, which ended or did not answer "
                f"within parallel.distributed_timeout_seconds={parallel.distributed_timeout_seconds}; the first error "
                f"in the logs of the other processes is the cause. ({str(error).splitlines()[0]})"
            ) from error
        raise
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _join(rank: int, world_size: int, device: torch.device, timeout_seconds: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if world_size == 1:
        # No port is needed to talk to oneself.
        own_store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=own_store, rank=0, world_size=1, timeout=timeout)
        return
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise ConfigError(
            f"WORLD_SIZE={world_size} is set but MASTER_ADDR={address} and MASTER_PORT={port} are not both; start the "
            f"job with torchrun, which sets them all."
        )
    global _meeting_place, _times_met
    try:
        if _meeting_place is None:
            _meeting_place = _find_meeting_place(rank, world_size, address, int(port), timeout)
        _meeting_place.set_timeout(timeout)
        _times_met += 1
        # A second start in the same processes must not read the addresses of the first.
        store = torch._C._distributed_c10d.PrefixStore(f"start-{_times_met}", _meeting_place)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise WorkerError(
                f"port {port} on {address} is in use by another job; choose another with torchrun --master-port PORT, "
                "or torchrun --standalone, which finds a free one."
            ) from error
        raise WorkerError(
            f"process {rank} of {world_size} did not find the others at {address}:{port} within {timeout_seconds} s; "
            f"an earlier error in their logs is the cause. ({str(error).splitlines()[0]})"
        ) from error


def _find_meeting_place(
    rank: int, world_size: int, address: str, port: int, timeout: timedelta
) -> torch._C._distributed_c10d.Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
    # torchrun's agent keeps one store over restarts. torch tells attempts apart by TORCHELASTIC_RESTART_COUNT, which
    # agents of several nodes count differently: one that restarts because another node did leaves it as it is, and
    # their processes would wait for one another in vain. So they agree on a name here.
    store = torch._C._distributed_c10d.TCPStore(address, port, None, False, timeout, multi_tenant=True)
    return torch._C._distributed_c10d.PrefixStore(_agree_on_attempt(store, rank, world_size, timeout), store)


def _agree_on_attempt(
    store: torch._C._distributed_c10d.Store, rank: int, world_size: int, timeout: timedelta
) -> str:
    """A name for this attempt, the same in all living processes and no earlier attempt's."""
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"xalign/here/{rank}", own)
        name = store.get(f"xalign/attempt-of/{own}").decode()
        store.set(f"xalign/{name}/{rank}", "")
        return f"xalign/{name}"
    # Some of those that are here may be of an earlier attempt; only the living answer.
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"processes {sorted(missing)} did not come")
        for other in sorted(missing):
            if store.check([f"xalign/here/{other}"]):
                store.set(f"xalign/attempt-of/{store.get(f'xalign/here/{other}').decode()}", own)
            if store.check([f"xalign/{own}/{other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return f"xalign/{own}"


def _lost_a_peer(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(
        sign in text
        for sign in (
            "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting",
            "timed out after", "gloo/transport", "socket timeout",
        )
    )

"""The states of one process' random generators as a file of a checkpoint: torch's, Megatron's, NumPy's, Python's."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_xalign.errors import CheckpointError
from megatron_xalign.topology import Ranks


def random_state_file(folder: Path, rank: int) -> Path:
    """Where a process' states lie in a checkpoint."""
    return folder / f"random-{rank:05d}.safetensors"


def write_random_state(path: Path, ranks: Ranks) -> None:
    """Write the states of this process' generators, and see them on disk."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tensors = {"torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(ranks.device)
    tensors |= {
        f"megatron.{name}": state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()
    }
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    content = save(
        {name: tensor.clone() for name, tensor in tensors.items()},
        # One entry: safetensors writes several in any order, and equal states are to be equal bytes.
        metadata={
            "generators": json.dumps({
                "numpy": [kind, np.asarray(keys).tolist(), *rest], "python": [version, internal, gauss_next]
            })
        },
    )
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_random_state(path: Path, ranks: Ranks) -> None:
    """Put this process' generators where a file has them.

    Raises:
        CheckpointError: it cannot be read.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    torch.set_rng_state(tensors["torch"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], ranks.device)
    get_cuda_rng_tracker().set_states(
        {name.removeprefix("megatron."): state for name, state in tensors.items() if name.startswith("megatron.")}
    )
    generators = json.loads(metadata["generators"])
    kind, keys, *rest = generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss_next = generators["python"]
    random.setstate((version, tuple(internal), gauss_next))

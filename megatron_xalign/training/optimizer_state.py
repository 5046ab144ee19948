"""The optimizer's state in a checkpoint: the same tensors under the same keys for every optimizer and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_xalign.names import MAIN_WEIGHT


def sharding() -> dict[str, Any]:
    """How Megatron is to cut its state: so that another layout can read it."""
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def only_optimizer(optimizer: Any) -> Any:
    """The one that a dense model has; Megatron may wrap it in a chain of one."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) != 1:
        raise ValueError(f"{len(chained)} chained optimizers; a dense model has one.")
    return chained[0]


def uses_distributed(optimizer: Any) -> bool:
    """Whether it is Megatron's distributed optimizer."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(only_optimizer(optimizer), DistributedOptimizer)


def is_torch_adam(inner: Any) -> bool:
    """Whether steps are counted for each weight, as torch does; fused Adams count them in the parameter group."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def initialize_state(optimizer: Any) -> int:
    """Give every weight the moments and step that the first update would give it; return the updates made so far.

    torch's AdamW makes them at its first update, and Megatron's checkpoints fail on an optimizer without any.
    """
    inner = only_optimizer(optimizer).optimizer
    if not is_torch_adam(inner):
        return max((int(group.get("step", 0)) for group in inner.param_groups), default=0)
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state.setdefault("step", torch.tensor(0.0))
    return max((int(state["step"]) for state in inner.state.values()), default=0)


def set_step(optimizer: Any, step: int) -> None:
    """Give every weight a step counter of its own.

    Megatron's distributed optimizer hands all of them the same tensor on loading, which the next update would then
    advance once for each weight.
    """
    inner = only_optimizer(optimizer).optimizer
    if is_torch_adam(inner):
        for group in inner.param_groups:
            group.pop("step", None)
        for state in inner.state.values():
            state["step"] = torch.tensor(float(step))


def optimizer_state(optimizer: Any, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """Megatron's sharded optimizer state, the same tensors under the same keys for every kind of optimizer."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory

    state: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=sharding())
    inner = state.get("optimizer", state)
    for group in inner["param_groups"]:
        if isinstance(group.get("params"), LocalNonpersistentObject):
            group["params"] = group["params"].unwrap()
    # Groups are what the config says and differ between layouts; the scheduler sets what changes in them.
    inner["param_groups"] = LocalNonpersistentObject(inner["param_groups"])
    if "state" in inner:
        inner["state"].pop("common_step", None)
    if "param_state_sharding_type" in state:
        state["param_state_sharding_type"] = LocalNonpersistentObject(state["param_state_sharding_type"])
    config = only_optimizer(optimizer).config
    single_precision = not (config.bf16 or config.fp16)
    if single_precision and not is_loading:
        for tensors in state.get("param_state", {}).values():
            del tensors["param"]
    for value in nested_values(state):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            value.key = value.key.replace("optimizer.state.fp32_param.", MAIN_WEIGHT)
            if single_precision:
                value.key = value.key.removeprefix(MAIN_WEIGHT)
    return state


@contextmanager
def steps_in_place(optimizer: Any) -> Iterator[None]:
    """Let Megatron's distributed optimizer load into torch's AdamW.

    It copies every entry of AdamW's state from the checkpoint and fails on ``step``, which is stored once and not for
    each weight (0.16.1 and 0.19.2: ``_set_main_param_and_optimizer_states``, KeyError 'step').
    """
    name = "_set_main_param_and_optimizer_states"
    original: Callable[[Any, dict[str, Any]], None] | None = getattr(optimizer, name, None)
    if original is None or not is_torch_adam(optimizer.optimizer):
        yield
        return

    def with_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        original(model_param, {"step": state["step"], **tensors})

    setattr(optimizer, name, with_step)
    try:
        yield
    finally:
        delattr(optimizer, name)

"""The streaming safetensors writer, read back by the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_xalign.convert.stream import Announced, open_stream, plan_shards

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "c": torch.tensor([[0.5]], dtype=torch.float16),
}


def announce(tensors: dict[str, torch.Tensor]) -> list[Announced]:
    return [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def test_the_safetensors_library_reads_what_was_streamed(tmp_path: Path) -> None:
    with open_stream(tmp_path / "x", announce(TENSORS)) as stream:
        for name, tensor in TENSORS.items():
            # Memory order must not matter.
            stream.write(name, [tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor])
    read = load_file(tmp_path / "x")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_a_tensor_out_of_turn_missing_or_too_many_is_a_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"where .*'a'"), open_stream(tmp_path / "x", announce(TENSORS)) as stream:
        stream.write("c", [TENSORS["c"]])
    one = {"a": TENSORS["a"]}
    with pytest.raises(ValueError, match="a was announced but not written"), open_stream(tmp_path / "x", announce(one)):
        pass
    with pytest.raises(ValueError, match="None was announced"), open_stream(tmp_path / "x", announce(one)) as stream:
        stream.write("a", [TENSORS["a"]])
        stream.write("a", [TENSORS["a"]])
    with pytest.raises(ValueError, match="announced twice"), open_stream(tmp_path / "x", announce(one) * 2):
        pass


def test_shards_are_filled_in_order_and_groups_stay_together() -> None:
    groups = [[Announced(f"{i}.{j}", (10,), torch.float32) for j in range(2)] for i in range(5)]  # 80 bytes each
    assert plan_shards(groups, 160) == [[0, 1], [2, 3], [4]]
    assert plan_shards(groups, 1) == [[0], [1], [2], [3], [4]]
    assert plan_shards(groups, 10**9) == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="positive"):
        plan_shards(groups, 0)

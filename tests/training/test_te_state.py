"""Passes that only look leave Transformer Engine's memory as it was, and nothing else than it is loaded.

Modules and settings here are made like its own.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import os
import pickle
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_xalign.errors import CheckpointError
from megatron_xalign.training.te_state import check_extra_state, undisturbed


class Linear(torch.nn.Module):
    """Notes the largest value it sees, as Transformer Engine's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first_microbatch = True
        self.fp8_meta: dict[str, Any] = {
            "scaling_fwd": SimpleNamespace(amax_history=torch.zeros(4, 3), scale=torch.ones(3)), "recipe": "delayed",
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        history = self.fp8_meta["scaling_fwd"].amax_history
        history[0, 0] = torch.maximum(history[0, 0], x.abs().max())
        self.is_first_microbatch = False
        return x


def test_largest_values_and_scales_are_put_back_in_place_even_after_an_error() -> None:
    layer = Linear()
    model = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    history = layer.fp8_meta["scaling_fwd"].amax_history
    history[0, 0] = 2.0
    with undisturbed([model]):
        layer(torch.tensor([7.0]))
        assert history[0, 0] == 7
    assert history[0, 0] == 2 and layer.fp8_meta["scaling_fwd"].amax_history is history
    assert layer.is_first_microbatch is True
    with pytest.raises(RuntimeError, match="stopped"), undisturbed([model]):
        layer(torch.tensor([7.0]))
        raise RuntimeError("stopped")
    assert history[0, 0] == 2


class Program:
    """Makes a pickle that runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class Nested:
    """The same, one pickle further in: inside the bytes of a torch storage."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        inner = io.BytesIO()
        torch.save(Program(self.mark), inner)
        return torch_reads_storage(), (inner.getvalue(),)


def torch_reads_storage() -> Any:
    """torch's function of that name, also where Megatron-Core 0.19 has put a careful one in its place."""
    now = torch.storage._load_from_bytes
    if now.__module__ == "torch.storage":
        return now

    def _load_from_bytes(content: bytes) -> Any:
        return torch.load(io.BytesIO(content), weights_only=False)

    _load_from_bytes.__module__, _load_from_bytes.__qualname__ = "torch.storage", "_load_from_bytes"
    return _load_from_bytes


@pytest.fixture(autouse=True)
def torchs_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles are made as without Megatron-Core 0.19, which another test may have loaded."""
    monkeypatch.setattr(torch.storage, "_load_from_bytes", torch_reads_storage())


def in_bytes(state: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings as ``transformer_engine.common.recipe`` has them."""
    module = types.ModuleType("transformer_engine.common.recipe")
    form = enum.Enum("Format", {"E4M3": "e4m3", "HYBRID": "hybrid"}, module=module.__name__)
    scaling = dataclasses.make_dataclass("DelayedScaling", [("margin", int, 0), ("fp8_format", Any, form.HYBRID)])
    scaling.__module__ = module.__name__
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(Format=form, DelayedScaling=scaling)
    return scaling(margin=1)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> Any:
    """Settings as Megatron-Core has them, and torch as Megatron-Core 0.19 leaves it."""
    extension = types.ModuleType("megatron.core.extensions.transformer_engine")
    scaling = type("TEDelayedScaling", (type(recipe),), {"__module__": extension.__name__})
    extension.__dict__["TEDelayedScaling"] = scaling
    monkeypatch.setitem(sys.modules, extension.__name__, extension)
    safe = types.ModuleType("megatron.core.safe_globals")

    def safe_load_from_bytes(content: bytes) -> Any:
        return torch.load(io.BytesIO(content), weights_only=True)

    safe_load_from_bytes.__module__, safe_load_from_bytes.__qualname__ = safe.__name__, "safe_load_from_bytes"
    safe.__dict__["safe_load_from_bytes"] = safe_load_from_bytes
    monkeypatch.setitem(sys.modules, safe.__name__, safe)
    monkeypatch.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
    return scaling(margin=2)


def test_scales_and_settings_of_a_run_pass(recipe: Any) -> None:
    scales = {"recipe": recipe, "scale_fwd": torch.ones(3), "amax_history_fwd": torch.rand(16, 3), "extra": {"n": 4}}
    old = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3)}, old)
    check_extra_state(
        {"a._extra_state": in_bytes(scales), "b._extra_state": None, "c._extra_state": torch.empty(0), "weight": recipe,
         "d._extra_state": old}, "it",
    )


def test_what_megatron_core_leaves_in_scales_passes(core: Any) -> None:
    written = in_bytes({"recipe": core, "scale_fwd": torch.ones(3)})
    assert b"safe_load_from_bytes" in written.numpy().tobytes() and b"TEDelayedScaling" in written.numpy().tobytes()
    check_extra_state({"a._extra_state": written}, "it")


@pytest.mark.parametrize("kind", [Program, Nested])
def test_a_program_in_the_state_is_refused_and_not_run(tmp_path: Path, kind: Any) -> None:
    mark = tmp_path / "it ran"
    hostile = in_bytes({"scale_fwd": torch.ones(3), "extra": kind(mark)})
    with pytest.raises(CheckpointError, match=r"checkpoint x: layers.0._extra_state is not Transformer Engine's"):
        check_extra_state({"layers.0._extra_state": hostile}, "checkpoint x")
    saved = io.BytesIO()
    torch.save(Program(mark), saved)
    with pytest.raises(CheckpointError, match="nothing of this checkpoint was loaded"):
        check_extra_state({"layers.0._extra_state": saved}, "checkpoint x")
    assert not mark.exists()
    # Read as Transformer Engine reads it, it would have run: the test is one.
    pickle.loads(hostile.numpy().tobytes())
    assert mark.exists()


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_damaged_state_is_refused(cut: int) -> None:
    whole = in_bytes({"scale_fwd": torch.ones(3)})
    with pytest.raises(CheckpointError, match="_extra_state"):
        check_extra_state({"a._extra_state": whole[:-cut]}, "it")
    with pytest.raises(CheckpointError, match="int and not"):
        check_extra_state({"a._extra_state": 3}, "it")


def test_names_with_dots_lead_nowhere_else(tmp_path: Path) -> None:
    # Protocol 4 follows dots: recipe.os.system would be found in a module that imports os.
    for name in (b"os.mkdir", b"DelayedScaling.__init__.__globals__"):
        content = pickle.PROTO + b"\x04" + b"".join(
            pickle.SHORT_BINUNICODE + bytes([len(part)]) + part for part in (b"transformer_engine.common.recipe", name)
        ) + pickle.STACK_GLOBAL + pickle.STOP
        with pytest.raises(CheckpointError, match="it asks for"):
            check_extra_state({"a._extra_state": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, "it")

"""The CPU backend: every patch is needed by the installed Megatron-Core, and together they are enough."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

from megatron_xalign import platform

JOB = Path(__file__).with_name("platform_job.py")
CORE = ".".join(importlib.metadata.version("megatron-core").split(".")[:2])


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What ``platform_job.examine`` found."""
    result: dict[str, Any] = run_processes(JOB, "examine")[0]
    return result


@pytest.fixture(scope="module")
def outcomes(seen: dict[str, Any]) -> dict[str, str]:
    """The error in which training ended without each patch; "" where it trained."""
    result: dict[str, str] = seen["without"]
    return result


@pytest.mark.distributed
def test_with_all_patches_a_model_trains_and_is_saved(outcomes: dict[str, str]) -> None:
    assert outcomes[""] == ""


@pytest.mark.distributed
@pytest.mark.parametrize("patch", platform.PATCHES, ids=lambda patch: patch.name)
def test_megatron_does_not_train_without_the_patch(outcomes: dict[str, str], patch: platform.Patch) -> None:
    needed = outcomes[patch.name] != ""
    assert needed == (CORE in patch.versions), (
        f"megatron-core {CORE} trains without {patch.name}: take it out of Patch.versions" if not needed
        else f"megatron-core {CORE} needs {patch.name}: add it to Patch.versions\n{outcomes[patch.name]}"
    )


@pytest.mark.distributed
def test_device_arguments_mean_the_cpu_in_forward_and_backward(seen: dict[str, Any]) -> None:
    assert seen["arguments"] == {
        "factory": "cpu", "to": "cpu", "cuda": True, "backward": "cpu", "type": "torch.cuda.FloatTensor",
        "half": "torch.cuda.HalfTensor", "module": "cpu",
    }


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_of_freed_tensors_is_used_again(seen: dict[str, Any]) -> None:
    faults = seen["faults"]
    # Huge pages may serve many at once; once is enough for all twenty.
    assert faults["after"] <= 1.5 * faults["pages"], faults


@pytest.mark.distributed
def test_all_process_groups_share_one_gloo_device(seen: dict[str, Any]) -> None:
    assert seen["loops"] == 1


@pytest.mark.distributed
def test_the_backend_is_refused_where_cuda_is_there_and_installed_once_elsewhere(seen: dict[str, Any]) -> None:
    assert "CUDA_VISIBLE_DEVICES" in seen["installing"]["refusal"]
    assert seen["installing"]["untouched_after_refusal"] and seen["installing"]["same_after_second_install"]


def test_leaving_out_an_unknown_patch_is_an_error() -> None:
    before = platform.installed()
    with pytest.raises(ValueError, match="no patch is called nonsense"):
        platform.install(without=["nonsense"])
    assert platform.installed() == before

"""What the doctor says of this machine agrees with what this process sees; broken packages do not break it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xalign import doctor
from megatron_xalign.cli import main


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return doctor.examine()


def test_versions_are_those_of_the_installed_packages(found: dict[str, Any]) -> None:
    for name in ("torch", "megatron-core", "numpy"):
        assert found["versions"][name] == importlib.metadata.version(name)
    assert found["versions"]["apex"] is None or "apex" in {d.name for d in importlib.metadata.distributions()}


def test_devices_are_those_torch_sees(found: dict[str, Any]) -> None:
    assert len(found["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found["torch"]["gloo"] is True
    assert found["machine"]["cpus"] == len(os.sched_getaffinity(0))


def test_it_is_json_and_says_where_nothing_is_in_the_way(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    monkeypatch.setattr(doctor, "examine", lambda: found | {"problems": []})
    assert main(argv=["doctor"]) == 0
    assert "nothing is in the way of training here." in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: found | {"problems": ["the well is dry; dig."]})
    assert main(argv=["doctor"]) == 1
    assert "problem: the well is dry; dig." in capsys.readouterr().out


def test_what_is_missing_comes_with_a_way_to_get_it(found: dict[str, Any]) -> None:
    for item in found["optional"]:
        assert item["works"] or (item["how"] and item["error"])
    said = doctor.describe(found)
    assert all(item["name"] in said for item in found["optional"])


def test_a_package_that_kills_its_process_is_named_and_nothing_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    by_name = {item["name"]: item for item in doctor.examine()["optional"]}
    assert by_name["flash-attn"]["works"] is False and "exit code -11" in by_name["flash-attn"]["error"]
    assert "undefined symbol" in by_name["apex"]["error"]


@pytest.mark.parametrize(
    ("capability", "is_rocm", "recipes"),
    [
        ((10, 0), False, ("delayed", "tensorwise", "blockwise", "mxfp8")),
        ((9, 0), False, ("delayed", "tensorwise", "blockwise")), ((8, 9), False, ("delayed", "tensorwise")),
        ((8, 0), False, ()), ((9, 0), True, ()), (None, False, ()),
    ],
)
def test_recipes_by_device(capability: tuple[int, int] | None, is_rocm: bool, recipes: tuple[str, ...]) -> None:
    assert doctor.recipes_for(capability, is_rocm) == recipes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": {"error": "x\nImportError: libtorch"}}, "torch cannot be imported: ImportError: libtorch"),
        ({"versions": {"megatron-core": None, "torch": "2"}}, "megatron-core is not installed"),
        ({"versions": {"megatron-core": "0.12.1", "torch": "2"}}, "megatron-core 0.12.1 is not one of the supported"),
        ({"compilers": {"g++": None, "clang++": None}}, "no C++ compiler"),
        ({"limits": {"open_files": 256, "shared_memory_gib": 2.0, "utc": ""}}, "only 256 files"),
        ({"limits": {"open_files": None, "shared_memory_gib": 0.06, "utc": ""}}, "/dev/shm has 0.06 GiB"),
        ({"limits": {"open_files": None, "shared_memory_gib": 2.0, "processes": 100, "utc": ""}}, "only 100 processes"),
        ({"versions": {"megatron-core": "0.16.1", "torch": "2", "apex": "0.9.10.dev0"}}, "not NVIDIA's apex"),
    ],
)
def test_problems_are_said_with_a_way_out(found: dict[str, Any], change: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in doctor._problems(found | change))


def device(capability: list[int], recipes: list[str]) -> dict[str, Any]:
    return {"name": "GPU", "capability": capability, "memory_gib": 80.0, "fp8_recipes": recipes, "bf16": True}


@pytest.mark.parametrize(
    ("devices", "te", "needs"),
    [
        ([], True, "an NVIDIA GPU of compute capability 8.9 or higher"),
        ([device([8, 0], [])], True, "an NVIDIA GPU of compute capability 8.9 or higher"),
        ([device([9, 0], ["delayed"])], False, "Transformer Engine"), ([device([9, 0], ["delayed"])], True, None),
    ],
)
def test_a_feature_says_what_it_lacks(
    found: dict[str, Any], devices: list[Any], te: bool, needs: str | None
) -> None:
    optional = [item | {"works": te} if item["name"] == "Transformer Engine" else item for item in found["optional"]]
    features = doctor._features(found | {"devices": devices, "optional": optional})
    (fp8,) = [item for item in features if item["name"] == "FP8 by Transformer Engine"]
    assert (fp8["works"], fp8.get("needs")) == (needs is None, needs)


def test_how_to_build_transformer_engine_names_this_python_and_core(found: dict[str, Any]) -> None:
    (item,) = [item for item in found["optional"] if item["name"] == "Transformer Engine"]
    how = item.get("how", "CUDNN_PATH=/site-packages/nvidia/cudnn")
    assert "CUDNN_PATH=/" in how and "{" not in how


def test_a_part_that_is_missing_in_a_package_that_is_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "apex.optimizers" in doctor._try("apex.optimizers", "apex", "speed", "build it")["error"]
    assert doctor._try("not_there.at_all", "x", "speed", "build it")["error"] == "not installed"

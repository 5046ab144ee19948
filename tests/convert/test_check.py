"""The check must pass a right conversion and fail every wrong one; the oracle's logits come from the model itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoint import LENGTH, VOCAB, checkpoint_of, random_transformers_model, run_config
from safetensors.torch import load_file, save_file

from megatron_xalign.convert.check import check
from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.errors import CheckpointError, ConfigError

pytest.importorskip("transformers")

TOKENS = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("convert")
    config = run_config()
    model = random_transformers_model(config)
    return model, to_hf(checkpoint_of(folder / "c", model, config), folder / "hf")


def logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: model(tokens).logits


def test_a_right_conversion_passes_with_the_figures_a_loop_gives(converted: tuple[Any, Path]) -> None:
    model, folder = converted
    report = check("c", folder, TOKENS, logits_of(model))
    report.require()
    assert report.holds and report.max_logit_difference == 0.0 and report.top1_agreement == 1.0
    assert (report.num_sequences, report.num_tokens) == (3, 3 * LENGTH)
    with torch.no_grad():
        oracle = math.exp(sum(model(row[None], labels=row[None]).loss.item() for row in TOKENS) / 3)
    assert report.perplexity_megatron == pytest.approx(oracle, rel=1e-5)
    assert report.perplexity_hugging_face == pytest.approx(oracle, rel=1e-5)
    json.dumps(report.to_json(), allow_nan=False)


def swap_gate_and_up(weights: dict[str, torch.Tensor]) -> None:
    gate, up = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def swap_key_heads(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.k_proj.weight"].roll(12, 0)


def nudge_one_number(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.01


@pytest.mark.parametrize("change", [swap_gate_and_up, swap_key_heads, nudge_one_number])
def test_a_wrong_conversion_fails(converted: tuple[Any, Path], tmp_path: Path, change: Callable[..., None]) -> None:
    model, right = converted
    folder = shutil.copytree(right, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = check("c", folder, TOKENS, logits_of(model))
    assert not report.holds and report.mean_kl > 0
    with pytest.raises(CheckpointError, match="logits differ by up to"):
        report.require()


def test_a_wrong_rotary_base_fails(converted: tuple[Any, Path], tmp_path: Path) -> None:
    model, right = converted
    folder = shutil.copytree(right, tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (folder / "config.json").write_text(json.dumps(settings))
    assert not check("c", folder, TOKENS, logits_of(model)).holds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_type_passes_its_own_tolerance_and_not_that_of_float32(
    converted: tuple[Any, Path], tmp_path: Path, dtype: str
) -> None:
    model, right = converted
    folder = to_hf(right.parent / "c", tmp_path / "hf", dtype=dtype)
    report = check("c", folder, TOKENS, logits_of(model))
    assert report.holds
    assert not check("c", folder, TOKENS, logits_of(model), tolerance=1e-4).holds


def test_logits_that_are_no_numbers_fail(converted: tuple[Any, Path]) -> None:
    model, folder = converted
    report = check("c", folder, TOKENS, lambda tokens: model(tokens).logits * float("nan"))
    assert not report.holds


def test_a_folder_that_lacks_a_tensor_fails_though_transformers_only_warns(
    converted: tuple[Any, Path], tmp_path: Path
) -> None:
    model, right = converted
    folder = shutil.copytree(right, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys model.norm.weight"):
        check("c", folder, TOKENS, logits_of(model))


def test_nothing_to_compare_on_is_an_error(converted: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match="two or more tokens"):
        check("c", converted[1], [[1]], logits_of(converted[0]))

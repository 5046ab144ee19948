"""Checkpoints that Megatron-LM wrote: megatron.core's own save on several processes, ``common.pt`` with its arguments.

Oracle: the random transformers model whose weights they hold.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_checkpoint import VOCAB, random_transformers_model, run_config
from processes import run_processes
from test_to_hf import assert_same_model, load, write_tokenizer

from megatron_xalign import workflows
from megatron_xalign.convert.from_hf import from_hf
from megatron_xalign.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.distributed
pytest.importorskip("transformers")

JOB = Path(__file__).with_name("foreign_job.py")
CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 4, "rope_scaling_factor": 4.0},
    "olmo-tied": {"num_layers": 4, "normalization": "LayerNorm", "untie_embeddings_and_output_weights": False},
    "qwen2-tied": {"num_layers": 4, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "qwen3": {"num_layers": 4, "qk_layernorm": True, "kv_channels": 20},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of Megatron-LM's runs, and the model each of them holds."""
    folder = tmp_path_factory.mktemp("foreign")
    models, imported = {}, {}
    for name, family in CASES.items():
        models[name] = random_transformers_model(run_config(**family))
        models[name].save_pretrained(str(folder / "hf" / name))
        imported[name] = str(from_hf(folder / "hf" / name, folder / "imported" / name))
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    run_processes(
        JOB, "save", {"out": str(folder / "tp2pp2"), "imported": imported, "parallel": layout, "with_optimizer": []}, 4
    )
    layout = {"use_distributed_optimizer": True}
    run_processes(
        JOB, "save",
        {"out": str(folder / "dp2"), "imported": {"llama": imported["llama"]}, "parallel": layout,
         "with_optimizer": ["llama"]}, 2,
    )
    return folder, models


@pytest.mark.parametrize("name", [f"tp2pp2/{name}" for name in CASES] + ["dp2/llama"])
def test_the_model_comes_out_bit_for_bit(saved: Any, tmp_path: Path, name: str) -> None:
    out = workflows.convert_to_hf(saved[0] / name, tmp_path / "hf", dtype=None, stated={"vocab_size": VOCAB})
    assert_same_model(load(out), saved[1][Path(name).name])
    assert "step 7" in (out / "README.md").read_text()


def test_ids_before_padding_come_from_the_tokenizer(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embedding has 256 rows, padding included.*--tokenizer FOLDER"):
        workflows.convert_to_hf(saved[0] / "tp2pp2" / "llama", tmp_path / "hf")
    write_tokenizer(tmp_path / "tokenizer")
    out = workflows.convert_to_hf(saved[0] / "tp2pp2" / "llama", tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert_same_model(load(out), saved[1]["llama"])
    assert load(out).config.eos_token_id == 0


def plain(saved: Any, tmp_path: Path, **common: Any) -> Path:
    """The Llama checkpoint with another ``common.pt``."""
    copy = shutil.copytree(saved[0] / "tp2pp2" / "llama", tmp_path / "plain")
    torch.save(common, copy / "iter_0000007" / "common.pt")
    return copy


def test_what_is_not_recorded_must_be_given(saved: Any, tmp_path: Path) -> None:
    source = plain(saved, tmp_path)
    with pytest.raises(ConfigError, match="does not record num_attention_heads, layernorm_epsilon, rotary_base, seq"):
        workflows.convert_to_hf(source, tmp_path / "hf")
    given = {
        "num_attention_heads": 6, "num_query_groups": 2, "layernorm_epsilon": 1e-5, "rotary_base": 5000,
        "rope_scaling_factor": 4.0, "seq_length": 16,
    }
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(given))
    stated = workflows.stated_model(tmp_path / "model.yaml", vocab_size=VOCAB)
    out = workflows.convert_to_hf(source, tmp_path / "hf", stated=stated)
    assert_same_model(load(out), saved[1]["llama"])
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight .* \[4, 120, 72\]; .* \[4, 216, 72\]"):
        workflows.convert_to_hf(source, tmp_path / "hf", stated=stated | {"num_query_groups": 6})
    with pytest.raises(ConfigError, match=r"hidden_size is 96 by --model-config and 72 by"):
        workflows.convert_to_hf(source, tmp_path / "hf", stated=stated | {"hidden_size": 96})
    with pytest.raises(ConfigError, match="unknown setting heads"):
        workflows.convert_to_hf(source, tmp_path / "hf", stated=stated | {"heads": 6})


def test_a_model_without_counterpart_is_refused_by_its_recorded_setting(saved: Any, tmp_path: Path) -> None:
    import argparse

    source = plain(saved, tmp_path, args=argparse.Namespace(num_layers=4, rotary_interleaved=True))
    with pytest.raises(CheckpointError, match="rotary_interleaved=True"):
        workflows.convert_to_hf(source, tmp_path / "hf", stated={"vocab_size": VOCAB})


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_program_in_common_pt_is_refused_by_name_and_does_not_run(saved: Any, tmp_path: Path) -> None:
    source = plain(saved, tmp_path, args=Bomb(tmp_path / "ran"))
    for work in (
        lambda: workflows.convert_to_hf(source, tmp_path / "hf", stated={"vocab_size": VOCAB}),
        lambda: workflows.check_hf(source, saved[0] / "hf" / "llama", stated={"vocab_size": VOCAB}),
    ):
        with pytest.raises(CheckpointError, match=r"common.pt.*asks for posix.mkdir"):
            work()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "hf").exists()


def test_a_flipped_bit_among_the_numbers_is_found(saved: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(saved[0] / "tp2pp2" / "llama", tmp_path / "flipped")
    file = max((copy / "iter_0000007").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"distcp .* is damaged"):
        workflows.convert_to_hf(copy, tmp_path / "hf", stated={"vocab_size": VOCAB})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flipped"]


@pytest.mark.parametrize("name", ["llama", "olmo-tied"])
def test_check_runs_megatrons_model_whole_and_layer_by_layer(saved: Any, tmp_path: Path, name: str) -> None:
    source, stated = saved[0] / "tp2pp2" / name, {"vocab_size": VOCAB}
    reports = [
        workflows.check_hf(source, saved[0] / "hf" / name, stated=stated, record=False, layer_by_layer=layered)
        for layered in (False, True)
    ]
    for report in reports:
        assert report["holds"] and report["max_logit_difference"] < 1e-4 and report["first_difference"] is None
        assert len(report["state_differences"]) == 1 + 3 * 4
    assert reports[0]["perplexity_megatron"] == pytest.approx(reports[1]["perplexity_megatron"], rel=1e-6)
    assert list(reports[0]["state_differences"]) == list(reports[1]["state_differences"])


def test_an_unfinished_or_older_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="older format"):
        workflows.convert_to_hf(tmp_path, tmp_path / "hf")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match="which is no iteration"):
        workflows.convert_to_hf(tmp_path, tmp_path / "hf")

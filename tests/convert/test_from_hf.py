"""Hugging Face folders become checkpoints and come back bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoint import PADDED, VOCAB, megatron_tensors, random_transformers_model, run_config
from safetensors.torch import load_file, save_file
from test_to_hf import FAMILIES, assert_same_model, load

from megatron_xalign.convert.from_hf import from_hf
from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.formats.checkpoint_folder import check_whole

pytest.importorskip("transformers")


def saved(folder: Path, family: dict[str, Any], **how: Any) -> Any:
    model = random_transformers_model(run_config(**family))
    model.save_pretrained(str(folder), **how)
    return model


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_there_and_back_is_the_same_model_bit_for_bit(tmp_path: Path, family: dict[str, Any]) -> None:
    model = saved(tmp_path / "hf", family)
    checkpoint = from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert check_whole(checkpoint)["extra"]["vocab_size"] == VOCAB
    back = to_hf(checkpoint, tmp_path / "back")
    assert_same_model(load(back), model)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tensors_lie_as_plain_loops_arrange_them(tmp_path: Path, family: dict[str, Any]) -> None:
    model = saved(tmp_path / "hf", family)
    reader = CheckpointReader(from_hf(tmp_path / "hf", tmp_path / "checkpoint"))
    expected = megatron_tensors(model, run_config(**family).model)
    # The oracle pads with sevens, the converter with zeros.
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in expected:
            expected[name][VOCAB:] = 0
            assert len(expected[name]) == PADDED
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.tensor(name), tensor), name


def test_mistral_stays_mistral(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    settings = transformers.MistralConfig(
        vocab_size=VOCAB, hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=16, sliding_window=None, head_dim=12, bos_token_id=None,
        eos_token_id=0, pad_token_id=None,
    )
    model = transformers.MistralForCausalLM(settings).eval()
    model.save_pretrained(str(tmp_path / "hf"))
    back = to_hf(from_hf(tmp_path / "hf", tmp_path / "checkpoint"), tmp_path / "back")
    assert_same_model(load(back), model)


def test_many_files_and_half_precision(tmp_path: Path) -> None:
    model = random_transformers_model(run_config()).to(torch.bfloat16)
    model.save_pretrained(str(tmp_path / "hf"), max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    reader = CheckpointReader(from_hf(tmp_path / "hf", tmp_path / "checkpoint"))
    assert all(reader.dtype(name) == torch.bfloat16 for name in reader.names())
    wide = CheckpointReader(from_hf(tmp_path / "hf", tmp_path / "wide", dtype="float32"))
    for name in reader.names():
        assert torch.equal(wide.tensor(name), reader.tensor(name).float())


JOB = """
import sys, torch
from transformers import AutoModelForCausalLM
from megatron_xalign.training.inference import load_for_inference
with load_for_inference(sys.argv[1]) as logits:
    tokens = torch.randint(0, {vocab}, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(sys.argv[2], local_files_only=True).eval()(tokens).logits
    print(float((logits(tokens) - theirs).abs().max()), float(theirs.std()))
"""


@pytest.mark.parametrize("family", [{}, FAMILIES[2], {"add_qkv_bias": True}, {"qk_layernorm": True, "kv_channels": 20},
                                    {"rope_scaling_factor": 4.0}], ids=str)
def test_megatron_computes_the_logits_of_the_folder(tmp_path: Path, family: dict[str, Any]) -> None:
    saved(tmp_path / "hf", family)
    checkpoint = from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-c", JOB.format(vocab=VOCAB), str(checkpoint), str(tmp_path / "hf")], capture_output=True,
        text=True, timeout=240, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    difference, deviation = map(float, done.stdout.split()[-2:])
    assert deviation > 0.1
    assert difference < 2e-5 * max(deviation, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "hf", {})
    return tmp_path / "hf"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"), ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"), ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type llama3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}}, "rotary positions of"),
    ],
)
def test_a_setting_without_counterpart_is_refused_by_name(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        from_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_unknown_and_misshapen_tensors_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    norm, gate = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.gate_proj.weight"
    for changed, said in (
        ({name: value for name, value in whole.items() if name != norm}, f"holds no {norm}"),
        (whole | {"model.layers.0.adapter.weight": torch.ones(2)}, "holds model.layers.0.adapter.weight"),
        (whole | {gate: whole[gate][:-1].clone()}, rf"{gate} .* has shape \[99, 72\]"),
        (whole | {gate: torch.full_like(whole[gate], torch.nan)}, f"{gate} .* not finite"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            from_hf(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damaged_pickled_and_foreign_files_are_refused(folder: Path, tmp_path: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        from_hf(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()

    class Boom:
        def __reduce__(self) -> Any:
            return Path(tmp_path / "ran").touch, ()

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(CheckpointError, match="pickled weights"):
        from_hf(folder, tmp_path / "out")
    outside = {"weight_map": {"model.norm.weight": "../../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(outside), encoding="utf-8")
    (tmp_path.parent / "outside.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a file inside the folder"):
        from_hf(folder, tmp_path / "out")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_a_folder_of_something_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is no checkpoint"):
        from_hf(folder, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"

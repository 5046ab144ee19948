"""Conversion of checkpoints made from random transformers models: the same model must come out, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoint import (
    EOD,
    LENGTH,
    VOCAB,
    checkpoint_of,
    megatron_tensors,
    random_transformers_model,
    run_config,
    write_checkpoint,
)

from megatron_xalign.convert.to_hf import parse_size, to_hf
from megatron_xalign.errors import CheckpointError, ConfigError, FormatError

pytest.importorskip("transformers")

OLMO = {"normalization": "LayerNorm"}
TIED = {"untie_embeddings_and_output_weights": False}
QWEN2, QWEN3 = {"add_qkv_bias": True}, {"qk_layernorm": True}
FAMILIES = [
    {}, TIED, OLMO, OLMO | TIED, {"num_query_groups": None}, {"num_query_groups": 1}, QWEN2, QWEN2 | TIED, QWEN3,
    # Heads wider than hidden_size over their number, as Qwen3's are.
    QWEN3 | {"kv_channels": 20}, {"kv_channels": 8}, {"rope_scaling_factor": 4.0, "rotary_base": 500_000},
]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def assert_same_model(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    theirs, ours = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_model_comes_back_bit_for_bit(tmp_path: Path, family: dict[str, Any]) -> None:
    config = run_config(**family)
    model = random_transformers_model(config)
    out = to_hf(checkpoint_of(tmp_path / "step-000002", model, config), tmp_path / "hf")
    assert_same_model(load(out), model)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    config = run_config()
    return random_transformers_model(config), config


def test_the_model_comes_back_from_shards(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    out = to_hf(checkpoint_of(tmp_path / "c", *llama), tmp_path / "hf", max_shard_size="100KB")
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in llama[0].parameters())
    assert max(file.stat().st_size for file in files) < 103_000
    assert_same_model(load(out), llama[0])


def test_layers_saved_one_by_one_and_norms_saved_under_their_own_name_convert_too(
    tmp_path: Path, llama: tuple[Any, Any]
) -> None:
    model, config = llama
    tensors = megatron_tensors(model, config.model)
    tensors["decoder.layers.input_layernorm.weight"] = tensors.pop(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    )
    numbered = {}
    for name, tensor in tensors.items():
        if ".layers." in name:
            numbered |= {name.replace(".layers.", f".layers.{i}."): part for i, part in enumerate(tensor)}
        else:
            numbered[name] = tensor
    # Without the stacking axis, layers look like any other tensor to the writer.
    renamed = {name.replace(".layers.", ".blocks."): tensor for name, tensor in numbered.items()}
    checkpoint = write_checkpoint(tmp_path / "c", renamed, config)
    _rename(checkpoint, ".blocks.", ".layers.")
    assert_same_model(load(to_hf(checkpoint, tmp_path / "hf")), model)


def _rename(checkpoint: Path, old: str, new: str) -> None:
    import pickle
    from dataclasses import replace

    from model_checkpoint import write_manifest

    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata = {k.replace(old, new): v for k, v in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        type(k)(k.fqn.replace(old, new), k.offset): replace(v) for k, v in metadata.storage_data.items()
    }
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(checkpoint, json.loads((checkpoint / "xalign.json").read_text())["extra"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_type_is_plain_rounding(tmp_path: Path, llama: tuple[Any, Any], dtype: str) -> None:
    out = to_hf(checkpoint_of(tmp_path / "c", *llama), tmp_path / "hf", dtype=dtype)
    found, wanted = load(out), getattr(torch, dtype)
    assert found.dtype == wanted
    for name, tensor in llama[0].state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(wanted))


def test_weights_keep_the_type_they_were_trained_in(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    model, config = llama
    tensors = {name: tensor.bfloat16() for name, tensor in megatron_tensors(model, config.model).items()}
    out = to_hf(write_checkpoint(tmp_path / "c", tensors, config), tmp_path / "hf")
    assert load(out).dtype == torch.bfloat16


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    model, config = llama
    tensors = megatron_tensors(model, config.model)
    tensors["decoder.layers.mlp.linear_fc2.weight"][1, 0, 0] = 1e6
    checkpoint = write_checkpoint(tmp_path / "c", tensors, config)
    with pytest.raises(ConfigError, match=r"float16 cannot hold model.layers.1.mlp.down_proj.weight.*1e\+06"):
        to_hf(checkpoint, tmp_path / "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()


def test_a_diverged_model_is_refused(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    model, config = llama
    tensors = megatron_tensors(model, config.model)
    tensors["output_layer.weight"][5, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*not finite"):
        to_hf(write_checkpoint(tmp_path / "c", tensors, config), tmp_path / "hf")


def test_a_missing_tensor_is_named_and_nothing_is_written(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    model, config = llama
    tensors = megatron_tensors(model, config.model)
    del tensors["decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"no decoder.final_layernorm.weight"):
        to_hf(write_checkpoint(tmp_path / "c", tensors, config), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["decoder.layers.self_attention.linear_qkv.bias", "decoder.layers.mlp.router.weight"])
def test_a_tensor_the_class_does_not_have_is_named_and_nothing_is_written(
    tmp_path: Path, llama: tuple[Any, Any], name: str
) -> None:
    model, config = llama
    tensors = megatron_tensors(model, config.model) | {name: torch.ones(3, 120)}
    with pytest.raises(CheckpointError, match=f"holds {name}, which LlamaForCausalLM"):
        to_hf(write_checkpoint(tmp_path / "c", tensors, config), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_shape_that_is_not_the_configs_is_named(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    model, config = llama
    wrong = run_config(ffn_hidden_size=98)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight .* \[3, 200, 72\]; .* \[3, 196, 72\]"):
        to_hf(write_checkpoint(tmp_path / "c", megatron_tensors(model, config.model), wrong), tmp_path / "hf")


def test_fewer_rows_than_the_vocabulary_are_refused(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="256 rows, fewer than the vocabulary's 300"):
        to_hf(checkpoint_of(tmp_path / "c", *llama, vocab_size=300), tmp_path / "hf")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", *llama)
    os.truncate(checkpoint / "__0_0.distcp", 1000)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has 1000 bytes"):
        to_hf(checkpoint, tmp_path / "hf")


def test_a_folder_that_is_no_hugging_face_folder_is_not_replaced(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", *llama)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(ConfigError, match="no Hugging Face folder"):
        to_hf(checkpoint, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    to_hf(checkpoint, tmp_path / "hf")
    to_hf(checkpoint, tmp_path / "hf")


def write_tokenizer(folder: Path) -> str:
    """A folder as ``train_tokenizer`` leaves it, with one word a token; returns the hash of tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": EOD} | {f"w{number}": number for number in range(1, VOCAB)}
    engine = Tokenizer(models.WordLevel(words, unk_token="w1"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    engine.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").write_text(json.dumps({"eod": EOD, "eod_token": "<|endoftext|>"}))
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_the_tokenizer_comes_along_with_end_of_document_as_eos_and_no_bos(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    sha256 = write_tokenizer(tmp_path / "tokenizer")
    config = run_config(tokenizer=str(tmp_path / "tokenizer"))
    model = random_transformers_model(config)
    out = to_hf(checkpoint_of(tmp_path / "c", model, config, tokenizer_sha256=sha256), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert tokenizer.eos_token_id == EOD and tokenizer.bos_token_id is None
    assert tokenizer.model_max_length == LENGTH
    loaded = load(out)
    assert loaded.config.eos_token_id == EOD and loaded.config.bos_token_id is None
    generation = GenerationConfig.from_pretrained(str(out))
    assert generation.eos_token_id == EOD and generation.bos_token_id is None
    written = loaded.generate(torch.tensor([[5, 7]]), max_new_tokens=4, do_sample=False)
    assert written.shape[1] <= 6 and int(written.max()) < VOCAB


def test_another_tokenizer_than_the_runs_is_refused(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    checkpoint = checkpoint_of(tmp_path / "c", *llama, tokenizer_sha256="0" * 64)
    with pytest.raises(FormatError, match="trained with a tokenizer of 0000"):
        to_hf(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(FormatError, match="does not exist"):
        to_hf(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "nowhere")


def test_the_model_card_tells_the_run_and_the_audited_mixture(tmp_path: Path, llama: tuple[Any, Any]) -> None:
    run = tmp_path / "runs" / "tiny"
    checkpoint = checkpoint_of(run / "checkpoints" / "step-000002", *llama)
    source = {
        "name": "eng-fin", "origin": "parallel", "languages": ["eng_Latn", "fin_Latn"], "tokens": 12345, "repeats": 1.5
    }
    (run / "audit.json").write_text(json.dumps({"achieved": {"parallel_fraction": 0.0501}, "sources": [source]}))
    card = (to_hf(checkpoint, tmp_path / "hf") / "README.md").read_text()
    row = "| eng-fin | parallel | eng_Latn, fin_Latn | 12,345 | 1.50 |"
    for fact in ("# tiny, step 2", "LlamaForCausalLM", "5.01%", row):
        assert fact in card
    assert "hidden_size: 72" in (tmp_path / "hf" / "xalign-config.yaml").read_text()


@pytest.mark.parametrize(("text", "number"), [("5GB", 5 * 10**9), ("2 GiB", 2**31), (1000, 1000), ("1.5kb", 1500)])
def test_sizes_are_read_as_transformers_writes_them(text: str | int, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["", "big", "-1", "0", "5 parsecs"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)

"""A Hugging Face model is imported and trained on: the first loss is what transformers computes on those samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from corpus_of_nonsense import LANGUAGES
from xalign_process import ROOT, Xalign

from megatron_xalign.config import RunConfig, read_config
from megatron_xalign.data import build_blend


@pytest.mark.end_to_end
def test_training_goes_on_from_an_imported_model(text: Path, tmp_path: Path, xalign: Xalign) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    # More ids than the tokenizer has, as published models do.
    settings = transformers.Qwen3Config(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=None, initializer_range=0.1,
    )
    model = transformers.Qwen3ForCausalLM(settings).eval()
    model.save_pretrained(str(tmp_path / "hf"))
    said = xalign("convert", "from-hf", tmp_path / "hf", tmp_path / "imported").stdout
    assert "Qwen3ForCausalLM equals" in said
    example = ROOT / "examples" / "laptop_tp2_pp2.yaml"
    chosen = [
        "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4",
        "model.num_query_groups=2", "model.kv_channels=16", "model.qk_layernorm=true", "model.vocab_size=500",
        "model.layernorm_epsilon=1e-6", f"model.rotary_base={int(settings.rope_parameters['rope_theta'])}",
        "model.untie_embeddings_and_output_weights=false", f"training.load_weights={tmp_path / 'imported'}",
        "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1",
        "parallel.sequence_parallel=false", "data.seq_length=32", "training.train_steps=2",
        "training.global_batch_size=4", "training.micro_batch_size=2", "training.log_interval_steps=1",
        "training.save_interval_steps=2", "optimizer.lr_warmup_steps=1", "capture.probe_interval_steps=2",
        "capture.probe_batch_tokens=512", f"data.tokenizer={text}/tokenizer", f"data.probe={text}/corpus/probe.jsonl",
        f"output_dir={tmp_path}/run",
        *(f"data.sources.{i}.prefix={text}/tokens/{name}" for i, name in enumerate([*LANGUAGES, "-".join(LANGUAGES)])),
    ]
    xalign("train", example, "--nproc-per-node", 2, *(part for one in chosen for part in ("--set", one)))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    blend = build_blend(read_config(example, chosen, RunConfig))
    samples = [blend[number] for number in range(4)]
    with torch.no_grad():
        logits = model(torch.stack([torch.from_numpy(sample["tokens"]) for sample in samples])).logits
    labels = torch.stack([torch.from_numpy(sample["labels"]) for sample in samples])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert first["loss"] == pytest.approx(float(expected), abs=2e-5)

"""A checkpoint folder made from a random transformers model, its Megatron tensors arranged by plain loops."""

# G key/value groups, L layers

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch_dist_folder import Chunks, stacked, write_torch_dist

from megatron_xalign.config import DataConfig, ModelConfig, RunConfig
from megatron_xalign.config.tree import to_tree
from megatron_xalign.formats.checkpoint_folder import FORMAT, describe_file

VOCAB, PADDED, LENGTH, EOD = 203, 256, 16, 0
MODEL: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 72, "ffn_hidden_size": 100, "num_attention_heads": 6, "num_query_groups": 2,
    "rotary_base": 5000,
}


def run_config(tokenizer: str = "", **model: Any) -> RunConfig:
    return RunConfig(
        name="tiny", model=ModelConfig(**(MODEL | model)), data=DataConfig(seq_length=LENGTH, tokenizer=tokenizer)
    )


def random_transformers_model(config: RunConfig, seed: int = 0) -> Any:
    import transformers

    model = config.model
    kind = "Olmo" if model.normalization == "LayerNorm" else "Llama"
    kind = "Qwen3" if model.qk_layernorm else "Qwen2" if model.add_qkv_bias else kind
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling_factor:
        rope |= {
            "rope_type": "llama3", "factor": model.rope_scaling_factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }
    torch.manual_seed(seed)
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups, max_position_embeddings=LENGTH, initializer_range=0.2,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights, bos_token_id=None, eos_token_id=EOD,
        pad_token_id=None, rope_parameters=rope,
        **({"rms_norm_eps": model.layernorm_epsilon, "head_dim": model.head_size} if kind != "Olmo" else {}),
    )
    built = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    for name, parameter in built.named_parameters():
        if "norm" in name:  # ones would not show a mix-up
            parameter.data.uniform_(0.5, 1.5)
        if name.endswith("bias"):  # zeros would not
            parameter.data.normal_()
    return built


def megatron_tensors(model: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Megatron's tensors of a transformers model, layers stacked, vocabulary padded with rows of sevens."""
    state, layers = model.state_dict(), range(config.num_layers)
    heads, head = config.num_attention_heads // config.query_groups, config.head_size

    def padded(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, torch.full((PADDED - VOCAB, rows.shape[1]), 7.0)])

    def qkv(layer: int, kind: str = "weight") -> torch.Tensor:
        q, k, v = (state[f"model.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv")
        rows = []
        for group in range(config.query_groups):
            for query in range(heads):
                first = (group * heads + query) * head
                rows += [q[first + d] for d in range(head)]
            rows += [k[group * head + d] for d in range(head)]
            rows += [v[group * head + d] for d in range(head)]
        return torch.stack(rows)

    def each(name: str) -> torch.Tensor:
        return torch.stack([state[f"model.layers.{layer}.{name}.weight"] for layer in layers])

    tensors = {
        "embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"]),
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack([qkv(layer) for layer in layers]),
        "decoder.layers.self_attention.linear_proj.weight": each("self_attn.o_proj"),
        "decoder.layers.mlp.linear_fc1.weight": torch.cat([each("mlp.gate_proj"), each("mlp.up_proj")], dim=1),
        "decoder.layers.mlp.linear_fc2.weight": each("mlp.down_proj"),
    }
    if config.normalization == "RMSNorm":
        tensors["decoder.layers.self_attention.linear_qkv.layer_norm_weight"] = each("input_layernorm")
        tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"] = each("post_attention_layernorm")
        tensors["decoder.final_layernorm.weight"] = state["model.norm.weight"]
    if config.add_qkv_bias:
        tensors["decoder.layers.self_attention.linear_qkv.bias"] = torch.stack([qkv(n, "bias") for n in layers])
    if config.qk_layernorm:
        tensors["decoder.layers.self_attention.q_layernorm.weight"] = each("self_attn.q_norm")
        tensors["decoder.layers.self_attention.k_layernorm.weight"] = each("self_attn.k_norm")
    if config.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = padded(state["lm_head.weight"])
    return tensors


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], config: RunConfig, tokenizer_sha256: str = "", **extra: Any
) -> Path:
    """Write tensors as a job of tensor-parallel size 2 would, with an optimizer tensor beside them."""
    chunked: dict[str, tuple[tuple[int, ...], Chunks]] = {}
    for name, tensor in tensors.items():
        if ".layers." in name:
            chunked[name] = stacked(tensor, 2 if tensor.dim() > 2 else 1, axis=int("fc2" in name or "proj" in name))
        else:
            half = len(tensor) // 2
            chunked[name] = (tuple(tensor.shape), [
                ((start, *[0] * (tensor.dim() - 1)), piece)
                for start, piece in ((0, tensor[:half]), (half, tensor[half:]))
            ])
    chunked["optimizer.state.exp_avg.output_layer.weight"] = ((2,), [((0,), torch.zeros(2))])
    folder.mkdir(parents=True)
    write_torch_dist(folder, chunked)
    write_manifest(folder, {
        "config": to_tree(config), "vocab_size": VOCAB, "tokenizer_sha256": tokenizer_sha256, "consumed_samples": 16,
        **extra,
    })
    return folder


def write_manifest(folder: Path, extra: dict[str, Any]) -> None:
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir()) if path.name != "xalign.json"}
    manifest = {
        "format": FORMAT, "version": 1, "step": 2, "extra": extra, "files": files,
        "versions": {"megatron_core": "0.16.1", "megatron_xalign": "0.1.0"},
    }
    (folder / "xalign.json").write_text(json.dumps(manifest))


def checkpoint_of(folder: Path, model: Any, config: RunConfig, **extra: Any) -> Path:
    return write_checkpoint(folder, megatron_tensors(model, config.model), config, **extra)

"""The table of names and layouts, against transformers' own parameter names and loops written out."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_xalign import names
from megatron_xalign.config import ModelConfig
from megatron_xalign.errors import ConfigError

ODD = {"num_layers": 3, "hidden_size": 72, "ffn_hidden_size": 100, "num_attention_heads": 6, "num_query_groups": 2}


def view(matrix: np.ndarray, rows: names.RowView) -> np.ndarray:
    blocks = matrix.reshape(rows.blocks, rows.width, *matrix.shape[1:])
    return blocks[:, rows.start : rows.stop].reshape(rows.rows, *matrix.shape[1:])


def weight_called(name: str) -> names.Weight:
    return next(weight for weight in names.WEIGHTS if name in weight.hugging_face)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("untied", [True, False])
def test_names_and_shapes_are_those_of_the_transformers_class(normalization: str, untied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = ModelConfig(**ODD, normalization=normalization, untie_embeddings_and_output_weights=untied)
    kind = "Llama" if normalization == "RMSNorm" else "Olmo"
    assert names.architecture(model) == f"{kind}ForCausalLM"
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=203, hidden_size=72, intermediate_size=100, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=not untied,
    )
    with torch.device("meta"):
        oracle = getattr(transformers, f"{kind}ForCausalLM")(settings)
    ours = {}
    for weight in names.weights_of(model):
        columns = names.megatron_shape(weight, model, 256)[1:]
        for layer in range(3) if weight.per_layer else [None]:
            for name, rows in zip(
                names.hugging_face_names(weight, layer), names.row_views(weight, model, 203, 256), strict=True
            ):
                assert name not in ours
                ours[name] = (rows.rows, *columns)
    assert ours == {name: tuple(value.shape) for name, value in oracle.named_parameters()}


def test_each_key_value_group_holds_its_query_heads_its_key_head_and_its_value_head() -> None:
    model, head = ModelConfig(**ODD), 12
    rows = []  # what each row of Megatron's matrix is, written out
    for group in range(2):
        rows += [("q", 3 * group + i, d) for i in range(3) for d in range(head)]
        rows += [("k", group, d) for d in range(head)]
        rows += [("v", group, d) for d in range(head)]
    matrix = np.arange(len(rows))[:, None]
    weight = weight_called("model.layers.{layer}.self_attn.k_proj.weight")
    assert names.megatron_shape(weight, model, 0) == (len(rows), 72)
    for which, heads, cut in zip("qkv", (6, 2, 2), names.row_views(weight, model, 0, 0), strict=True):
        found = [rows[int(i)] for i in view(matrix, cut)[:, 0]]
        assert found == [(which, number, d) for number in range(heads) for d in range(head)]


def test_the_gate_is_the_first_half_of_the_first_linear_layer() -> None:
    gate, up = names.row_views(weight_called("model.layers.{layer}.mlp.gate_proj.weight"), ModelConfig(**ODD), 0, 0)
    matrix = np.arange(200)[:, None]
    assert view(matrix, gate)[:, 0].tolist() == list(range(100))
    assert view(matrix, up)[:, 0].tolist() == list(range(100, 200))
    assert names.gate_half(50) == slice(0, 25)


@pytest.mark.parametrize("weight", names.WEIGHTS, ids=lambda weight: weight.hugging_face[0])
def test_views_of_one_matrix_are_disjoint_and_leave_only_padding(weight: names.Weight) -> None:
    model = ModelConfig(**ODD)
    rows = names.megatron_shape(weight, model, 256)[0]
    cuts = names.row_views(weight, model, 203, 256)
    taken = [int(row) for cut in cuts for row in view(np.arange(rows)[:, None], cut)[:, 0]]
    assert len(taken) == len(set(taken))
    assert sorted(taken) == list(range(203 if weight.layout == "vocab" else rows))


def test_another_epsilon_than_olmos_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"layernorm_epsilon=1e-06.*OlmoForCausalLM"):
        names.architecture(ModelConfig(**ODD, normalization="LayerNorm", layernorm_epsilon=1e-6))
    assert names.architecture(ModelConfig(**ODD, layernorm_epsilon=1e-6)) == "LlamaForCausalLM"

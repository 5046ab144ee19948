"""The same run on every layout: loss, gradient norm and probes agree with one process, and that with Hugging Face."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_processes
from training_job import GLOBAL_BATCH, LANGUAGES, MODEL, OPTIMIZER, SOURCES, STEPS, VOCAB, get_batch, sample

from megatron_xalign.config import ModelConfig, ParallelConfig
from megatron_xalign.training.sizes import stage_parameters

pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("training_job.py")
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True}
TIED = {"untie_embeddings_and_output_weights": False}
OLMO = {"normalization": "LayerNorm", "init_method": "mitchell"}
QWEN2 = {"add_qkv_bias": True}
QWEN3 = {"qk_layernorm": True, "kv_channels": 24}
LLAMA3 = {"rope_scaling_factor": 8.0, "rotary_base": 500_000}
PROBE = [8, 20, 32]

ONE_PROCESS = {
    "one": {"save_weights": True},
    "one probed": {"probe_lengths": PROBE},
    "one tied": {"model": TIED, "save_weights": True},
    "one olmo": {"model": OLMO, "save_weights": True},
    "one qwen2": {"model": QWEN2, "save_weights": True},
    "one qwen3": {"model": QWEN3, "save_weights": True},
    "one llama3": {"model": LLAMA3, "save_weights": True},
    "one bf16": {"params_dtype": "bf16"},
    "one recompute": {"recompute": "full"},
    "one in micro-batches of 8": {"micro_batch_size": 8},
    "one in micro-batches of 1": {"micro_batch_size": 1},
    "one padded": {"padded_vocab_size": 272},
}
TWO_PROCESSES = {
    "tp2": {"parallel": TP2},
    "tp2 sp": {"parallel": TP2 | SP, "probe_lengths": PROBE},
    "tp2 sp recompute": {"parallel": TP2 | SP, "recompute": "full"},
    "tp2 tied": {"parallel": TP2, "model": TIED},
    "tp2 padded": {"parallel": TP2, "padded_vocab_size": 272},
    # The second process holds nothing but padding.
    "tp2 padded by half": {"parallel": TP2, "padded_vocab_size": 512},
    "tp2 olmo": {"parallel": TP2, "model": OLMO},
    "tp2 qwen2": {"parallel": TP2, "model": QWEN2},
    "tp2 qwen3": {"parallel": TP2, "model": QWEN3},
    "tp2 sp qwen3": {"parallel": TP2 | SP, "model": QWEN3},
    "pp2 qwen3": {"parallel": PP2, "model": QWEN3},
    "pp2": {"parallel": PP2},
    "pp2 probed": {"parallel": PP2, "probe_lengths": PROBE},
    "pp2 tied": {"parallel": PP2, "model": TIED},
    "pp2 olmo": {"parallel": PP2, "model": OLMO},
    "dp2": {},
    "dp2 sharded": {"parallel": SHARDED},
    "dp2 sharded bf16": {"parallel": SHARDED, "params_dtype": "bf16"},
}
FOUR_PROCESSES = {
    "tp2 pp2": {"parallel": TP2 | PP2},
    "tp2 pp2 sp tied": {"parallel": TP2 | PP2 | SP, "model": TIED},
    "tp2 dp2 sharded": {"parallel": TP2 | SHARDED},
    "pp2 dp2": {"parallel": PP2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every process of every run returned, by the run's name."""
    results: dict[str, list[dict[str, Any]]] = {}
    for num_processes, scenarios in ((1, ONE_PROCESS), (2, TWO_PROCESSES), (4, FOUR_PROCESSES)):
        arguments = {"folder": str(folder), "scenarios": [{"name": name, **s} for name, s in scenarios.items()]}
        by_rank = run_processes(JOB, "run", arguments, num_processes)
        results |= {name: [result[name] for result in by_rank] for name in scenarios}
    return results


def curve(runs: dict[str, list[dict[str, Any]]], name: str, key: str) -> np.ndarray:
    return np.array([line[key] for line in runs[name][0]["metrics"]])


def test_the_reference_run_learns(runs: dict[str, list[dict[str, Any]]]) -> None:
    loss = curve(runs, "one", "loss")
    assert len(loss) == STEPS
    assert loss[0] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert loss[-1] < loss[0] - 0.1


@pytest.mark.parametrize(
    "name",
    [
        "one recompute", "one in micro-batches of 8", "one in micro-batches of 1", "tp2", "tp2 sp", "tp2 sp recompute",
        "one padded", "tp2 padded", "tp2 padded by half",
        "pp2", "pp2 probed", "dp2", "dp2 sharded", "tp2 pp2", "tp2 dp2 sharded", "pp2 dp2",
    ],
)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    np.testing.assert_allclose(curve(runs, name, "loss"), curve(runs, "one", "loss"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(curve(runs, name, "grad_norm"), curve(runs, "one", "grad_norm"), rtol=2e-5)


@pytest.mark.parametrize("name", ["tp2 tied", "pp2 tied", "tp2 pp2 sp tied"])
def test_tied_embeddings_stay_one_matrix_on_every_layout(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    np.testing.assert_allclose(curve(runs, name, "loss"), curve(runs, "one tied", "loss"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(curve(runs, name, "grad_norm"), curve(runs, "one tied", "grad_norm"), rtol=2e-5)


@pytest.mark.parametrize("name", ["tp2 qwen2", "tp2 qwen3", "tp2 sp qwen3", "pp2 qwen3"])
def test_biases_and_norms_of_heads_do_not_depend_on_the_layout(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    alone = f"one {name.split()[-1]}"
    np.testing.assert_allclose(curve(runs, name, "loss"), curve(runs, alone, "loss"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(curve(runs, name, "grad_norm"), curve(runs, alone, "grad_norm"), rtol=2e-5)


@pytest.mark.parametrize("name", ONE_PROCESS | TWO_PROCESSES | FOUR_PROCESSES)
def test_every_process_holds_as_many_parameters_as_the_arithmetic_says(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    scenario: dict[str, Any] = (ONE_PROCESS | TWO_PROCESSES | FOUR_PROCESSES)[name]
    model = ModelConfig(**MODEL | scenario.get("model", {}))
    for result in runs[name]:
        expected = stage_parameters(
            model, ParallelConfig(**scenario.get("parallel", {})), scenario.get("padded_vocab_size", VOCAB),
            result["pipeline_rank"],
        )
        assert result["num_parameters"] == expected


@pytest.mark.parametrize("name", ["tp2 olmo", "pp2 olmo"])
def test_norms_without_weights_and_olmos_first_weights_do_not_depend_on_the_layout(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    np.testing.assert_allclose(curve(runs, name, "loss"), curve(runs, "one olmo", "loss"), rtol=0, atol=1e-6)


def test_first_weights_of_olmo_have_the_deviations_of_its_code(
    runs: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    assert runs["one olmo"]
    weights = np.load(folder / "one olmo.npz")
    hidden, ffn = MODEL["hidden_size"], MODEL["ffn_hidden_size"]
    # What OLMo's init_weights computes for each; layers are counted from 0 there.
    expected = {"embedding.word_embeddings.weight": hidden**-0.5, "output_layer.weight": hidden**-0.5}
    for layer in range(MODEL["num_layers"]):
        expected |= {
            f"decoder.layers.{layer}.self_attention.linear_qkv.weight": hidden**-0.5,
            f"decoder.layers.{layer}.self_attention.linear_proj.weight": (2 * hidden * (layer + 1)) ** -0.5,
            f"decoder.layers.{layer}.mlp.linear_fc1.weight": hidden**-0.5,
            f"decoder.layers.{layer}.mlp.linear_fc2.weight": (2 * ffn * (layer + 1)) ** -0.5,
        }
    assert set(weights.files) == set(expected)
    for name, deviation in expected.items():
        # 0.9866: what is left of a normal distribution's deviation between -3 and 3 of it. At least 4,096 numbers.
        assert weights[name].std() == pytest.approx(0.9866 * deviation, rel=0.04), name
        assert np.abs(weights[name]).max() <= 3 * deviation * (1 + 1e-6), name


def test_bf16_follows_fp32_and_its_own_layouts(runs: dict[str, list[dict[str, Any]]]) -> None:
    np.testing.assert_allclose(curve(runs, "one bf16", "loss"), curve(runs, "one", "loss"), atol=0.02)
    np.testing.assert_allclose(
        curve(runs, "dp2 sharded bf16", "loss"), curve(runs, "one bf16", "loss"), atol=2e-3
    )


@pytest.mark.parametrize("key", ["loss_by_language", "loss_by_source"])
@pytest.mark.parametrize("name", ["tp2 sp", "pp2", "dp2", "tp2 pp2", "pp2 dp2"])
def test_losses_by_language_and_source_do_not_depend_on_the_layout(
    runs: dict[str, list[dict[str, Any]]], name: str, key: str
) -> None:
    for line, expected in zip(runs[name][0]["metrics"], runs["one"][0]["metrics"], strict=True):
        assert line[key] == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize("pair", [("one", "one probed"), ("pp2", "pp2 probed")])
def test_forward_only_passes_change_no_bit_of_training(
    runs: dict[str, list[dict[str, Any]]], pair: tuple[str, str]
) -> None:
    plain, probed = runs[pair[0]], runs[pair[1]]
    assert [result["weights"] for result in probed] == [result["weights"] for result in plain]
    for key in ("loss", "grad_norm", "lr"):
        assert curve(runs, pair[1], key).tolist() == curve(runs, pair[0], key).tolist()


@pytest.mark.parametrize("name", ["tp2 sp", "pp2 probed"])
def test_forward_only_losses_do_not_depend_on_the_layout(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    expected = runs["one probed"][0]["probe"]
    for result in runs[name]:
        assert (result["probe"] is not None) == result["is_last_stage"]
        if result["is_last_stage"]:
            for losses, wanted in zip(result["probe"], expected, strict=True):
                np.testing.assert_allclose(losses, wanted, atol=2e-6)


def hugging_face_model(weights: dict[str, np.ndarray], family: dict[str, Any], kind: str) -> Any:
    """Hugging Face's own class for a family, with the weights of a Megatron model on one process."""
    import transformers

    model = MODEL | family
    head = model.get("kv_channels") or model["hidden_size"] // model["num_attention_heads"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model["rotary_base"])}
    if "rope_scaling_factor" in model:
        rope |= {
            "rope_type": "llama3", "factor": model["rope_scaling_factor"], "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }
    tied = not model.get("untie_embeddings_and_output_weights", True)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": model["hidden_size"], "intermediate_size": model["ffn_hidden_size"],
        "num_hidden_layers": model["num_layers"], "num_attention_heads": model["num_attention_heads"],
        "num_key_value_heads": model["num_query_groups"], "tie_word_embeddings": tied, "attn_implementation": "eager",
        "rope_parameters": rope,
        # OlmoConfig's default padding token, 1, would get no gradient.
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }
    if kind != "Olmo":
        settings |= {"rms_norm_eps": 1e-5, "head_dim": head}
    built = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    groups, per_group = model["num_query_groups"], model["num_attention_heads"] // model["num_query_groups"]
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "lm_head.weight": weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"],
    }
    if kind != "Olmo":
        state["model.norm.weight"] = weights["decoder.final_layernorm.weight"]
    for layer in range(model["num_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        # Rows of linear_qkv: for each key/value group its query heads, its key head, its value head.
        for tensor in ("weight", "bias") if kind == "Qwen2" else ("weight",):
            stored = weights[f"{ours}self_attention.linear_qkv.{tensor}"]
            qkv = stored.reshape(groups, per_group + 2, head, *stored.shape[1:])
            state |= {
                f"{theirs}self_attn.q_proj.{tensor}": qkv[:, :per_group].reshape(-1, *stored.shape[1:]),
                f"{theirs}self_attn.k_proj.{tensor}": qkv[:, per_group].reshape(-1, *stored.shape[1:]),
                f"{theirs}self_attn.v_proj.{tensor}": qkv[:, per_group + 1].reshape(-1, *stored.shape[1:]),
            }
        gate, up = np.split(weights[ours + "mlp.linear_fc1.weight"], 2)
        state |= {
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
        }
        if kind != "Olmo":
            state[theirs + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
            state[theirs + "post_attention_layernorm.weight"] = weights[ours + "pre_mlp_layernorm.weight"]
        if kind == "Qwen3":
            for x in "qk":
                state[f"{theirs}self_attn.{x}_norm.weight"] = weights[f"{ours}self_attention.{x}_layernorm.weight"]
    built.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()}, strict=True)
    return built


@pytest.mark.parametrize(
    ("name", "family", "kind"),
    [
        ("one", {}, "Llama"), ("one", {}, "Mistral"), ("one tied", TIED, "Llama"), ("one olmo", OLMO, "Olmo"),
        ("one qwen2", QWEN2, "Qwen2"), ("one qwen3", QWEN3, "Qwen3"), ("one llama3", LLAMA3, "Llama"),
    ],
)
def test_plain_torch_training_of_the_hugging_face_model_gives_the_same_numbers(
    runs: dict[str, list[dict[str, Any]]], folder: Path, name: str, family: dict[str, Any], kind: str
) -> None:
    with np.load(folder / f"{name}.npz") as weights:
        model = hugging_face_model(dict(weights), family, kind)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), eps=OPTIMIZER.adam_eps,
    )
    for step, line in enumerate(runs[name][0]["metrics"]):
        if step <= OPTIMIZER.lr_warmup_steps:
            lr = OPTIMIZER.lr * step / OPTIMIZER.lr_warmup_steps
        else:
            done = (step - OPTIMIZER.lr_warmup_steps) / (STEPS - OPTIMIZER.lr_warmup_steps)
            lr = OPTIMIZER.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (OPTIMIZER.lr - OPTIMIZER.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        numbers = list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        batch = get_batch(numbers)
        logits = model(input_ids=batch.tokens).logits
        loss_BS = torch.nn.functional.cross_entropy(logits.mT, batch.labels, reduction="none")
        loss = (loss_BS * batch.loss_mask).sum() / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        assert line["lr"] == pytest.approx(lr)
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert line["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-3)
        assert line["consumed_tokens"] == batch.tokens.numel() * (step + 1)
        assert_split_losses(line, numbers, loss_BS.detach().numpy())


def assert_split_losses(line: dict[str, Any], numbers: list[int], loss_BS: np.ndarray) -> None:
    """Losses by language and source against a loop over tokens."""
    by_language: dict[str, list[float]] = {}
    by_source: dict[str, list[float]] = {}
    for number, losses in zip(numbers, loss_BS, strict=True):
        fields = sample(number)
        for position, loss in enumerate(losses):
            if fields["loss_mask"][position]:
                language = int(fields["label_language_ids"][position])
                if language >= 0:
                    by_language.setdefault(LANGUAGES[language], []).append(float(loss))
                by_source.setdefault(SOURCES[fields["source_ids"][position]], []).append(float(loss))
    assert line["loss_by_language"] == pytest.approx({k: np.mean(v) for k, v in by_language.items()}, abs=5e-5)
    assert line["loss_by_source"] == pytest.approx({k: np.mean(v) for k, v in by_source.items()}, abs=5e-5)

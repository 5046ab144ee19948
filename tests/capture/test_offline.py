"""Models that are not in training: every family of transformers against plain hooks, and both routes on one model."""

# S tokens of a sentence, F ffn width, K languages

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_checkpoint import VOCAB, random_transformers_model, run_config

from megatron_xalign import topology, workflows
from megatron_xalign.analysis.series import analyze_run
from megatron_xalign.batch import CurrentBatch
from megatron_xalign.capture import hugging_face
from megatron_xalign.capture.hook_points import hugging_face_points
from megatron_xalign.capture.offline import Subject, capture_probe
from megatron_xalign.capture.probe import ProbeSentence
from megatron_xalign.convert.from_hf import from_hf
from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.errors import CheckpointError, ConfigError, XAlignError
from megatron_xalign.formats.neuron_stats import NeuronStats, read_neuron_stats

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
LANGUAGES = ("eng_Latn", "fin_Latn")
SMALL = {
    "vocab_size": 71, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": 4}, "Olmo": {}, "Olmo2": {}, "Olmo3": {"sliding_window": 4}, "Qwen2": {},
    "Qwen3": {"head_dim": 6}, "Gemma": {"head_dim": 6}, "Gemma2": {"head_dim": 6, "sliding_window": 4},
    "Gemma3": {"head_dim": 6, "sliding_window": 4}, "GPT2": {}, "GPTNeoX": {},
}


def sentences(vocab_size: int = 71) -> list[ProbeSentence]:
    rng = np.random.default_rng(7)
    return [
        ProbeSentence(f"pair{pair}", language, rng.integers(3, vocab_size, rng.integers(1, 15)), 10 + pair)
        for pair in range(6)
        for language in LANGUAGES
    ]


def random_model(family: str) -> Any:
    torch.manual_seed(5)
    settings = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")(**SMALL | FAMILIES[family])
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(settings)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would not show a mix-up
            parameter.data.uniform_(0.2, 0.9)
    return model.eval()


def captured(model: Any, out: Path, prefix: int | None, probe: list[ProbeSentence], **options: Any) -> NeuronStats:
    current = CurrentBatch()
    subject = Subject(
        name="random", points=hugging_face_points(model), current_batch=current, prefix_token=prefix,
        forward_only=hugging_face.build_forward_only(model, current, torch.device("cpu")), longest=32,
        prefix_is_end_of_document=False, longest_by="max_position_embeddings",
    )
    place = topology.alone(torch.device("cpu"))
    return read_neuron_stats(capture_probe(subject, probe, LANGUAGES, out, place, batch_tokens=60, **options))


def by_hand(mlp: Any, x_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons and gates from the input of an MLP, by what its class is documented to compute."""
    if hasattr(mlp, "gate_proj"):
        gate_SF = mlp.gate_proj(x_SH)
        return mlp.act_fn(gate_SF) * mlp.up_proj(x_SH), gate_SF
    gate_SF = mlp.c_fc(x_SH) if hasattr(mlp, "c_fc") else mlp.dense_h_to_4h(x_SH)
    return mlp.act(gate_SF), gate_SF


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_what_sentences_alone_give(family: str, tmp_path: Path) -> None:
    model, probe, prefix = random_model(family), sentences(), 1
    stats = captured(model, tmp_path, prefix, probe)
    body = model.base_model
    layers = list(body.h if family == "GPT2" else body.layers)
    assert stats.layers == [0, 1, 2] and len(layers) == 3
    inputs: list[torch.Tensor] = []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    gates = np.zeros((2, 3, stats.ffn_hidden_size), np.int64)
    for row, sentence in enumerate(probe):
        inputs.clear()
        tokens = torch.tensor([[prefix, *sentence.tokens]])
        out = model(tokens, output_hidden_states=True, use_cache=False)
        for place in range(3):  # the last of hidden_states is after the final norm
            mean = out.hidden_states[place][0, 1:].double().mean(0)
            np.testing.assert_allclose(stats.probe_residual_mean_DMH[row, place], mean, rtol=1e-4, atol=1e-5)
        for layer, (module, x_SH) in enumerate(zip(layers, inputs, strict=True)):
            act_SF, gate_SF = by_hand(module.mlp, x_SH)
            mean = act_SF[1:].double().mean(0)
            np.testing.assert_allclose(stats.probe_neuron_mean_DLF[row, layer], mean, rtol=1e-4, atol=1e-5)
            gates[LANGUAGES.index(sentence.language), layer] += (gate_SF[1:] > 0).sum(0).numpy()
        log_p = out.logits[0].double().log_softmax(-1)
        nll = -sum(float(log_p[place, token]) for place, token in enumerate(sentence.tokens))
        np.testing.assert_allclose(stats.probe_nll_D[row], nll, rtol=1e-5)
    assert np.abs(stats.probe_gate_positive_KLF - gates).sum() <= 1  # a gate within rounding of zero
    last = layers[-1].register_forward_hook(
        lambda module, args, output: inputs.append(output[0] if isinstance(output, tuple) else output)
    )
    inputs.clear()
    model(torch.tensor([[prefix, *probe[3].tokens]]), use_cache=False)
    last.remove()
    mean = inputs[-1].reshape(-1, 24)[1:].double().mean(0)
    np.testing.assert_allclose(stats.probe_residual_mean_DMH[3, 3], mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_a_token_in_front_the_first_token_counts_and_bears_no_loss(tmp_path: Path) -> None:
    model, probe = random_model("Llama"), [s for s in sentences() if len(s.tokens) > 1]
    stats = captured(model, tmp_path, None, probe, layers=[2])
    assert stats.layers == [2] and stats.probe_neuron_mean_DLF.shape[1:] == (1, 40)
    for row, sentence in enumerate(probe):
        out = model(torch.tensor(sentence.tokens)[None], output_hidden_states=True)
        mean = out.hidden_states[0][0].double().mean(0)
        np.testing.assert_allclose(stats.layer("probe_residual_mean_DMH", -1)[row], mean, rtol=1e-4, atol=1e-6)
        log_p = out.logits[0].double().log_softmax(-1)
        nll = -sum(float(log_p[place, token]) for place, token in enumerate(sentence.tokens[1:]))
        np.testing.assert_allclose(stats.probe_nll_D[row], nll, rtol=1e-5)


def test_what_cannot_be_captured_is_refused_by_name(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(CheckpointError, match="no Hugging Face folder"):
        hugging_face.load_model(tmp_path, cpu)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "auto_map": {"AutoModel": "evil.py"}}')
    with pytest.raises(ConfigError, match=r"'mixtral'.*HOOK_MODULES"):
        hugging_face.load_model(tmp_path, cpu)
    model = random_model("Llama")
    model.save_pretrained(tmp_path / "m")
    weights = next((tmp_path / "m").glob("*.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="pickled and not read"):
        hugging_face.load_model(tmp_path / "m", cpu)
    with pytest.raises(ConfigError, match="layer 3 is to be captured; the model has layers 0 to 2"):
        captured(model, tmp_path / "out", 1, sentences(), layers=[3])
    long = [ProbeSentence("p", "eng_Latn", np.full(32, 5), 9)]
    with pytest.raises(XAlignError, match="max_position_embeddings=32 allows 31"):
        captured(model, tmp_path / "out", 1, long)
    assert not (tmp_path / "out" / "neurons").exists()


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    words = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, VOCAB)}
    engine = Tokenizer(models.WordLevel(words, unk_token="w1"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens(["<|endoftext|>"])
    engine.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").write_text(json.dumps({"eod": 0, "eod_token": "<|endoftext|>"}))


def xalign(*arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XALIGN_PROGRESS": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xalign", *map(str, arguments)], env=environment, capture_output=True,
        text=True, timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["Llama", "Olmo"])
def test_both_routes_give_the_same_numbers_on_a_converted_checkpoint(tmp_path: Path, family: str) -> None:
    """Megatron in one process, in two tensor-parallel ones, and transformers on the converted folder."""
    write_tokenizer(tmp_path / "tokenizer")
    kind = {"normalization": "LayerNorm"} if family == "Olmo" else {}
    random_transformers_model(run_config(**kind)).save_pretrained(tmp_path / "random")
    checkpoint = from_hf(tmp_path / "random", tmp_path / "checkpoint")
    hf = to_hf(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    rng = np.random.default_rng(3)
    probe = tmp_path / "probe.jsonl"
    with probe.open("w") as file:
        for pair in range(5):
            texts = {
                language: " ".join(f"w{n}" for n in rng.integers(1, VOCAB, rng.integers(1, 15)))
                for language in LANGUAGES
            }
            file.write(json.dumps({"id": f"p{pair}", "texts": texts}) + "\n")
    common = ("capture", checkpoint, "--probe", probe, "--tokenizer", tmp_path / "tokenizer")
    xalign(*common, "--out", tmp_path / "one", "--step", 2, "--consumed-tokens", 64)
    xalign(
        *common, "--out", tmp_path / "two", "--step", 2, "--nproc-per-node", 2, "--tensor-model-parallel-size", 2
    )
    workflows.capture(hf, probe, tmp_path / "transformers", step=2)
    one, two, other = (
        read_neuron_stats(tmp_path / name / "neurons" / "step-000002") for name in ("one", "two", "transformers")
    )
    assert (one.index.document_ids, one.index.probe_sha256) == (other.index.document_ids, other.index.probe_sha256)
    assert one.consumed_tokens == 64
    for stats in (two, other):
        for name in ("probe_neuron_mean_DLF", "probe_residual_mean_DMH", "probe_nll_D"):
            expected = getattr(one, name)
            scale = np.abs(expected).mean()
            np.testing.assert_allclose(getattr(stats, name), expected, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_array_equal(stats.probe_tokens_D, one.probe_tokens_D)
        assert np.abs(stats.probe_gate_positive_KLF - one.probe_gate_positive_KLF).sum() <= 2
    results = [analyze_run(tmp_path / name) for name in ("one", "transformers")]
    rows = [{(r.measure, r.layer, r.subject): r.value for r in found.rows} for found in results]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) > 50
    for key in rows[0]:
        if key[0] in ("cosine_gap", "nll_per_token", "retrieval"):
            assert rows[0][key] == pytest.approx(rows[1][key], abs=1e-4), key
    with pytest.raises(ConfigError, match="leave out --tokenizer"):
        workflows.capture(hf, probe, tmp_path / "x", tokenizer=tmp_path)
    assert "step-000002" in json.loads((tmp_path / "one" / "capture.json").read_text())["captures"]

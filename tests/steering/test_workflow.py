"""``xalign steer`` from prompts to report: transformers and Megatron write the same, choice and report are apart."""

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
from safetensors.numpy import load_file

from megatron_xalign import cli, workflows
from megatron_xalign.convert.from_hf import from_hf
from megatron_xalign.errors import ConfigError, CorpusError, FormatError

transformers = pytest.importorskip("transformers")
pytest.importorskip("eld")
ROOT = Path(__file__).resolve().parents[2]
ENGLISH = [f"The {animal} walked along the river and looked at the {thing}." for animal in ("dog", "old cat", "horse")
           for thing in ("boats", "high bridge", "moon")]  # fmt: skip
FINNISH = [f"{animal} kulki joen rantaa ja katseli {thing}." for animal in ("Koira", "Vanha kissa", "Hevonen")
           for thing in ("veneitä", "korkeaa siltaa", "kuuta")]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level tokenizer, prompts and pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    work = tmp_path_factory.mktemp("steer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ENGLISH + FINNISH,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<eod>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=128, initializer_range=0.15, bos_token_id=None,
            eos_token_id=0, pad_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.save_pretrained(str(work / "hf"))
    tokenizer.save(str(work / "hf" / "tokenizer.json"))
    (work / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eod>"}), encoding="utf-8")
    (work / "prompts.txt").write_text("\n".join([*ENGLISH, ENGLISH[0], ""]), encoding="utf-8")
    pairs = [
        json.dumps({"id": str(number), "texts": {"eng_Latn": one, "fin_Latn": other}}, ensure_ascii=False)
        for number, (one, other) in enumerate(zip(ENGLISH, FINNISH, strict=True))
    ]
    (work / "probe.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return work


def arguments(work: Path, model: str, out: str, *more: str) -> list[str]:
    return [
        str(work / model), "--from", "eng_Latn", "--to", "fin_Latn", "--pairs", str(work / "probe.jsonl"), "--prompts",
        str(work / "prompts.txt"), "--out", str(work / out), "--strengths", "0.5,2", "--dev", "3", "--test", "5",
        "--new-tokens", "8", "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def steered(work: Path) -> dict[str, Any]:
    assert cli.main("steer", arguments(work, "hf", "out")) == 0
    report: dict[str, Any] = json.loads((work / "out" / "steering.json").read_text(encoding="utf-8"))
    return report


def texts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_strength_is_chosen_on_other_prompts_than_those_reported(work: Path, steered: dict[str, Any]) -> None:
    lines = texts(work / "out")
    dev, test = ({line["prompt"] for line in lines if line["part"] == part} for part in ("dev", "test"))
    assert (len(dev), len(test)) == (3, 5) and not dev & test
    assert len(lines) == 3 * 3 + 5 * 2
    assert steered["chosen_strength"] in (0.5, 2.0)
    best = max(steered["search"], key=lambda entry: (entry["value"], -entry["strength"]))
    assert best["strength"] == steered["chosen_strength"]
    for name in ("unsteered", "steered"):
        part = steered[name]
        assert 0 <= part["language_rate"] <= 1 and 0 < part["distinct_2"] <= 1 and part["bits_per_byte"] > 0
        assert part["perplexity"] == pytest.approx(np.exp(part["nll_per_token"]))
        assert part["script_share"] is None or 0 <= part["script_share"] <= 1
        assert -1 <= part["context_similarity"] <= 1 and -1 <= part["context_similarity_others"] <= 1
    assert steered["unsteered"]["nll_per_token"] != steered["steered"]["nll_per_token"]


def test_vectors_are_mean_differences_of_block_outputs(work: Path, steered: dict[str, Any]) -> None:
    from megatron_xalign.data.tokenizer import Tokenizer

    vectors = load_file(work / "out" / "vectors.safetensors")["vectors_LH"]
    model = transformers.AutoModelForCausalLM.from_pretrained(str(work / "hf"), local_files_only=True).eval()
    seen: list[torch.Tensor] = []
    # The last of hidden_states is after the final norm; the block's own output is not.
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    tokenizer = Tokenizer.load(work / "hf")
    means = []
    for side in (ENGLISH, FINNISH):
        seen.clear()
        with torch.no_grad():
            for ids in tokenizer.encode(side):
                model(torch.from_numpy(ids.astype(np.int64))[None])
        means.append(torch.stack([hidden.reshape(-1, 32).mean(0) for hidden in seen]).mean(0))
    np.testing.assert_allclose(vectors[1], (means[1] - means[0]).numpy(), atol=1e-5)
    assert steered["vectors"]["pairs"] == 9


def test_context_is_the_cosine_of_pooled_states_of_two_texts(work: Path) -> None:
    from megatron_xalign.steering.models import HfModel
    from megatron_xalign.workflows.steering import context_similarity, middle_states

    model = transformers.AutoModelForCausalLM.from_pretrained(str(work / "hf"), local_files_only=True).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    prompts, made = [[5, 6, 7], [8], [30, 40, 50, 60]], [[9, 10], [11, 12, 13], [14]]
    with torch.no_grad():
        for text in (*prompts, *made):
            model(torch.tensor([text]))
    states = [hidden.reshape(-1, 32).mean(0) for hidden in seen]
    cosines = torch.tensor([[torch.cosine_similarity(a, b, dim=0) for b in states[3:]] for a in states[:3]])
    prompts_DH, made_DH = (middle_states(HfModel(model), texts, 2) for texts in (prompts, made))
    own, others = context_similarity(prompts_DH, made_DH)
    assert own == pytest.approx(float(cosines.diagonal().mean()), abs=1e-6)
    assert others == pytest.approx(float(cosines[~torch.eye(3, dtype=torch.bool)].mean()), abs=1e-6)
    assert context_similarity(prompts_DH[:1], made_DH[:1]) is None


@pytest.fixture(scope="module")
def checkpoint(work: Path) -> Path:
    return from_hf(work / "hf", work / "checkpoint")


def in_its_own_process(verb: str, *words: str) -> dict[str, Any]:
    """What a command prints as JSON; Megatron's model wants a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xalign", verb, *words, "--json"],
        capture_output=True, text=True, timeout=400, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_megatron_says_what_transformers_says(work: Path, checkpoint: Path, steered: dict[str, Any]) -> None:
    theirs = in_its_own_process("steer", *arguments(work, checkpoint.name, "megatron", "--uncached"))
    assert theirs["run_by"] == "MegatronModel"
    assert texts(work / "megatron") == texts(work / "out")
    assert theirs["chosen_strength"] == steered["chosen_strength"]
    assert theirs["steered"]["nll_per_token"] == pytest.approx(steered["steered"]["nll_per_token"], abs=1e-4)


def test_a_checkpoint_writes_with_a_cache_what_megatron_writes_without(
    work: Path, checkpoint: Path, steered: dict[str, Any]
) -> None:
    """Greedily; drawn, the same as the folder it came from."""
    for name, more in (("cached", ()), ("cached-greedy", ("--temperature", "0"))):
        assert cli.main("steer", arguments(work, checkpoint.name, name, *more)) == 0
        report = json.loads((work / name / "steering.json").read_text(encoding="utf-8"))
        assert report["run_by"] == "HfModel"
    assert texts(work / "cached") == texts(work / "out")
    in_its_own_process("steer", *arguments(work, checkpoint.name, "greedy", "--temperature", "0", "--uncached"))
    assert texts(work / "cached-greedy") == texts(work / "greedy")


def test_a_dry_run_writes_nothing_and_a_judge_is_not_asked_unasked(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-prices", "1,2")
    assert cli.main("steer", arguments(work, "hf", "dry", "--dry-run", *judge)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["continuations"] == 2 * 3 + 3 + 2 * 5 and plan["judge"]["requests"] == 10
    assert cli.main("steer", arguments(work, "hf", "dry", *judge)) == 1
    assert "give --yes" in capsys.readouterr().err
    assert not (work / "dry").exists()


def test_what_does_not_fit_is_named_and_nothing_is_written(work: Path) -> None:
    fine: dict[str, Any] = {
        "model": work / "hf", "source": "eng_Latn", "target": "fin_Latn", "prompts": work / "prompts.txt",
        "pairs": work / "probe.jsonl", "num_dev": 3, "num_test": 5, "max_new_tokens": 2,
    }  # fmt: skip
    for changes, kind, said in (
        ({"num_test": 7}, CorpusError, "holds 9 different prompts; 3 to choose .* and 7"),
        ({"target": "xho_Latn"}, ConfigError, "does not know xho_Latn"),
        ({"layers": (0, 2)}, ConfigError, r"layers \[2\] are not of this model"),
        ({"target": "swe_Latn"}, CorpusError, "no pair of eng_Latn and swe_Latn"),
        ({"max_new_tokens": 120}, ConfigError, "more than the model's 128 positions"),
    ):
        with pytest.raises(kind, match=said):
            workflows.steer(workflows.SteerOptions(**fine | changes), work / "bad")
        assert not (work / "bad").exists()
    for changes, said in (
        ({"pairs": None}, "one of them"),
        ({"source": "fin_Latn"}, "both the language"),
        ({"strengths": ()}, "strengths"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            workflows.SteerOptions(**fine | changes)


# --- neurons switched off --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stats(work: Path) -> Path:
    return workflows.capture(work / "hf", work / "probe.jsonl", work / "captured")


@pytest.mark.parametrize("find", ["lape", "average_precision"])
def test_switching_neurons_off_is_zeroing_their_columns(work: Path, stats: Path, find: Any) -> None:
    from megatron_xalign.analysis import neurons
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.neuron_stats import read_neuron_stats

    options = workflows.AblateOptions(model=work / "hf", stats=stats, pairs=work / "probe.jsonl", find=find, count=9)
    report = workflows.ablate(options, work / f"{find}.json")
    read = read_neuron_stats(stats)
    languages = report["languages"]
    if find == "lape":
        chosen_LF = neurons.lape(read.probe_gate_positive_KLF, read.probe_tokens_K).languages_of[1]
    else:
        flat = read.probe_neuron_mean_DLF.reshape(len(read.document_languages), -1)
        scores = neurons.average_precision(flat, np.array(read.document_languages) == languages[1])
        chosen_LF = np.isin(np.arange(96), neurons.top_neurons(scores, 9)).reshape(2, 48)
    assert report["num_neurons"][languages[1]] == chosen_LF.sum()

    def loss(model: Any, side: list[str]) -> float:
        total, count = 0.0, 0
        for ids in Tokenizer.load(work / "hf").encode(side):
            tokens = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits.double(), tokens[1:], reduction="sum"))
            count += len(tokens) - 1
        return total / count

    model = transformers.AutoModelForCausalLM.from_pretrained(str(work / "hf"), local_files_only=True).eval()
    sides = {"eng_Latn": ENGLISH, "fin_Latn": FINNISH}
    before = [loss(model, sides[language]) for language in languages]
    for layer, own_F in zip(model.model.layers, chosen_LF, strict=True):
        layer.mlp.down_proj.weight.data[:, torch.from_numpy(own_F)] = 0
    after = [loss(model, sides[language]) for language in languages]
    np.testing.assert_allclose(report["change"]["language"][1], np.subtract(after, before), atol=1e-5)
    assert json.loads((work / f"{find}.json").read_text(encoding="utf-8")) == report


def test_neurons_of_a_checkpoint_are_switched_off_in_megatrons_model(
    work: Path, checkpoint: Path, stats: Path
) -> None:
    """The same numbers as by transformers, where the test above has a loop for them."""
    words = ["--stats", str(stats), "--pairs", str(work / "probe.jsonl"), "--find", "average_precision", "--count", "9"]
    theirs = in_its_own_process("ablate", str(checkpoint), *words, "--out", str(work / "megatron.json"))
    options = workflows.AblateOptions(
        model=work / "hf", stats=stats, pairs=work / "probe.jsonl", find="average_precision", count=9
    )
    ours = workflows.ablate(options, work / "again.json")
    assert theirs["num_neurons"] == ours["num_neurons"]
    np.testing.assert_allclose(theirs["change"]["language"], ours["change"]["language"], atol=1e-5)
    np.testing.assert_allclose(theirs["change"]["random"], ours["change"]["random"], atol=1e-5)


def test_neurons_of_another_model_are_refused(work: Path, stats: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(str(work / "hf"), local_files_only=True)
    config.intermediate_size = 40
    transformers.LlamaForCausalLM(config).save_pretrained(str(work / "narrow"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "narrow" / name).write_bytes((work / "hf" / name).read_bytes())
    options = workflows.AblateOptions(model=work / "narrow", stats=stats, pairs=work / "probe.jsonl")
    with pytest.raises(FormatError, match="2 layers of 48 neurons, and the model has 2 of 40"):
        workflows.ablate(options, work / "bad.json")
    greedy = workflows.AblateOptions(
        model=work / "hf", stats=stats, pairs=work / "probe.jsonl", find="average_precision", count=90
    )
    with pytest.raises(ConfigError, match="smaller count"):
        workflows.ablate(greedy, work / "bad.json")
    assert not (work / "bad.json").exists()

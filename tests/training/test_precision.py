"""What each precision means in Megatron's words, and what is refused, with devices that are not there."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import ConfigError
from megatron_xalign.training import precision
from megatron_xalign.training.backends import Found, choose, look
from megatron_xalign.training.precision import Device, check, is_bf16_layer

H100, B200 = Device("nvidia", "NVIDIA H100", (9, 0)), Device("nvidia", "NVIDIA B200", (10, 0))
L4, A100, V100 = (
    Device("nvidia", "NVIDIA L4", (8, 9)), Device("nvidia", "NVIDIA A100", (8, 0)), Device("nvidia", "V100", (7, 0))
)
MI250, CPU = Device("amd", "AMD Instinct MI250X"), Device("cpu")
STUDY = {
    "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 5504, "num_attention_heads": 16,
    "normalization": "LayerNorm",
}


def configured(fp8: dict[str, Any] | str | None = None, **groups: Any) -> RunConfig:
    chosen = fp8 if isinstance(fp8, str) else {"fp8": fp8 or {}}
    return from_tree(RunConfig, {"model": STUDY, "data": {"seq_length": 2048}, "precision": chosen, **groups})


def refused(config: RunConfig, device: Device = H100, implementation: Any = "te", te: str | None = "2.9.0") -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, implementation, device, te)
    return str(caught.value)


def test_the_fields_are_named_for_megatron_and_nothing_is_left_out() -> None:
    # tests/distributed/test_precision.py builds Megatron's own configs from them.
    asked = configured({"recipe": "delayed", "format": "e4m3", "margin": 2, "amax_history_len": 8}).fp8
    assert asked is not None
    assert precision.megatron_settings(asked) == {
        "fp8": "e4m3", "fp8_recipe": "delayed", "fp8_margin": 2, "fp8_amax_history_len": 8,
        "fp8_amax_compute_algo": "max", "fp8_param": False, "first_last_layers_bf16": False,
        "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1,
    }
    assert len(dataclasses.fields(asked)) == len(precision.megatron_settings(asked))


def test_without_fp8_megatron_is_told_nothing() -> None:
    assert precision.megatron_settings(None) == precision.data_parallel_settings(None) == {}


@pytest.mark.parametrize(
    ("device", "recipes"),
    [
        (B200, "delayed tensorwise blockwise mxfp8"), (H100, "delayed tensorwise blockwise"),
        (L4, "delayed tensorwise"), (A100, ""), (V100, ""), (MI250, ""), (CPU, ""),
    ],
)
def test_a_recipe_runs_exactly_where_the_device_has_it(device: Device, recipes: str) -> None:
    assert device.recipes == tuple(recipes.split())
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        config = configured({"recipe": recipe})
        if recipe in device.recipes:
            check(config, "te", device, "2.9.0")
        else:
            assert ("precision" in (said := refused(config, device)) and device.name in said) or device.kind == "cpu"


@pytest.mark.parametrize(
    ("config", "device", "said"),
    [
        (configured({"recipe": "mxfp8"}), H100, "capability 10.0; NVIDIA H100 has 9.0, it can run delayed, tensorwise"),
        (configured(), A100, "NVIDIA A100 has 8.0, it has no FP8. Use precision: bf16"),
        (configured(), MI250, "AMD Instinct MI250X is AMD's, for which Megatron-Core has no FP8"),
        (configured(), CPU, "or backend.layers=local, which tries this project's own FP8 arithmetic on the CPU"),
        (configured("bf16"), V100, "precision=bf16 needs compute capability 8.0; V100 has 7.0. Use precision: fp16"),
        (configured(), V100, "needs compute capability 8.0; V100 has 7.0. Use precision: fp16"),
        (configured({"recipe": "delayed", "first_last_layers_bf16": True}), H100, "does not go with recipe=delayed"),
        (
            configured(
                {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 13},
                parallel={"pipeline_model_parallel_size": 2},
            ),
            H100, "num_layers_at_end_in_bf16=13 is more than the 12 layers of a pipeline stage",
        ),
        (
            configured({
                "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 12, "num_layers_at_end_in_bf16": 12
            }),
            H100, "leaves none in FP8",
        ),
        (configured({"param_gather": True}), H100, "needs parallel.use_distributed_optimizer=true"),
        (
            configured({"recipe": "mxfp8", "param_gather": True}, parallel={"use_distributed_optimizer": True}),
            B200, "is not supported here",
        ),
        # 5504 / 4 = 1376, ten blocks of 128 and three quarters.
        (
            configured({"recipe": "blockwise"}, parallel={"tensor_model_parallel_size": 4}), H100,
            "model.ffn_hidden_size, 5504 / tensor_model_parallel_size=4, is not a multiple of 128",
        ),
        (
            configured({}, model=STUDY | {"ffn_hidden_size": 5500}), H100,
            "works on blocks of 16; model.ffn_hidden_size, 5500, is not a multiple of 16",
        ),
        (
            configured({"recipe": "mxfp8"}, data={"seq_length": 2000}, training={"micro_batch_size": 1}), B200,
            "the tokens of a micro-batch on one rank (data.seq_length x training.micro_batch_size), 2000",
        ),
        (
            configured(
                {}, data={"seq_length": 40}, training={"micro_batch_size": 2, "global_batch_size": 4},
                parallel={"tensor_model_parallel_size": 4, "sequence_parallel": True},
            ),
            H100, "80 / 4, is not a multiple of 16",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(config: RunConfig, device: Device, said: str) -> None:
    assert said in refused(config, device)


def test_transformer_engine_must_be_there_and_new_enough() -> None:
    assert "silently train in bf16" in refused(configured(), te=None)
    assert "needs Transformer Engine 2.3.0 or newer; 2.1.0+cu12 is installed" in refused(
        configured({"recipe": "blockwise"}), te="2.1.0+cu12"
    )
    check(configured({"recipe": "blockwise"}), "te", H100, "2.10.0")  # not compared as text


def test_our_own_layers_know_two_recipes_and_run_on_the_cpu() -> None:
    for recipe in precision.OWN_RECIPES:
        check(configured({"recipe": recipe, "first_last_layers_bf16": True}), "own", CPU)
    assert "know delayed and tensorwise only" in refused(configured({"recipe": "blockwise"}), H100, "own")
    gathered = configured({"param_gather": True}, parallel={"use_distributed_optimizer": True})
    assert "weights in FP8 are Transformer Engine's" in refused(gathered, CPU, "own")


def test_a_quantised_record_needs_our_own_fp8() -> None:
    shown = {"capture": {"quantized": True}}
    assert "nothing to show" in refused(configured("bf16", **shown))
    assert "Transformer Engine keeps its copy to itself" in refused(configured({}, **shown))
    check(configured({}, **shown), "own", CPU)


def test_which_layers_stay_in_bf16() -> None:
    fp8 = configured({
        "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1
    }).fp8
    assert fp8 is not None
    assert [layer for layer in range(8) if is_bf16_layer(fp8, layer, 8)] == [0, 1, 7]
    assert not any(is_bf16_layer(dataclasses.replace(fp8, first_last_layers_bf16=False), n, 8) for n in range(8))


def test_lengths_of_probes_are_whole_blocks_on_every_rank() -> None:
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert configured("bf16").length_multiple_of == 1
    assert configured({"recipe": "delayed"}).length_multiple_of == 16
    assert configured({"recipe": "mxfp8"}, parallel=split).length_multiple_of == 64


ALL = {"te": "2.9.0", "flash": "2.8.3", "apex": "0.1"}


@pytest.mark.parametrize(
    ("config", "versions", "chosen"),
    [
        (configured("bf16"), ALL, ("te", "te", "te")),
        (configured("bf16"), {"flash": "2.8.3", "apex": "0.1"}, ("local", "flash", "apex")),
        (configured("fp32"), {"flash": "2.8.3"}, ("local", "sdpa", "torch")),
        (configured("bf16"), {}, ("local", "sdpa", "torch")),
        (configured("bf16", backend={"layers": "local", "attention": "unfused", "optimizer": "apex"}), ALL,
         ("local", "unfused", "apex")),
        (configured("bf16", backend={"layers": "te", "attention": "flash", "optimizer": "torch"}), ALL,
         ("te", "flash", "torch")),
        (configured({"recipe": "delayed"}), ALL, ("te", "te", "te")),
    ],
)
def test_the_fastest_there_is_is_taken_or_what_was_asked(
    config: RunConfig, versions: dict[str, str], chosen: tuple[str, str, str]
) -> None:
    choice = choose(config, Found(H100, versions))
    assert (choice.layers, choice.attention, choice.optimizer) == chosen
    assert all(choice.reasons)
    said = choice.describe()
    assert said.startswith("layers: ") and "attention: " in said and "optimizer: " in said
    assert ("FP8: Transformer Engine's" in said) == (config.fp8 is not None)


@pytest.mark.parametrize(
    ("config", "versions", "said"),
    [
        (configured("bf16", backend={"layers": "te"}), {}, "asks for Transformer Engine, which cannot be used"),
        (configured("bf16", backend={"attention": "flash"}), {}, "undefined symbol"),
        (configured("fp32", backend={"attention": "flash"}), ALL, "computes in bf16 or fp16; precision is fp32"),
        (configured("bf16", backend={"attention": "flash"}, model=STUDY | {"num_attention_heads": 4}), ALL,
         "heads up to 256 wide; the model's are 512"),
        (configured("bf16", backend={"optimizer": "apex"}), {}, "backend.optimizer=apex asks for NVIDIA apex"),
        (configured({}), {}, "needs Transformer Engine, which is not installed"),
        (configured({"param_gather": True}, parallel={"use_distributed_optimizer": True},
                    backend={"optimizer": "torch"}), ALL, "cannot update weights in FP8"),
    ],
)
def test_what_is_asked_for_and_not_there_is_refused(
    config: RunConfig, versions: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(config, Found(H100, versions, {"flash": "undefined symbol: _ZN3c10"}))
    assert said in str(caught.value)


def test_libraries_that_break_on_import_are_as_good_as_absent_and_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: facts)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("transformer_engine", "flash_attn", "apex"):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    # The package called apex on the registry is another one; flash-attn was built for another torch.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "flash_attn.py").write_text("raise ValueError")
    found = look()
    assert found.device == H100
    assert found.problems["te"] == "not installed"
    assert found.problems["flash"] == "ValueError"
    assert "apex.optimizers" in found.problems["apex"]

"""What is proved: each step is a few short runs and one judgement of their numbers, with the bound it is held to.

Nothing here imports torch. A step says what it does and why it is skipped where it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_xalign.training.precision import OWN_RECIPES

Runs = Mapping[str, Mapping[str, Any]]
"""What ``prove.job`` returned for each run of a step, by its name there."""

MINUTES_PER_STEP = 8


@dataclass(frozen=True)
class Machine:
    """What a proof has to run on."""

    gpus: int = 0
    recipes: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    """Which of ``te``, ``flash``, ``apex`` work."""


@dataclass(frozen=True)
class Verdict:
    """How a step came out."""

    passed: bool
    said: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of a step."""

    settings: dict[str, Any]
    processes: int = 1
    on_cpu: bool = False
    resumes: str | None = None
    """The run of this step whose checkpoint in the middle it goes on from."""
    exports: str | None = None
    """The run of this step whose last checkpoint is exported and compared; it then trains nothing."""


@dataclass(frozen=True)
class Step:
    """One claim and how it is tried."""

    name: str
    claim: str
    runs: dict[str, Run]
    judge: Callable[[Runs], Verdict]
    skipped: str | None = None
    """Why it cannot run here."""


TINY = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4,
    "make_vocab_size_divisible_by": 128,
}
SMALLEST = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "make_vocab_size_divisible_by": 128,
}
STUDY = {
    "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 5504, "num_attention_heads": 16,
    "normalization": "LayerNorm",
}


def settings(
    model: dict[str, Any], steps: int, *, precision: Any = "bf16", layers: str = "auto", attention: str = "auto",
    recompute: str = "none", parallel: dict[str, Any] | None = None, seq_length: int = 256, micro_batch: int = 4,
    global_batch: int = 8, save_every: int | None = None, **more: Any,
) -> dict[str, Any]:
    """What ``prove.job`` is given."""
    return {
        "config": {
            "seed": 7, "model": model, "precision": precision,
            "backend": {"layers": layers, "attention": attention},
            "parallel": {"distributed_timeout_seconds": 300, **(parallel or {})},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": max(1, min(20, steps // 4))},
            "data": {"seq_length": seq_length},
            "training": {
                "train_steps": steps, "global_batch_size": global_batch, "micro_batch_size": micro_batch,
                "recompute": recompute, "log_interval_steps": 1, "save_interval_steps": save_every or steps,
            },
        },
        "save": save_every is not None, **more,
    }


def steps_for(machine: Machine, cpu: bool) -> list[Step]:
    """The steps of a machine: all of them for GPUs (those it lacks something for are marked skipped), or what can be
    proved without one."""
    return _cpu_steps() if cpu else _gpu_steps(machine)


# Judgements -----------------------------------------------------------------------------------------------------------


def near(
    first: str, second: str, *, at_most: float, tail: int = 20, each: float | None = None
) -> Callable[[Runs], Verdict]:
    """Mean loss of the last steps agrees within ``at_most``, and every step's within ``each``."""

    def judge(runs: Runs) -> Verdict:
        ours, theirs = runs[first]["losses"], runs[second]["losses"]
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        last = abs(sum(ours[-tail:]) - sum(theirs[-tail:])) / min(tail, len(ours))
        fine = last <= at_most and (each is None or largest <= each)
        return Verdict(
            fine, f"loss {ours[-1]:.4f} and {theirs[-1]:.4f} at the end; means of the last steps differ by {last:.2g} "
            f"(allowed {at_most:g}), single steps by up to {largest:.2g}",
            {"first": ours[-1], "second": theirs[-1], "difference": last, "largest": largest, "allowed": at_most},
        )

    return judge


def captured(*names: str, plain: str) -> Callable[[Runs], Verdict]:
    """The recorder's sums are those of a hook on the layer, and listening changes no bit of training."""

    def judge(runs: Runs) -> Verdict:
        exact = all(runs[name]["capture_exact"] for name in names)
        same = runs[names[0]]["losses"] == runs[plain]["losses"] and runs[names[0]]["weights"] == runs[plain]["weights"]
        cost = runs[names[0]]["seconds_per_step"] / runs[plain]["seconds_per_step"] - 1
        return Verdict(
            exact and same,
            f"sums {'equal' if exact else 'DIFFER'}; training {'the same to the bit' if same else 'DIFFERS'} with and "
            f"without; time of a step {cost:+.1%}", {"exact": exact, "same": same, "cost": cost},
        )

    return judge


def resumed(whole: str, rest: str) -> Callable[[Runs], Verdict]:
    """A resumed run repeats the rest of an uninterrupted one."""

    def judge(runs: Runs) -> Verdict:
        ours, theirs = runs[rest], runs[whole]
        tail = theirs["losses"][-len(ours["losses"]) :]
        same = ours["losses"] == tail and ours["weights"] == theirs["weights"]
        return Verdict(
            same, f"{len(tail)} losses and all weights {'equal to the bit' if same else 'DIFFER'}", {"same": same}
        )

    return judge


def exported(name: str) -> Callable[[Runs], Verdict]:
    """Transformers computes the checkpoint's logits."""

    def judge(runs: Runs) -> Verdict:
        found = runs[name]
        return Verdict(
            bool(found["holds"]), f"{found['architecture']}: logits differ by up to {found['logit_difference']:.2g}",
            dict(found),
        )

    return judge


def measured(name: str) -> Callable[[Runs], Verdict]:
    """Nothing to pass: figures."""

    def judge(runs: Runs) -> Verdict:
        found = runs[name]
        mfu = f", MFU {found['mfu']:.1%} of the bf16 peak" if "mfu" in found else ""
        figures = {
            key: found[key]
            for key in ("tokens_per_second", "tflops_per_device", "mfu", "memory_gib", "device") if key in found
        }
        return Verdict(
            True, f"{found['tokens_per_second']:,.0f} tokens/s, {found['tflops_per_device']:.1f} TFLOP/s a device{mfu}"
            f", {found['memory_gib']:.1f} GiB", figures,
        )

    return judge


# On the CPU -----------------------------------------------------------------------------------------------------------


def _cpu_steps() -> list[Step]:
    def small(steps: int, **given: Any) -> Run:
        return Run(settings(SMALLEST, steps, seq_length=64, layers="local", **given), on_cpu=True)

    fp8 = {recipe: {"fp8": {"recipe": recipe}} for recipe in OWN_RECIPES}
    return [
        *(
            Step(
                f"own FP8 {recipe}",
                f"60 steps in this project's own FP8 ({recipe}) stay within 0.05 nats of bf16's (not TE's)",
                {"fp8": small(60, precision=fp8[recipe]), "bf16": small(60)}, near("fp8", "bf16", at_most=0.05),
            )
            for recipe in OWN_RECIPES
        ),
        Step("attention", "unfused attention gives the losses of torch's scaled dot product",
             {"unfused": small(10, precision="fp32", attention="unfused"),
              "sdpa": small(10, precision="fp32", attention="sdpa")}, near("unfused", "sdpa", at_most=1e-4)),
        Step("capture", "the recorder is exact, with recomputation and FP8 too, and changes no bit",
             {"bf16": small(10, capture=True), "recomputed": small(10, capture=True, recompute="full"),
              "fp8": small(10, capture=True, precision=fp8["delayed"]), "plain": small(10)},
             captured("bf16", "recomputed", "fp8", plain="plain")),
        Step("resume", "a run in FP8 that stops and goes on ends as the one that did not",
             {"whole": small(12, precision=fp8["delayed"], save_every=6),
              "rest": Run(settings(SMALLEST, 12, seq_length=64, layers="local", precision=fp8["delayed"], save_every=6),
                          on_cpu=True, resumes="whole")}, resumed("whole", "rest")),
        Step("export", "the Hugging Face export of an FP8 run computes its logits",
             {"whole": small(12, precision=fp8["delayed"], save_every=6),
              "logits": Run({}, on_cpu=True, exports="whole")},
             exported("logits")),
        Step("tensor parallel", "two tensor-parallel processes give the losses of one, in bf16",
             {"two": Run(settings(SMALLEST, 10, seq_length=64, layers="local",
                                  parallel={"tensor_model_parallel_size": 2}), processes=2, on_cpu=True),
              "one": small(10)}, near("two", "one", at_most=0.01)),
    ]


# On GPUs --------------------------------------------------------------------------------------------------------------


def _gpu_steps(machine: Machine) -> list[Step]:
    te = None if "te" in machine.libraries else "Transformer Engine is not usable here"
    flash = None if "flash" in machine.libraries else "flash-attn is not usable here"
    no_fp8 = te or (None if machine.recipes else "this device has no FP8")
    best = "te" if te is None else "local"
    found = [
        Step("gpu against cpu", "20 steps in bf16 on the GPU give the CPU's losses",
             {"gpu": Run(settings(TINY, 20, layers="local", attention="sdpa")),
              "cpu": Run(settings(TINY, 20, layers="local", attention="sdpa"), on_cpu=True)},
             near("gpu", "cpu", at_most=0.02)),
        Step("te against local", "Transformer Engine's layers give the losses of Megatron's own",
             {"te": Run(settings(TINY, 100, layers="te")), "local": Run(settings(TINY, 100, layers="local"))},
             near("te", "local", at_most=0.02), te),
    ]
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        missing = no_fp8 or (None if recipe in machine.recipes else f"this device cannot run {recipe}")
        found.append(
            Step(f"fp8 {recipe}", f"200 steps on text in FP8 ({recipe}) stay within 0.05 nats of bf16's",
                 {"fp8": Run(settings(TINY, 200, layers="te", precision={"fp8": {"recipe": recipe}})),
                  "bf16": Run(settings(TINY, 200, layers="te"))}, near("fp8", "bf16", at_most=0.05), missing)
        )
    for recipe in OWN_RECIPES:
        missing = None if recipe in machine.recipes else f"this device cannot run {recipe}"
        found.append(
            Step(f"own FP8 {recipe}", f"this project's own FP8 ({recipe}) likewise, on the GPU's torch._scaled_mm",
                 {"fp8": Run(settings(TINY, 100, layers="local", precision={"fp8": {"recipe": recipe}})),
                  "bf16": Run(settings(TINY, 100, layers="local"))}, near("fp8", "bf16", at_most=0.05), missing)
        )
    in_fp8: dict[str, Any] = {"precision": {"fp8": {"recipe": "delayed"}}} if no_fp8 is None else {}
    found += [
        Step("flash-attn", "flash-attn gives the losses of torch's scaled dot product",
             {"flash": Run(settings(TINY, 50, layers="local", attention="flash")),
              "sdpa": Run(settings(TINY, 50, layers="local", attention="sdpa"))}, near("flash", "sdpa", at_most=0.02),
             flash),
        Step("capture", "the recorder is exact with the fastest layers, FP8 and recomputation, and changes no bit",
             {"capture": Run(settings(TINY, 20, layers=best, capture=True)),
              "recomputed": Run(settings(TINY, 20, layers=best, capture=True, recompute="full")),
              "fp8": Run(settings(TINY, 20, layers=best, capture=True, **in_fp8)),
              "plain": Run(settings(TINY, 20, layers=best))},
             captured("capture", "recomputed", "fp8", plain="plain")),
        Step("resume", f"a run{' in FP8' if in_fp8 else ''} that stops and goes on ends as the one that did not",
             {"whole": Run(settings(TINY, 20, layers=best, save_every=10, **in_fp8)),
              "rest": Run(settings(TINY, 20, layers=best, save_every=10, **in_fp8), resumes="whole")},
             resumed("whole", "rest")),
        Step("export", "the Hugging Face export computes its logits",
             {"whole": Run(settings(TINY, 20, layers=best, save_every=10, **in_fp8)),
              "logits": Run({}, exports="whole")}, exported("logits")),
        Step("speed bf16", "speed and memory of the study's 1.4B model in bf16", {"run": _study(best)},
             measured("run")),
        *(
            Step(f"speed fp8 {recipe}", f"the same in FP8 ({recipe})",
                 {"run": _study("te", precision={"fp8": {"recipe": recipe}})}, measured("run"), no_fp8)
            for recipe in (machine.recipes or ("delayed",))
        ),
    ]
    for name, parallel in (
        ("tp2", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("pp2", {"pipeline_model_parallel_size": 2}), ("dp2", {"use_distributed_optimizer": True}),
    ):
        found.append(
            Step(name, f"two GPUs ({name}) give the losses of one",
                 {"two": Run(settings(TINY, 50, layers=best, parallel=parallel), processes=2),
                  "one": Run(settings(TINY, 50, layers=best))}, near("two", "one", at_most=0.02),
                 None if machine.gpus > 1 else "there is one GPU")
        )
    return found


def _study(layers: str, **given: Any) -> Run:
    return Run(settings(
        STUDY, 12, layers=layers, seq_length=2048, micro_batch=4, global_batch=16, vocab_size=50_304, **given
    ))

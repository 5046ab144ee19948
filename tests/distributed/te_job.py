"""Runs on Transformer Engine's layers by way of the stand-in; called by the tests through ``run_processes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import te_stand_in

te_stand_in.install()  # before Megatron looks for Transformer Engine

from precision_job import Listener, Run, configure, get_batch  # noqa: E402

from megatron_xalign import topology  # noqa: E402
from megatron_xalign.batch import CurrentBatch  # noqa: E402
from megatron_xalign.training.backends import Found  # noqa: E402

STEPS = 3


def compare(folder: str, parallel: dict[str, Any], models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each model on both kinds of layers: its losses, what its parameters are called, what a recorder sees."""
    return {
        f"{name} {layers}": _train(Path(folder) / f"{name} {layers}", layers, parallel, model)
        for name, model in models.items() for layers in ("te", "local")
    }


def _train(folder: Path, layers: str, parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    from megatron_xalign.capture.recorder import Recorder
    from megatron_xalign.training.checkpoint import load_weights
    from megatron_xalign.training.forward import build_forward_only

    config = configure(STEPS, parallel=parallel, model=model, backend={"layers": layers, "optimizer": "torch"})
    with topology.start(config.parallel, seed=1) as ranks:
        run = Run(folder, ranks, config, Found(versions={"te": "2.6.0"}))
        metrics = run.fit(0)
        current, listener = CurrentBatch(), Listener()
        recorder = Recorder(run.chunks, ranks, current)
        recorder.start(listener)
        losses = build_forward_only(run.chunks, ranks, current)([get_batch([900, 901])])
        recorder.stop(1)
        # The other kind's weights, in this kind's names.
        other = folder.parent / folder.name.replace("te", "@").replace("local", "te").replace("@", "local")
        crossed = None
        if (other / f"step-{STEPS:06d}").exists():
            load_weights(other / f"step-{STEPS:06d}", run.chunks, ranks)
            crossed = build_forward_only(run.chunks, ranks, current)([get_batch([900, 901])])
        ranks.barrier()
        own = run.chunks[0].module.decoder.layers[0]
        return {
            "losses": [line["loss"] for line in metrics], "norms": [line["grad_norm"] for line in metrics],
            "described": run.described, "neurons": [float(seen.abs().sum()) for seen in listener.neurons],
            "names": sorted(name for name, _ in run.chunks[0].module.named_parameters()),
            "kinds": [type(own.self_attention.linear_qkv).__name__, type(own.self_attention.core_attention).__name__],
            "evaluated": None if losses is None else float(losses[0].sum()),
            "crossed": None if crossed is None else float(crossed[0].sum()),
        }

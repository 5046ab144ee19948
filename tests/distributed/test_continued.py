"""Training that goes on from an imported model begins with the loss that transformers has on the same batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_job import get_batch
from model_checkpoint import random_transformers_model, run_config
from processes import run_processes

from megatron_xalign.convert.from_hf import from_hf

pytestmark = pytest.mark.distributed
pytest.importorskip("transformers")

JOB = Path(__file__).with_name("checkpoint_job.py")
CASES = {
    "llama": {}, "qwen2-tied": {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "olmo": {"normalization": "LayerNorm"},
}


def test_the_first_loss_is_that_of_the_imported_model_and_training_lowers_it(tmp_path: Path) -> None:
    expected, imported = {}, {}
    batch = get_batch(list(range(8)))
    for name, family in CASES.items():
        model = random_transformers_model(run_config(num_layers=2, **family))
        model.save_pretrained(str(tmp_path / "hf" / name))
        imported[name] = str(from_hf(tmp_path / "hf" / name, tmp_path / "imported" / name))
        with torch.no_grad():
            logits_BSV = model(batch.tokens).logits
        expected[name] = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch.labels.flatten()).item()
    arguments = {
        "folder": str(tmp_path / "runs"), "checkpoints": imported, "parallel": {"tensor_model_parallel_size": 2}
    }
    for losses in run_processes(JOB, "continued", arguments, num_processes=2, timeout_seconds=500):
        for name in CASES:
            assert losses[name][0] == pytest.approx(expected[name], rel=2e-5)
            assert losses[name][-1] < losses[name][0]

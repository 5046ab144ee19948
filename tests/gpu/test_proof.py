"""Every step of ``xalign doctor --prove`` on this machine's GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_xalign import doctor
from megatron_xalign.prove.run import as_table, prove

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
]


def test_what_this_machine_can_do_is_proved(tmp_path: Path) -> None:
    summary = prove(tmp_path, doctor.examine(), cpu=False, gpus=None)
    assert summary["passed"], as_table(summary)

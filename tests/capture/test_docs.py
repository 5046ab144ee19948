"""The observer that docs/capture.md shows is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plain_model import ONE_PROCESS, Model, make_batches, train_on

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.training.observers import build_observers, listens


def test_the_observer_of_the_docs_runs_and_counts_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from [^\n]* import Recorder\n\nclass GateShare:.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    model, current = Model(), CurrentBatch()
    run: Any = SimpleNamespace(model_chunks=[model], ranks=ONE_PROCESS, current_batch=current)
    (observer,) = build_observers([names["GateShare"]], run)
    assert listens(observer)
    batch = make_batches(1, [3])[0]
    observer.before_step(0)
    train_on(model, [batch], current)
    observer.after_step(1, {})
    observer.close()
    fc1 = model.embedding.weight[batch.tokens] @ model.decoder[0].mlp.linear_fc1.weight.t()
    share = (fc1[..., : fc1.shape[-1] // 2] > 0).float().mean()
    step, printed = capsys.readouterr().out.split()
    assert step == "1" and float(printed) == pytest.approx(share.item(), abs=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
